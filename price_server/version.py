"""The version, as --version, /healthz and /metrics tell it."""

__version__ = "2.0.0"
