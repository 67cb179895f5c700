"""Surroundings that are all traps: whatever a library takes from them leaves a trace here.

Every variable that an HTTP, Vault, AWS, PostgreSQL or TLS library honours points at a socket that listens,
at a file that is watched, or at a folder of programs that note each call.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

_IN_MODIFY, _IN_OPEN, _IN_CREATE = 0x2, 0x20, 0x100  # inotify(7)
_IN_ISDIR = 0x40000000
_EVENT = struct.Struct("iIII")

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY", "NO_PROXY")
PROGRAMS = (
    "vault", "bao", "aws", "sudo", "su", "git", "ps", "openssl", "lsb_release", "ldconfig", "gcc", "cc",
    "ld", "objdump", "sh", "bash", "curl", "wget", "psql", "pg_config", "systemctl", "hostname",
    "uname", "ip", "ifconfig", "arp", "netstat", "id", "getent", "which", "whoami", "stty", "tput",
    "less", "python", "python3", "gpg", "pass", "ssh", "env", "file", "security", "kubectl",
    "az", "azd", "pwsh", "powershell", "secret-tool",
)  # fmt: skip


class Listener:
    """A socket that takes every connection and remembers what came."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                connection.settimeout(0.5)
                data = b""
                with connection, contextlib.suppress(OSError):
                    data = connection.recv(4096)
                self.taken.append(data or b"(connected)")


class Lookout:
    """Notes every file of some folders that is opened, made or changed (inotify)."""

    def __init__(self, *folders: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._queue = os.fdopen(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "rb", 0)
        self._names: dict[int, Path] = {}
        for folder in folders:
            mask = _IN_OPEN | _IN_CREATE | _IN_MODIFY
            number = self._libc.inotify_add_watch(self._queue.fileno(), os.fsencode(folder), mask)
            assert number >= 0, ctypes.get_errno()
            self._names[number] = folder

    def seen(self) -> list[str]:
        """Return what has happened since the last look."""
        found = []
        while data := self._queue.read(65536):
            at = 0
            while at < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, at)
                name = data[at + _EVENT.size :][:length].rstrip(b"\0").decode()
                at += _EVENT.size + length
                if not mask & _IN_ISDIR:
                    found.append(str(self._names[number] / name))
        return found

    def close(self) -> None:
        """Stop looking."""
        self._queue.close()


