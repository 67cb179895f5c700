"""Runs an Azure on loopback to try Keyturn with: `python -m keyturn.testing.azure --folder DIR`.

Prints what to put into a configuration and how the names of the real service are led here, then
serves until it is interrupted. Everything is lost when it ends.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from keyturn.testing.azure import Cloud, cloud
from keyturn.testing.resolver import as_text

TEXT = """\
connections:
  azure:
    type: azure
    vault: "{vault}"
    ca_file: "{ca_file}"
    auth: {{method: client-secret, tenant_id: "{tenant}", client_id: "{client}",
           secret_file: "{secret_file}"}}

# The machine has a managed identity as well: leave `auth` out to use it.
# Other vaults: {others}
# Each command of Keyturn, and the daemon, is led to these names here, e.g.:
#   python -m keyturn.testing.resolver '{places}' keyturn run -c FILE
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m keyturn.testing.azure", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where certificates and logins are put")
    parser.add_argument("--vault", action="append", help="name of a vault; may be given again")
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as made,
        cloud(given.folder or Path(made), names=given.vault or ["example"]) as one,
    ):
        sys.stdout.write(_described(one))
        sys.stdout.flush()
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


def _described(one: Cloud) -> str:
    identity, path = one.application()
    machine = one.machine()
    for vault in one.vaults.values():
        vault.grant(identity)
        vault.grant(machine)
    first, *others = one.vaults
    return TEXT.format(
        vault=first, ca_file=one.ca_file, tenant=one.entra.tenant, client=identity.client_id,
        secret_file=path, others=", ".join(others) or "none", places=as_text(one.places),
    )  # fmt: skip


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    sys.exit(main())
