"""Bytes that are UTF-8, and bytes that are not: Markus Kuhn's sequences, as in Autobahn's group 6."""

from raw import octets

KOSME = bytes.fromhex("ceba e1bdb9 cf83 cebc ceb5")  # "κόσμε" as Kuhn has it: one character of three bytes
VALID_UTF8 = [
    *("Hello-µ@ßöäüàá-UTF-8!!".encode(), "κόσμε".encode(), KOSME),
    *(KOSME[:size] for size in (2, 5, 7, 9)),
    *(b"\x00", b"\xc2\x80", b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"),
    *(b"\x7f", b"\xdf\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf"),
    *(b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xef\xbf\xbd"),
    *(b"\xef\xbf" + bytes([last]) for last in range(0xB9, 0xC0)),
    *(chr(plane << 16 | last).encode() for plane in range(1, 17) for last in (0xFFFE, 0xFFFF)),
]
OVERLONG = [b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xf8\x80\x80\x80\xaf", b"\xfc\x80\x80\x80\x80\xaf"]
OVERLONG += [b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xf8\x87\xbf\xbf\xbf", b"\xfc\x83\xbf\xbf\xbf\xbf"]
OVERLONG += [b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf8\x80\x80\x80\x80", b"\xfc\x80\x80\x80\x80\x80"]
INCOMPLETE = [b"\xc0", b"\xe0\x80", b"\xf0\x80\x80", b"\xf8\x80\x80\x80", b"\xfc\x80\x80\x80\x80"]
INCOMPLETE += [b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf", b"\xfb\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf"]
SURROGATES = [b"\xed\xa0\x80", b"\xed\xad\xbf", b"\xed\xae\x80", b"\xed\xaf\xbf", b"\xed\xb0\x80", b"\xed\xbe\x80"]
SURROGATES += [b"\xed\xbf\xbf"]
INVALID_UTF8 = [
    *(KOSME + b"\xed\xa0\x80edited", KOSME + b"\xf4\x90\x80\x80edited"),
    *(KOSME[:size] for size in (1, 3, 4, 6, 8, 10)),
    *(b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"),
    *(b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf", b"\xf4\x90\x80\x80"),
    *(b"\x80", b"\xbf", *(b"\x80\xbf" * size for size in (1, 2, 3)), b"\x80\xbf\x80", bytes(range(0x80, 0xC0))),
    *(b" ".join(octets(bytes(range(first, last)))) + b" " for first, last in ((0xC0, 0xE0), (0xE0, 0xF0))),
    *(b" ".join(octets(bytes(range(first, last)))) + b" " for first, last in ((0xF0, 0xF8), (0xF8, 0xFE))),
    *INCOMPLETE,
    b"".join(INCOMPLETE),
    *(b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"),
    *OVERLONG,
    *SURROGATES,
    *(high + low for high in SURROGATES[:4] for low in (b"\xed\xb0\x80", b"\xed\xbf\xbf")),
]