class Traps:
    """The surroundings, and what was caught."""

    def __init__(self, folder: Path) -> None:
        self.home, self.programs = folder / "home", folder / "bin"
        self.modules, self.calls = folder / "modules", folder / "calls"
        self.listener = Listener()
        inner = [
            self.home / name
            for name in (".postgresql", ".azure", ".IdentityService", ".aws", ".aws/models")
        ]
        for place in (*inner, self.programs, self.modules):
            place.mkdir(parents=True)
        self._lay_files()
        self._lay_programs()
        self._lookout = Lookout(self.home, *inner, self.modules)

    def close(self) -> None:
        """Take the traps away."""
        self.listener.close()
        self._lookout.close()

    def caught(self) -> list[str]:
        """Return everything that went into a trap since the last look."""
        bytes_sent = [f"sent {data[:60]!r}" for data in self.listener.taken]
        self.listener.taken.clear()
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        opened = [f"opened {path}" for path in dict.fromkeys(self._lookout.seen())]
        return bytes_sent + [f"ran {call}" for call in calls] + opened

    @property
    def address(self) -> str:
        """Where the trap listens."""
        return f"http://127.0.0.1:{self.listener.port}"

    def environ(self) -> dict[str, str]:
        """Return the whole environment of a process that lives among traps."""
        return {
            "LANG": "C.UTF-8",
            "PATH": str(self.programs),
            "HOME": str(self.home),
            **self._network(),
            **self._vault(),
            **self._aws(),
            **self._azure(),
            **self._postgresql(),
            **self._python(),
        }

    def _network(self) -> dict[str, str]:
        names = [*PROXIES, *(name.lower() for name in PROXIES)]
        proxies = {name: self.address for name in names if name.upper() != "NO_PROXY"}
        ca, folder = str(self.home / "ca.pem"), str(self.home)
        bundles = dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"), ca)
        places = dict.fromkeys(
            ("SSL_CERT_DIR", "CURL_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME",
             "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_DIRS", "XDG_DATA_DIRS"), folder,
        )  # fmt: skip
        return {
            **proxies, **bundles, **places,
            "NO_PROXY": "example.org", "no_proxy": "example.org",
            "NETRC": str(self.home / ".netrc"),
            "SSLKEYLOGFILE": str(self.home / "tls-keys"),
            "OPENSSL_CONF": str(self.home / "openssl.cnf"),
            "RES_OPTIONS": "debug", "LOCALDOMAIN": "trap.invalid",
        }  # fmt: skip

    def _vault(self) -> dict[str, str]:
        found = {}
        for prefix in ("VAULT_", "BAO_"):
            texts = {
                "ADDR": self.address, "AGENT_ADDR": self.address, "PROXY_ADDR": self.address,
                "HTTP_PROXY": self.address, "TOKEN": "trap", "NAMESPACE": "trap",
                "SKIP_VERIFY": "true", "TLS_SERVER_NAME": "trap", "ROLE_ID": "trap",
                "SECRET_ID": "trap", "WRAP_TTL": "1h", "FORMAT": "trap", "MFA": "trap",
                "CACERT": str(self.home / "ca.pem"), "CAPATH": str(self.home),
                "CLIENT_CERT": str(self.home / "client.pem"),
                "CLIENT_KEY": str(self.home / "client.key"),
                "CONFIG_PATH": str(self.home / ".vault"), "TOKEN_FILE": str(self.home / "token"),
            }  # fmt: skip
            found.update({prefix + name: text for name, text in texts.items()})
        return found

    def _aws(self) -> dict[str, str]:
        """Return what boto3 honours: keys, files, programs, addresses, metadata services."""
        addresses = dict.fromkeys(
            ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SECRETS_MANAGER", "AWS_ENDPOINT_URL_STS",
             "AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
             "IMDS_ENDPOINT"), self.address,
        )  # fmt: skip
        files = {
            "AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials",
            "AWS_WEB_IDENTITY_TOKEN_FILE": "web-token", "AWS_CA_BUNDLE": "ca.pem",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "container-token", "BOTO_CONFIG": "boto.cfg",
        }  # fmt: skip
        return {
            **addresses,
            **{name: str(self.home / ".aws" / place) for name, place in files.items()},
            "AWS_ACCESS_KEY_ID": "AKIATRAP", "AWS_SECRET_ACCESS_KEY": "trap",
            "AWS_SESSION_TOKEN": "trap", "AWS_PROFILE": "trap", "AWS_DEFAULT_PROFILE": "trap",
            "AWS_REGION": "us-trap-1", "AWS_DEFAULT_REGION": "us-trap-1",
            "AWS_ROLE_ARN": "arn:aws:iam::111122223333:role/trap", "AWS_ROLE_SESSION_NAME": "trap",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/trap",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": "trap", "AWS_DATA_PATH": str(self.home / ".aws"),
            "AWS_CSM_ENABLED": "true", "AWS_CSM_HOST": "127.0.0.1",
            "AWS_CSM_PORT": str(self.listener.port), "AWS_STS_REGIONAL_ENDPOINTS": "legacy",
            "AWS_RETRY_MODE": "adaptive", "AWS_MAX_ATTEMPTS": "9", "AWS_USE_FIPS_ENDPOINT": "true",
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false", "AWS_SDK_UA_APP_ID": "trap",
        }  # fmt: skip

    def _azure(self) -> dict[str, str]:
        address, home = self.address, str(self.home)
        names = {
            "AZURE_": {
                "TENANT_ID": "trap", "CLIENT_ID": "trap", "CLIENT_SECRET": "trap",
                "CLIENT_CERTIFICATE_PATH": f"{home}/client.pem", "USERNAME": "trap",
                "PASSWORD": "trap", "AUTHORITY_HOST": address,
                "REGIONAL_AUTHORITY_NAME": "trap", "POD_IDENTITY_AUTHORITY_HOST": address,
                "FEDERATED_TOKEN_FILE": f"{home}/token", "CONFIG_DIR": f"{home}/.azure",
                "KUBERNETES_TOKEN_PROXY": address, "KUBERNETES_CA_FILE": f"{home}/ca.pem",
                "KUBERNETES_SNI_NAME": "trap", "TOKEN_CREDENTIALS": "AzureCliCredential",
                "KEYVAULT_URL": address, "CLOUD": "trap", "LOG_LEVEL": "debug",
                "TRACING_ENABLED": "true", "SDK_TRACING_IMPLEMENTATION": "opentelemetry",
            },
            "MSI_": {"ENDPOINT": address, "SECRET": "trap"},
            "IDENTITY_": {"ENDPOINT": address, "HEADER": "trap", "SERVER_THUMBPRINT": "trap"},
            "IMDS_": {"ENDPOINT": address},
            "ARM_": {"USE_MSI": "true", "MSI_ENDPOINT": address, "CLIENT_SECRET": "trap"},
        }  # fmt: skip
        return {
            prefix + name: text for prefix, more in names.items() for name, text in more.items()
        }

    def _postgresql(self) -> dict[str, str]:
        port = str(self.listener.port)
        return {
            "PGHOST": "127.0.0.1", "PGHOSTADDR": "127.0.0.1", "PGPORT": port,
            "PGDATABASE": "trap", "PGUSER": "trap", "PGPASSWORD": "trap", "PGOPTIONS": "-c x.y=1",
            "PGPASSFILE": str(self.home / ".pgpass"), "PGSERVICE": "trap",
            "PGSERVICEFILE": str(self.home / ".pg_service.conf"), "PGSYSCONFDIR": str(self.home),
            "PGSSLMODE": "disable", "PGSSLROOTCERT": str(self.home / "ca.pem"),
            "PGSSLCERT": str(self.home / "client.pem"), "PGSSLKEY": str(self.home / "client.key"),
            "PGAPPNAME": "trap", "PGREQUIREAUTH": "password", "PGTARGETSESSIONATTRS": "standby",
            "PGCLIENTENCODING": "LATIN1", "PGTZ": "Asia/Tokyo", "PGDATESTYLE": "German",
            "DATABASE_URL": f"postgresql://trap@127.0.0.1:{port}/trap",
            "SQLALCHEMY_DATABASE_URI": f"postgresql://trap@127.0.0.1:{port}/trap",
        }  # fmt: skip

    def _python(self) -> dict[str, str]:
        """Return what only `python -I` closes."""
        return {
            "PYTHONPATH": str(self.modules),
            "PYTHONHOME": str(self.modules),
            "PYTHONUSERBASE": str(self.modules),
            "PYTHONSTARTUP": str(self.modules / "sitecustomize.py"),
            "PYTHONINSPECT": "1",
            "PYTHONBREAKPOINT": "sitecustomize.trap",
        }

    def _lay_files(self) -> None:
        port = self.listener.port
        files = {
            ".netrc": "machine 127.0.0.1 login trap password trap\n",
            ".vault-token": "trap", "token": "trap", ".vault": f'token_helper = "{self.programs}/vault"\n',
            ".pgpass": "*:*:*:*:trap\n", ".curlrc": f"proxy = {self.address}\n", ".bao-token": "trap",
            ".pg_service.conf": f"[trap]\nhost=127.0.0.1\nport={port}\n", "pg_service.conf": "",
            ".azure/azureProfile.json": "{}", ".azure/msal_token_cache.json": "{}",
            ".azure/accessTokens.json": "[]", ".azure/config": "", ".azure/clouds.config": "",
            ".IdentityService/msal.cache": "{}", ".IdentityService/msal.cache.nocae": "{}",
            "client.pem": "", "client.key": "", "openssl.cnf": "", "tls-keys": "",
            ".postgresql/root.crt": "", ".postgresql/postgresql.crt": "",
            ".aws/config": f"[default]\nregion = us-trap-1\nendpoint_url = {self.address}\n"
            f"[profile trap]\ncredential_process = {self.programs}/aws\n",
            ".aws/credentials": "[default]\naws_access_key_id = AKIATRAP\naws_secret_access_key = trap\n",
            ".aws/web-token": "trap", ".aws/container-token": "trap", ".aws/boto.cfg": "", ".boto": "",
            ".aws/models/endpoints.json": "{}",
        }  # fmt: skip
        for name, text in files.items():
            (self.home / name).write_text(text)
            (self.home / name).chmod(0o600)
        trap = f"open({str(self.calls)!r}, 'a').write('module\\n')\n"
        for name in (
            "sitecustomize",
            "usercustomize",
            "hvac",
            "requests",
            "yaml",
            "boto3",
            "botocore",
            "keyturn",
            "azure",
            "msal",
        ):
            (self.modules / f"{name}.py").write_text(trap)

    def _lay_programs(self) -> None:
        for name in PROGRAMS:
            program = self.programs / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self.calls}"\nexit 1\n')
            program.chmod(0o755)


@contextlib.contextmanager
def traps(folder: Path) -> Iterator[Traps]:
    """Lay traps until the block ends."""
    one = Traps(folder)
    try:
        yield one
    finally:
        one.close()
