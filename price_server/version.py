"""The version, as --version, /healthz and /metrics show it."""

__version__ = "2.0.0"
