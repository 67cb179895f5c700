"""Notes what a process mints, for the canary over the whole suite (`support.canary_watch`).

Python imports this in processes that tests start with this folder on PYTHONPATH. It imports nothing
of the product, so that the product's first statement stays its first.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "keyturn.core.secret"
_FOLDER = os.environ.get("TESTS_CANARY", "")


class _Finder:
    """Wraps the one place where secrets are made as soon as that module is there."""

    @staticmethod
    def find_spec(name: str, path: Any = None, _target: Any = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_wrap(module: ModuleType) -> None:
                run(module)
                _wrap(module)

            spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(module: Any) -> None:
    original, length = module._base62, module.RANDOM_LENGTH

    def noted(random_bytes: Any, count: int) -> str:
        digits: str = original(random_bytes, count)
        if count == length:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            note = os.open(f"{_FOLDER}/{os.getpid()}", flags, 0o600)
            os.write(note, digits.encode() + b"\n")
            os.close(note)
        return digits

    module._base62 = noted


if _FOLDER:
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
