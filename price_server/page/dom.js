// What each module needs of the document.

export const byId = (id) => document.getElementById(id);

// Only a change: otherwise a screen reader would say the same again, and the browser lay it out again.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
