"""The files of the page: a path to the bytes that a browser gets.

To add a page, put a file into the folder, or into a folder in it: it is served under its name. Nothing outside the
folder is served, and no name that begins with a dot.
"""

import gzip
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("page")
TYPES = {  # Python's `mimetypes` reads the registry on Windows, where .js may be anything
    ".avif": "image/avif",
    ".css": "text/css; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".gif": "image/gif",
    ".htm": "text/html; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".mp3": "audio/mpeg",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".webmanifest": "application/manifest+json",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
PATH = re.compile(r"(/[^./\\:\0][^/\\:\0]*)+")  # of names, on any system, that do not begin with a dot
UNKNOWN_TYPE = "application/octet-stream"
COMPRESSED_TYPES = re.compile(r"text/.*|application/(manifest\+)?json|image/svg\+xml")
MAX_FILE = 4 << 20  # bytes; a larger file is not served: reading it would delay every client
MAX_COMPRESSED = 1 << 20  # bytes of a file that is compressed; that takes about 30 ms
MAX_CACHE = 16 << 20  # bytes of all files in memory


class PageFile(NamedTuple):
    """One file in one encoding."""

    content_type: str
    body: bytes
    encoding: str  # "gzip", or "" for the bytes of the file
    etag: str


class Cached(NamedTuple):
    """One file as it was when it was read."""

    version: tuple[int, ...]  # differs once the file has changed
    encoded: list[PageFile]  # as it is, and then compressed where that is smaller


class Pages:
    """The files of one folder, in memory once they have been asked for, and read again when they have changed."""

    def __init__(self, folder: Path = PAGE):
        self.folder = folder
        self._cache: dict[str, Cached] = {}

    def find(self, path: str, accept_encoding: str = "") -> PageFile | None:
        """The file for the decoded path of a URL, or None where there is none that can be served."""
        try:
            encoded = self._load(self._locate(path))
        except (OSError, ValueError):  # ValueError: also a character that no file name can have
            return None
        return encoded[-1] if accepts_gzip(accept_encoding) else encoded[0]

    def _locate(self, path: str) -> str:
        """The file inside the folder, links followed. Raises OSError or ValueError when there is none."""
        if path == "/":
            path = "/index.html"
        if not PATH.fullmatch(path):
            raise ValueError("not a path of the page")
        folder = os.path.realpath(self.folder, strict=True)
        file = os.path.realpath(os.path.join(folder, path[1:]), strict=True)
        Path(file).relative_to(folder)  # raises ValueError for a file outside
        return file

    def _load(self, file: str) -> list[PageFile]:
        facts = os.stat(file)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_FILE:
            raise ValueError("not a file that can be served")
        version = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
        cached = self._cache.get(file)
        if cached is None or cached.version != version:
            cached = self._cache[file] = Cached(version, _read(file))
            if sum(len(each.body) for other in self._cache.values() for each in other.encoded) > MAX_CACHE:
                self._cache = {file: cached}
        return cached.encoded


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a header Accept-Encoding allows gzip (RFC 9110, 12.5.3)."""
    weights = {}
    for item in accept_encoding.lower().split(","):
        coding, _, weight = item.partition(";")
        weights[coding.strip()] = weight.replace(" ", "").replace("\t", "")
    weight = weights.get("gzip", weights.get("x-gzip", weights.get("*", "q=0")))
    return not re.fullmatch(r"q=0(\.0*)?", weight)


def _read(file: str) -> list[PageFile]:
    """A file as it is, and compressed where that is smaller."""
    with open(file, "rb") as stream:
        body = stream.read(MAX_FILE)
    content_type = TYPES.get(os.path.splitext(file)[1].lower(), UNKNOWN_TYPE)
    digest = hashlib.sha256(body).hexdigest()[:20]
    encoded = [PageFile(content_type, body, "", f'W/"{digest}"')]
    if len(body) <= MAX_COMPRESSED and COMPRESSED_TYPES.fullmatch(content_type):
        smaller = gzip.compress(body, 6, mtime=0)
        if len(smaller) < len(body):
            encoded.append(PageFile(content_type, smaller, "gzip", f'W/"{digest}-gzip"'))
    return encoded
