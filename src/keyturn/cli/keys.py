"""`keyturn make-key`: a key for hmac-sha256, in a file that nobody else has ever been able to read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keyturn.cli import options, output
from keyturn.cli.reach import late
from keyturn.cli.render import safe


def make_key(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A new file, outside of the store's folder.")
    ],
    json: options.Json = False,
    config: options.Config = options.CONFIG,
) -> None:
    """Make a key for `scheme: hmac-sha256`.

    32 random bytes as hexadecimal digits, 0600, synced; a file that is there is never replaced. Root
    gives it to the user to whom the store belongs. The key is not printed: copy the file to every host
    with a verifier, and keep a copy where no backup of the store lies.
    """
    found = late("keyturn.daemon.keys", "make")(file, config)
    output.show(found, as_json=json, people=_made)


def _made(found: dict[str, Any]) -> str:
    return (
        f"{safe(found['file'])}: a new key, 0600, of uid {found['owner']}"
        f" (its check in hashes: {safe(found['check'])})"
    )
