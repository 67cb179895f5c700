"""Cuts versions and agents off in another process: one command a line in, one answer a line out.

`python -m support.cutter STATE_FOLDER`; the commands are `revoke VERSION`, `suspend AGENT` and
`resume AGENT`. The answer says when the command had returned, on the clock that all processes share.
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from keyturn.administration import Administration
from keyturn.errors import StoreUnavailable
from keyturn.leaks import Caller, Leak
from keyturn.storage.ledger import Ledger
from keyturn.storage.requests import Begun
from keyturn.storage.store import Store
from keyturn.verifier.authority import BuiltinAuthority
from keyturn.verifier.spool import Spool
from support.stores import RealClock

CALLER = Caller(name="tester")


def administration(
    folder: Path,
    store: Store,
    *,
    patience: float = 5.0,
    authority: BuiltinAuthority | None = None,
) -> Administration:
    """Return the verbs over the store of a folder."""
    return Administration(
        open_store=lambda: store,
        ledger=Ledger(folder / "ledger"),
        spool=Spool(folder / "revoked.d"),
        begun=Begun(folder / "requests.d"),
        authority=authority or BuiltinAuthority(),
        clock=RealClock(),
        schedule=lambda _case, _now: None,
        patience=timedelta(seconds=patience),
    )


def open_store(folder: Path, *, writer: str, **more: Any) -> Store:
    """Open the store of a folder as one more writer."""
    return Store.open(
        f"sqlite:///{folder / 'keyturn.db'}",
        state_dir=folder,
        clock=RealClock(),
        random_bytes=bytes,
        writer=writer,
        **more,
    )


def cut(verbs: Administration, command: str, name: str) -> dict[str, Any]:
    """Do one command."""
    match command:
        case "revoke":
            return verbs.revoke(Leak(version=name), CALLER)
        case "suspend":
            return verbs.suspend(name, CALLER)
    return verbs.resume(name, CALLER)


def main() -> None:
    """Obey until the input ends."""
    folder = Path(sys.argv[1])
    store = open_store(folder, writer="another process", create=False)
    verbs = administration(folder, store)
    for line in sys.stdin:
        try:
            cut(verbs, *line.split())
        except StoreUnavailable as error:
            print("failed", error, flush=True)
        else:
            print(time.monotonic(), flush=True)
    store.close()


if __name__ == "__main__":
    main()
