"""Finds adapters by entry point (group `keyturn.destinations`); only what is named is imported."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from keyturn.destinations.base import DestinationBase
from keyturn.errors import ConfigError

GROUP = "keyturn.destinations"
FOR_TESTS = frozenset({"memory"})  # can be named, and nobody is offered it
EXTRAS = frozenset({"aws", "azure", "vault"})  # types of ours whose library is an extra


def load(kind: str) -> type[DestinationBase]:
    """Return the adapter of a type.

    Raises ConfigError for an unknown type, one that two packages claim, or a missing library.
    """
    found = {point.value: point for point in entry_points(group=GROUP, name=kind)}
    if not found:
        offered = ", ".join(one for one in names() if one not in FOR_TESTS)
        raise ConfigError(f"expected a type of destination: {offered}")
    if len(found) > 1:
        # SECURITY: else the order of the search path would choose who gets the secrets.
        raise ConfigError(
            f"two installed packages claim the type {kind}", hint="remove one of them"
        )
    return _loaded(*found.values())


def names() -> list[str]:
    """Return every type that is installed."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def _loaded(point: EntryPoint) -> type[DestinationBase]:
    try:
        found = point.load()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "keyturn":
            raise  # a bug of ours, no missing library
        raise ConfigError(
            f"the type {point.name} needs a library that is not installed", hint=_remedy(point)
        ) from error
    if not (isinstance(found, type) and issubclass(found, DestinationBase)):
        raise ConfigError(f"the entry point of type {point.name} is no destination")
    return found


def _remedy(point: EntryPoint) -> str:
    if point.name in EXTRAS:
        return f"pip install 'keyturn[{point.name}]'"
    return f"install what the package of type {point.name} needs"
