"""Which web origins may read the feed and the HTTP responses, and may frame the page.

An origin is what a browser or an app sends in the header Origin (RFC 6454). Upper and lower case are the same.
"""

import re
from collections.abc import Iterable

ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._~-]*|\*)(?::(?P<port>[0-9]{1,5}))?/?"
)
DEFAULT_PORTS = {"http": "80", "https": "443"}  # browsers leave them out


def check_origin(text: str) -> str:
    """An origin to be allowed, as browsers send it. `scheme://*` allows all of a scheme other than http and https.

    Raises ValueError, whose text is one line that names what was given, for anything else.
    """
    origin = text.strip().lower()
    if origin == "null":
        return origin
    parts = ORIGIN.fullmatch(origin)
    if not parts:
        raise ValueError(f"{text!r} is not an origin like https://example.org, chrome-extension://ID, file:// or null")
    scheme, host, port = parts.groups()
    if scheme in DEFAULT_PORTS and host in ("", "*"):
        raise ValueError(f"{text!r} names no host; to let all web pages read, leave --allow-origin out")
    if port and host in ("", "*"):
        raise ValueError(f"{text!r} has a port, but no host")
    if port and not 1 <= int(port) <= 65_535:
        raise ValueError(f"{text!r} has no port from 1 to 65535")
    if port is None or port == DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{int(port)}"


class Origins:
    """The allowed origins; without any, all may read.

    Raises ValueError for what is not an origin.
    """

    def __init__(self, allowed: Iterable[str] = ()):
        origins = [check_origin(each) for each in allowed]
        self.is_restricted = bool(origins)
        self._exact = frozenset(origins)
        self._schemes = frozenset(each.removesuffix("*") for each in origins if each.endswith("://*"))
        # Without `null`, which browsers would ignore there.
        ancestors = [_frame_source(each) for each in origins if each != "null"]
        self.frame_ancestors = " ".join(["frame-ancestors 'self'", *dict.fromkeys(ancestors)])

    def allow(self, origin: str, host: str) -> bool:
        """Whether a page of this origin may read what it asked `host` for; its own server's page always may."""
        if not self.is_restricted:
            return True
        origin, host = origin.lower(), host.lower()
        if origin in self._exact or (host and origin in (f"http://{host}", f"https://{host}")):
            return True
        scheme, separator, rest = origin.partition("://")
        return bool(rest) and scheme + separator in self._schemes


def _frame_source(origin: str) -> str:
    """An origin as a source in Content-Security-Policy: other schemes than the web's have no host there."""
    scheme = origin.partition("://")[0]
    return origin if scheme in DEFAULT_PORTS else f"{scheme}:"
