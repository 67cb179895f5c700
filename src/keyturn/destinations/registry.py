"""Finds adapters by entry point (group `keyturn.destinations`); only what is named is imported."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from keyturn.destinations.base import DestinationBase
from keyturn.errors import ConfigError

GROUP = "keyturn.destinations"
EXTRAS = {"vault": "vault"}


def load(kind: str) -> type[DestinationBase]:
    """Return the adapter of a type. Raises ConfigError for an unknown one or a missing SDK."""
    known = {point.name: point for point in entry_points(group=GROUP)}
    if kind not in known:
        raise ConfigError(f"expected a type of destination: {', '.join(sorted(known))}")
    return _loaded(known[kind])


def names() -> list[str]:
    """Return every type that is installed."""
    return sorted(point.name for point in entry_points(group=GROUP))


def _loaded(point: EntryPoint) -> type[DestinationBase]:
    try:
        found = point.load()
    except ImportError as error:
        extra = EXTRAS.get(point.name, point.name)
        raise ConfigError(
            f"the type {point.name} needs a library that is not installed",
            hint=f"pip install 'keyturn[{extra}]'",
        ) from error
    if not (isinstance(found, type) and issubclass(found, DestinationBase)):
        raise ConfigError(f"the entry point of type {point.name} is no destination")
    return found
