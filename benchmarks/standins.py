"""The stand-ins of the clouds in a process of their own: their work must not wait for our GIL.

Their limits of writes and requests are out of the way: what is measured is our cost, not theirs.

    python benchmarks/standins.py aws|azure FOLDER

Prints how to reach it as one line of JSON, and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keyturn.testing import resolver

NO_LIMIT = 10**9


@contextlib.contextmanager
def stand_in(kind: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Run one until the block ends, and give how to reach it. Its names resolve in this process."""
    folder.mkdir(mode=0o700)
    command = [sys.executable, __file__, kind, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the stand-in of {kind} did not start")
            found = json.loads(line)
            places = found.pop("places", "")
            with resolver.resolving(resolver.from_text(places) if places else {}):
                yield found
        finally:
            process.terminate()


@contextlib.contextmanager
def aws_here(folder: Path) -> Iterator[dict[str, Any]]:
    """Run AWS in this process."""
    from keyturn.testing import aws

    with aws.stand_in(folder, tls=True, rate=NO_LIMIT) as one:
        connection = aws.connection(one, one.keys_file(folder))
        yield {"connection": connection, "access": one.root.access, "secret": one.root.secret}


@contextlib.contextmanager
def azure_here(folder: Path) -> Iterator[dict[str, Any]]:
    """Run Azure in this process, with pages that are full: each rotation makes the same requests."""
    from keyturn.testing import azure

    with azure.cloud(folder) as cloud:
        identity, secret_file = cloud.application()
        cloud.vault.grant(identity)
        cloud.vault.most_writes = cloud.vault.most_others = NO_LIMIT
        cloud.vault.short_pages = 0.0
        who = {"tenant_id": cloud.entra.tenant, "client_id": identity.client_id}
        yield {
            "places": resolver.as_text(cloud.places),
            "connection": {
                "vault": cloud.vault.base,
                "authority": cloud.entra.authority,
                "ca_file": str(cloud.ca_file),
                "auth": {"method": "client-secret", **who, "secret_file": str(secret_file)},
            },
            "secret": identity.secret,
        }


def main() -> None:
    """Serve until the standard input ends."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    with {"aws": aws_here, "azure": azure_here}[kind](folder) as found:
        print(json.dumps(found), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
