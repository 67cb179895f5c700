"""`keyturn init`: a configuration to begin with, which `keyturn check` takes as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from keyturn.cli.reach import late
from keyturn.errors import ConfigError, Refused

_DEFAULT_STORE = "sqlite:////var/lib/keyturn/keyturn.db"


def init(
    *,
    vault: Annotated[
        str, typer.Option(metavar="URL", help="Publish to this Vault or OpenBao (KV v2).")
    ] = "",
    aws: Annotated[
        str, typer.Option(metavar="REGION", help="Publish to AWS Secrets Manager, this region.")
    ] = "",
    azure: Annotated[
        str, typer.Option(metavar="URL", help="Publish to this Azure Key Vault.")
    ] = "",
    files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Publish to files in this folder.")
    ] = None,
    agent: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="An agent; may be repeated.")
    ] = None,
    store: Annotated[
        str, typer.Option(metavar="URL", help="The store, sqlite:////PATH or postgresql://…")
    ] = _DEFAULT_STORE,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there; never over a file.")
    ] = None,
) -> None:
    """Print a configuration to begin with.

    It asks for no secret: logins name files. `keyturn init --vault https://127.0.0.1:8200 > k.yaml`
    """
    given = {"vault": vault, "aws": aws, "azure": azure, "files": str(files or "")}
    places = {kind: value for kind, value in given.items() if value}
    if not places:
        raise typer.BadParameter("say where agents read: --vault, --aws, --azure or --files")
    text = render(places, agents=agent or [], store=store)
    _refuse_wrong(text)
    if out is None:
        typer.echo(text, nl=False)
    else:
        _write(out, text)
    name = out or "FILE"
    typer.echo(f"next: keyturn check -c {name} && keyturn check --probe -c {name}", err=True)


def render(places: dict[str, str], *, agents: list[str], store: str) -> str:
    """Return the file for these destinations, by their kind."""
    names = list(places)
    return "\n".join(
        [*_head(store), *_connections(places), *_policies(), *_agents(agents, names[0])]
    )


def _head(store: str) -> Iterator[str]:
    yield "# yaml-language-server: $schema=./keyturn.schema.json"
    yield "# (for editors that know it: `keyturn config schema > keyturn.schema.json`)"
    yield "#"
    yield "# Keyturn's main file: addresses, logins and limits, and no secret. This file and the folders"
    yield "# above it must be writable by root or the daemon's user only. Next:"
    yield "#   keyturn check -c FILE            offline: every problem with its line"
    yield "#   keyturn check --probe -c FILE    logs in and looks; changes nothing"
    yield "#   keyturn run -c FILE"
    yield "version: 1"
    yield ""
    yield "store:"
    yield f"  url: {_quoted(store)}"
    if store.startswith("postgresql:"):
        yield "  # password_file: /etc/keyturn/store-password    # 0600, of the daemon's user"
    yield ""


def _connections(places: dict[str, str]) -> Iterator[str]:
    yield "# Ways to reach what agents read. `keyturn policy TYPE -c FILE` prints the rights they need."
    yield "connections:"
    for kind, value in places.items():
        yield f"  {kind}:"
        yield from (f"    {line}" for line in _OPTIONS[kind](value))
    yield ""


def _vault(url: str) -> Iterator[str]:
    yield "type: vault"
    yield f"address: {_quoted(url)}"
    if urlsplit(url).scheme == "https":
        yield "# ca_file: /etc/keyturn/ca.pem    # where its certificate is not a public one"
    yield "# namespace: platform"
    yield "mount: kv                         # a KV v2 mount"
    yield "prefix: agents                    # every entry lies below it"
    yield "write_limit: 20/s"
    yield "auth: {method: approle, role_id: keyturn, secret_id_file: /etc/keyturn/secret-id}"
    yield "# auth: {method: kubernetes, role: keyturn}"


def _aws(region: str) -> Iterator[str]:
    yield "type: aws"
    yield f"region: {_quoted(region)}"
    yield "auth: {method: instance}          # or container, web-identity, profile, keys"
    yield '# role_arn: "arn:aws:iam::111122223333:role/keyturn"'
    yield "prefix: agents                    # every entry lies below it"
    yield "write_limit: 5/s"


def _azure(url: str) -> Iterator[str]:
    yield "type: azure"
    yield f"vault: {_quoted(url)}"
    yield "auth: {method: managed-identity}  # or workload-identity, client-secret, client-certificate"
    yield "prefix: agents                    # every entry begins with it"
    yield "write_limit: 20/s"


def _files(folder: str) -> Iterator[str]:
    yield "type: file"
    yield f"root: {_quoted(os.path.abspath(folder))}    # of the daemon's user"  # noqa: PTH100
    yield "# group: agents                   # the unix group that may read them"


_OPTIONS = {"vault": _vault, "aws": _aws, "azure": _azure, "files": _files}


def _policies() -> Iterator[str]:
    yield "# These are the defaults: what may be left away."
    yield "policies:"
    yield "  default:"
    yield '    every: 30d                      # or cron: "0 3 * * tue"'
    yield '    # window: "Mon-Fri 02:00-05:00"'
    yield "    consumer_cache: 24h             # how long an agent may keep what it read"
    yield "    grace: 48h                      # how long the old secret is still accepted"
    yield "    max_age: 90d                    # older ones raise an alert"
    yield ""
    yield "# Take changed files over by themselves (a ConfigMap, a git checkout), not at `keyturn reload`:"
    yield "# reload: {on_change: true}"
    yield ""
    yield "# Lines such as `agent:ID at=2026-01-31T12:00:00Z` here are refused within seconds:"
    yield "# revocations_file: /etc/keyturn/revocations"
    yield ""


def _agents(agents: list[str], to: str) -> Iterator[str]:
    yield "# More files with `agents:` only, one for each team:"
    yield "# include: agents.d/*.yaml"
    yield ""
    if not agents:
        yield "agents: {}"
        yield "#  hello:"
        yield "#    owner: team-platform"
        yield f"#    destinations: [{{to: {to}, path: hello}}]"
    else:
        yield "agents:"
    for name in agents:
        yield f"  {_quoted(name)}:"
        yield f"    destinations: [{{to: {to}, path: {_quoted(name)}}}]"
    yield ""


def _quoted(text: str) -> str:
    """Write a text that means itself in YAML; what cannot stand in a line is refused."""
    if not text.isprintable():
        raise typer.BadParameter("expected printable text")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _refuse_wrong(text: str) -> None:
    """Refuse what the loader would refuse, before a file is there. Raises ConfigError."""
    late("keyturn.daemon.checking", "refuse_wrong")(text)


def _write(path: Path, text: str) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise Refused(f"{path} is there already", hint="name another --out FILE") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({os.strerror(error.errno or 0)})", hint="name another one"
        ) from None
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
