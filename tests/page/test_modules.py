"""The files of the page as such: their rules by Node, their size, and what of the language they may use."""

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from running import ROOT, outside

PAGE = ROOT / "price_server/page"
MODULES = sorted(PAGE.glob("*.js"))
# Younger than Safari 16, Chrome 108 and Firefox 115.
TOO_YOUNG = (
    r"AbortSignal\.(any|timeout)|\.to(Sorted|Reversed|Spliced)\(|\.aria[A-Z]\w+ =|Object\.groupBy|canParse"
    r"|fromAsync|withResolvers|requestIdleCallback|\(\?<|static \{|scheduler\.|checkVisibility|:has\(|color-mix|^\s+&"
)


def test_the_rules_hold_in_node(tmp_path: Path) -> None:
    outside("node")
    for folder in ("price_server/page", "tests/page"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "package.json").write_text('{"type": "module"}')  # older ones do not find out by themselves
    tests = sorted(str(file) for file in (tmp_path / "tests/page").glob("*.test.js"))
    environment = os.environ | {"TZ": "Europe/Berlin"}
    done = subprocess.run(["node", "--test", *tests], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert len(tests) == 2


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_a_module_is_short_loaded_at_once_and_runs_in_old_browsers(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert text.startswith("// ")
    assert len(text.splitlines()) <= 200
    assert not re.search(TOO_YOUNG, text, re.MULTILINE)
    kind = 'type="module" src' if module.name == "main.js" else 'rel="modulepreload" href'
    assert f'{kind}="{module.name}"' in (PAGE / "index.html").read_text(encoding="utf-8")


def test_the_first_load_is_small_and_the_style_runs_in_old_browsers() -> None:
    assert sum(len(gzip.compress(file.read_bytes())) for file in PAGE.iterdir()) < 25 << 10
    assert not re.search(TOO_YOUNG, (PAGE / "style.css").read_text(encoding="utf-8"), re.MULTILINE)
