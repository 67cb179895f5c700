"""An Azure of one's own: key vaults, their logins, and a machine's managed identities.

For tests, demonstrations and people who want to try: it is reached under the real names over TLS by
`keyturn.testing.resolver`, and by the unmodified SDK with its challenge verification on. Needs the
extra `azure`. From the command line: `python -m keyturn.testing.azure`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from keyturn.testing.azure.entra import EXCHANGE, Entra, Identity
from keyturn.testing.azure.vaults import ALL, Vault
from keyturn.testing.certificates import CertificateAuthority, new_authority
from keyturn.testing.resolver import Place
from keyturn.testing.wire import Answer, Call, Server, as_json

__all__ = ["ALL", "Cloud", "Identity", "Vault", "cloud"]

DOMAIN, AUTHORITY = "vault.azure.net", "login.microsoftonline.com"
METADATA = ("169.254.169.254", 80)
ISSUER = "https://oidc.cluster.test/"


@dataclass(slots=True, kw_only=True)
class Cloud:
    """What runs: one server for vaults and authority, one for the machine's metadata."""

    folder: Path
    ca: CertificateAuthority
    entra: Entra
    vaults: Mapping[str, Vault]  # by their addresses
    certificate: tuple[Path, Path]  # good for all names of its vaults and its authority
    places: dict[Place, Place] = field(default_factory=dict)  # for the resolver
    server: Server = field(init=False)
    metadata: Server = field(init=False)
    _cluster: rsa.RSAPrivateKey | None = None

    @property
    def ca_file(self) -> Path:
        """What clients are to trust."""
        return self.ca.ca_file

    @property
    def vault(self) -> Vault:
        """The first one."""
        return next(iter(self.vaults.values()))

    # --- identities -----------------------------------------------------------------------

    def machine(self) -> Identity:
        """Give the machine one more managed identity; the first is the system-assigned one."""
        return self.entra.add(Identity(managed=True))

    def application(self) -> tuple[Identity, Path]:
        """Register an application with a client secret, and put that into a file."""
        one = self.entra.add(Identity(secret=secrets.token_urlsafe(30)))
        return one, self.keep(f"{one.client_id}.secret", f"{one.secret}\n")

    def certified(self) -> tuple[Identity, Path]:
        """Register an application with a certificate, and put it with its key into a file."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "keyturn")])
        now = dt.datetime.now(dt.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=5))
            .not_valid_after(now + dt.timedelta(days=30))
            .sign(key, hashes.SHA256())
        )
        one = self.entra.add(Identity(certificate=made))
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        text = pem + made.public_bytes(serialization.Encoding.PEM)
        return one, self.keep(f"{one.client_id}.pem", text.decode())

    def federated(self, subject: str) -> tuple[Identity, Path]:
        """Register an application that trusts a cluster's tokens, and put one into a file."""
        if self._cluster is None:
            self._cluster = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            self.entra.issuers[ISSUER] = self._cluster.public_key()
        one = self.entra.add(Identity(federated=(ISSUER, subject)))
        return one, self.keep(f"{one.client_id}.token", self.cluster_token(subject))

    def cluster_token(self, subject: str, *, seconds: int = 3600) -> str:
        """Return a token as a cluster projects it into a pod."""
        assert self._cluster is not None
        now = dt.datetime.now(dt.UTC)
        claims = {
            "iss": ISSUER, "sub": subject, "aud": [EXCHANGE], "iat": now,
            "exp": now + dt.timedelta(seconds=seconds),
        }  # fmt: skip
        return jwt.encode(claims, self._cluster, algorithm="RS256")

    def keep(self, name: str, text: str) -> Path:
        """Write a credential file."""
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        return path

    # --- serving --------------------------------------------------------------------------

    def answer(self, call: Call) -> Answer:
        """Answer by the name that was asked for."""
        address = f"https://{call.host}".removesuffix(":443")
        if address == self.entra.authority:
            return self.entra.answer(call)
        if address in self.vaults:
            return self.vaults[address].answer(call)
        return as_json(404, {"error": {"code": "NotFound", "message": "No such host"}})


@contextlib.contextmanager
def cloud(
    folder: Path,
    *,
    names: Sequence[str] = ("example",),
    domain: str = DOMAIN,
    authority: str = AUTHORITY,
    port: int = 443,
) -> Iterator[Cloud]:
    """Run a cloud with these vaults until the block ends; `places` says where its names lead."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    ca = new_authority(folder, name="azure-authority")
    hosts = [f"{name}.{domain}" for name in names]
    more = "" if port == 443 else f":{port}"
    entra = Entra(authority=f"https://{authority}{more}", resource=f"https://{domain}")
    bases = [f"https://{host}{more}" for host in hosts]
    vaults = {base: Vault(base=base, entra=entra) for base in bases}
    certificate = ca.issue("azure", *hosts, authority)
    one = Cloud(folder=folder, ca=ca, entra=entra, vaults=vaults, certificate=certificate)
    one.server = Server(one.answer, certificate=certificate)
    one.metadata = Server(entra.imds)
    one.places = {(host, port): one.server.place for host in (*hosts, authority)}
    one.places[METADATA] = one.metadata.place
    try:
        yield one
    finally:
        one.server.close()
        one.metadata.close()
