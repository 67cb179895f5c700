"""Keyturn gives agents and services new credentials before the old ones get stale."""

__version__ = "0.1.0"
