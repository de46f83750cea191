"""origins: what is an origin, and which may read."""

import pytest

from price_server.origins import Origins, check_origin

NARROWED = Origins(["https://Example.org/", "http://localhost:8080", "moz-extension://*", "capacitor://localhost"])


ALLOWED = (
    *("https://example.org", "HTTPS://Example.ORG", "http://localhost:8080", "capacitor://localhost"),
    *("http://server.example.com", "https://SERVER.example.com"),  # the page came from this server
    "moz-extension://2c3e6e5a-54cc-4e5b-8f2b-6b0f3f0a9d11",
)
OTHERS = (
    *("http://server.example.com:8080", "http://localhost", "http://localhost:80800", "https://example.org:8443"),
    *("http://example.org", "https://example.com", "https://example.org.evil.net", "ftp://server.example.com"),
    *("https://evil.net/https://example.org", "moz-extension://", "xmoz-extension://2c3e", "capacitor://localhost2"),
    *("chrome-extension://2c3e", "example.org", "null", ""),
)


def test_only_the_allowed_origins_may_read() -> None:
    may_read = [origin for origin in ALLOWED + OTHERS if NARROWED.allow(origin, "Server.Example.com")]
    assert may_read == list(ALLOWED)
    assert all(Origins().allow(origin, "") for origin in ALLOWED + OTHERS)  # without any, all may


def test_an_origin_is_not_taken_for_this_server_because_neither_has_a_host() -> None:
    for origin in ("null", "x://", "http://", "https://", ""):
        assert not NARROWED.allow(origin, "")


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("HTTPS://Example.org/", "https://example.org"),
        ("https://example.org:443", "https://example.org"),  # browsers leave it out
        ("http://example.org:80", "http://example.org"),
        ("http://example.org:443", "http://example.org:443"),
        ("http://192.0.2.7:3000", "http://192.0.2.7:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("http://my_host", "http://my_host"),
        ("safari-web-extension://2C3E", "safari-web-extension://2c3e"),
        ("moz-extension://*", "moz-extension://*"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("app://.", "app://."),
        ("file:///", "file://"),
        ("NULL", "null"),
    ],
)
def test_what_a_browser_or_an_app_sends_is_an_origin(text: str, origin: str) -> None:
    assert check_origin(text) == check_origin(origin) == origin
    assert Origins([text]).allow(origin.replace("*", "any-id"), "")


@pytest.mark.parametrize(
    "text",
    [
        *("", "*", "example.org", "https://", "https:///", "http://*", "https://*", "https://*.example.org", "://x"),
        *("https://example.org/app", "https://example.org?x", "https://example.org#x", "https://me@example.org"),
        *("https://example.org:99999", "https://example.org:0", "https://example.org:", "https://bücher.example"),
        *("file:///home", "app://*:80", "app://:80", "moz-extension://*x", "https://a b", "https://a;script-src *"),
        *("https://a\nb", "http://[::1", "nil", "localhost:3000", "javascript:alert(1)", "https//example.org"),
    ],
)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^['\"].* (is not an origin|names no host|has no port|has a port)"):
        check_origin(text)
    with pytest.raises(ValueError, match=r"^['\"]"):
        Origins(["https://example.org", text])


@pytest.mark.parametrize(
    ("allowed", "sources"),
    [
        ([], "'self'"),
        (["https://example.org", "http://[::1]:3000/"], "'self' https://example.org http://[::1]:3000"),
        (["moz-extension://*", "moz-extension://x", "file://", "null"], "'self' moz-extension: file:"),
    ],
)
def test_an_allowed_origin_may_frame_the_page(allowed: list[str], sources: str) -> None:
    assert Origins(allowed).frame_ancestors == f"frame-ancestors {sources}"
