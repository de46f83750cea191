"""pages: a path to the bytes of a file of the page."""

import gzip
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from price_server import pages as pages_module
from price_server.pages import PageFile, Pages, accepts_gzip

SCRIPT = b"export const answer = 42;\n" * 100


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a page, with a secret beside it."""
    folder = tmp_path / "page"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "index.html").write_bytes(b"<!doctype html>")
    (folder / "main.js").write_bytes(SCRIPT)
    (folder / "sub" / "deep" / "chart.svg").write_bytes(b"<svg/>")
    (folder / ".hidden").write_bytes(b"hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"hidden")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (tmp_path / "page-two").mkdir()
    (tmp_path / "page-two" / "secret.txt").write_bytes(b"secret")
    return folder


def found(pages: Pages, path: str, accept_encoding: str = "") -> PageFile:
    file = pages.find(path, accept_encoding)
    assert file is not None
    return file


def test_a_file_is_served_under_its_name_and_the_index_as_the_root(folder: Path) -> None:
    pages = Pages(folder)
    assert found(pages, "/").body == found(pages, "/index.html").body == b"<!doctype html>"
    assert found(pages, "/main.js").body == SCRIPT
    assert found(pages, "/sub/deep/chart.svg").body == b"<svg/>"
    (folder / "über uns.html").write_bytes(b"")
    assert found(pages, "/über uns.html", "gzip").body == b""


@pytest.mark.parametrize(
    "path",
    [
        *("/../secret.txt", "/sub/../../secret.txt", "/sub/../main.js", "/./main.js", "/..", "/.", "../secret.txt"),
        *("//main.js", "/sub//deep/chart.svg", "/main.js/", "/sub", "/sub/", "", "*", "main.js", "/nope.js"),
        *("/..\\secret.txt", "/sub\\deep\\chart.svg", "/C:/secret.txt", "/main.js:stream", "/%2e%2e/secret.txt"),
        *("/.hidden", "/.git/config", "/main.js\0", "/\0", "/main.js/x", "/\ud800", "/../page-two/secret.txt"),
        *("/" + "x" * 30_000, "/sub" * 7_000, "/" + "../" * 9_000 + "etc/passwd", "//etc/passwd", "/etc/passwd"),
    ],
)
def test_nothing_else_is_served_in_any_spelling(folder: Path, path: str) -> None:
    assert Pages(folder).find(path, "gzip") is None


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_name_that_means_a_path_on_another_system_is_not_served(folder: Path) -> None:
    for name in ("sub\\main.js", "C:main.js"):
        (folder / name).touch()
        assert Pages(folder).find(f"/{name}") is None


def test_links_may_lead_to_files_inside_only(folder: Path, tmp_path: Path) -> None:
    (folder / "out.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "two").symlink_to(tmp_path / "page-two")
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to("nowhere")
    (folder / "in.js").symlink_to("main.js")
    pages = Pages(folder)
    for path in ("/out.txt", "/two/secret.txt", "/up/secret.txt", "/loop", "/gone"):
        assert pages.find(path) is None
    assert found(pages, "/in.js").body == SCRIPT


def test_a_folder_that_is_a_link_is_followed_also_when_it_is_changed(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    pages = Pages(link)
    assert found(pages, "/main.js").body == SCRIPT
    link.unlink()
    link.symlink_to(tmp_path / "page-two")
    assert pages.find("/main.js") is None
    assert found(pages, "/secret.txt").body == b"secret"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO here")
def test_what_is_not_a_regular_file_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    assert Pages(folder).find("/pipe.txt") is None


def test_a_file_that_cannot_be_read_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(folder)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    assert pages.find("/main.js") is None
    assert Pages(folder / "nowhere").find("/") is None


def test_the_type_is_told_by_the_suffix(folder: Path) -> None:
    types = {
        "a.html": "text/html; charset=utf-8",
        "a.css": "text/css; charset=utf-8",
        "a.js": "text/javascript; charset=utf-8",
        "a.mjs": "text/javascript; charset=utf-8",
        "a.JSON": "application/json",
        "a.svg": "image/svg+xml",
        "a.png": "image/png",
        "a.ico": "image/x-icon",
        "a.webmanifest": "application/manifest+json",
        "a.woff2": "font/woff2",
        "a.min.txt": "text/plain; charset=utf-8",
        "a.exe": "application/octet-stream",
        "a": "application/octet-stream",
    }
    for name in types:
        (folder / name).write_bytes(b"x")
    assert {name: found(Pages(folder), f"/{name}").content_type for name in types} == types


def test_text_is_compressed_where_the_browser_takes_it(folder: Path) -> None:
    (folder / "logo.png").write_bytes(SCRIPT)
    (folder / "large.txt").write_bytes(b"x" * ((1 << 20) + 1))
    pages = Pages(folder)
    plain, compressed = found(pages, "/main.js"), found(pages, "/main.js", "br, gzip")
    assert (plain.encoding, plain.body) == ("", SCRIPT)
    assert (compressed.encoding, gzip.decompress(compressed.body)) == ("gzip", SCRIPT)
    assert compressed.etag.startswith('W/"')
    assert compressed.etag != plain.etag
    assert compressed.content_type == plain.content_type
    for name in ("a.svg", "a.json", "a.webmanifest", "a.csv"):
        (folder / name).write_bytes(SCRIPT)
        assert found(pages, f"/{name}", "gzip").encoding == "gzip"
    for name in ("/logo.png", "/index.html", "/large.txt"):  # an image, too small to gain anything, too long to wait
        assert found(pages, name, "gzip").encoding == ""


def test_a_browser_says_whether_it_takes_gzip() -> None:
    for header in ("gzip, deflate, br", "GZIP", "x-gzip", "*", "br;q=1.0, gzip;q=0.001", "gzip;q=1, *;q=0"):
        assert accepts_gzip(header)
    for header in ("", "identity", "gzipped", "gzip;q=0", "gzip ; Q = 0.000 , br", "*;q=0", "gzip;q=0, *"):
        assert not accepts_gzip(header)


def test_a_file_is_read_and_compressed_once_for_each_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress = Mock(wraps=gzip.compress)
    monkeypatch.setattr(gzip, "compress", compress)
    pages = Pages(folder)
    first = found(pages, "/main.js", "gzip")
    assert found(pages, "/main.js", "gzip").body is first.body  # held once for all who take it
    assert found(pages, "/main.js").body == SCRIPT
    assert compress.call_count == 1
    (folder / "main.js").write_bytes(SCRIPT.swapcase())  # as long as before
    os.utime(folder / "main.js", (1, 1))
    changed = found(pages, "/main.js")
    assert changed.body == SCRIPT.swapcase() != SCRIPT
    assert changed.etag != first.etag.replace("-gzip", "")
    (folder / "main.js").unlink()
    assert pages.find("/main.js") is None


def test_the_same_bytes_have_the_same_etag_on_every_server(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "page-two" / "other.js").write_bytes(SCRIPT)
    os.utime(tmp_path / "page-two" / "other.js", (1, 1))
    assert found(Pages(folder), "/main.js").etag == found(Pages(tmp_path / "page-two"), "/other.js").etag


def test_memory_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "MAX_FILE", 1_000)
    monkeypatch.setattr(pages_module, "MAX_CACHE", 2_500)
    pages = Pages(folder)
    for number in range(10):
        (folder / f"{number}.png").write_bytes(b"x" * 1_000)
        assert found(pages, f"/{number}.png").body == b"x" * 1_000
        assert sum(len(each.body) for cached in pages._cache.values() for each in cached.encoded) <= 2_500
    (folder / "huge.png").write_bytes(b"x" * 1_001)
    assert pages.find("/huge.png") is None
