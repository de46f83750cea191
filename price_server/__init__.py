"""All that clients see: the WebSocket feed, the HTTP beside it, the past. Knows nothing of CoinAPI.

    server.py      PriceServer: publish, clients and visitors, start and stop
    loop.py        the thread that owns all of it, and the functions that others hand to it
    interface.py   what websocket-server documents, over that loop
    connection.py  one accepted socket: what came and is not whole yet, what must go out and did not fit
    frames.py      RFC 6455: bytes to frames and messages, and back
    web.py         the head of an HTTP request to what is sent back
    figures.py     the latest prices and the counters
    history.py     the prices of the past, in memory
    archive.py     a copy of them in a SQLite file
    dashboard.html the page

Threads: `server` waits for sockets, in one selector loop over the listener and every connection; it
owns all of these, the latest prices, the past and the counters. `archive`, which exists only with a
file for the past, waits for the disk and owns that file. Both are daemons, so that a program which
forgets to stop them still ends; both stop in `shutdown_gracefully` and `shutdown_abruptly`. Other
threads hand the server's a function to call.
"""

from .server import PriceServer

__all__ = ["PriceServer"]
