"""Everything clients see: the WebSocket feed, the HTTP beside it, the past. Knows nothing of CoinAPI."""

__version__ = "2.0.0"  # before the import: server.py puts it into /healthz

from .server import PriceServer

__all__ = ["PriceServer"]
