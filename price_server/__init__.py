"""Everything clients see: the feed, the HTTP paths, the price history. Nothing here asks CoinAPI.

Dependencies point down this list and form no circle:

    server.py      PriceServer: what other threads may call
    hub.py         which connection is a client, what it gets, when it is dropped
    transport.py   moves bytes between sockets and connections
    loop.py        a selector, and functions handed over by other threads
    connection.py  one connection as a protocol: bytes in, events out, bytes to send
    outbox.py      what is still to be sent to one connection
    web.py         one HTTP request to one response, or to a new client
    pages.py       the files of the page
    origins.py     which web origins may read
    commands.py    what a client may say
    status.py      counters and gauges, /healthz, /metrics
    archive.py     a copy of the history in a SQLite file
    history.py     the price history, in memory
    prices.py      the latest prices, and what a valid price is
    formats.py     how messages are written to a client
    frames.py      RFC 6455: bytes to frames and messages, and back
    clocks.py      the clock that runs on while the machine sleeps
    version.py     the version
    page/          the page
"""

from .server import PriceServer
from .version import __version__

__all__ = ["PriceServer", "__version__"]
