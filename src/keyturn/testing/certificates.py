"""A certificate authority that lives for a test: what it signs is good for a day."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LIFE = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateAuthority:
    """An authority of its own: `ca_file` is what clients are given."""

    folder: Path
    ca_file: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def issue(self, name: str, *hosts: str, life: timedelta = LIFE) -> tuple[Path, Path]:
        """Write a server certificate for this host and for `hosts`, and its key. Returns both paths.

        With a negative `life` it has expired already.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        here: list[x509.GeneralName] = [x509.DNSName(host) for host in ("localhost", *hosts)]
        here.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        made = (
            _unsigned(name, issuer=self.certificate.subject, key=key, life=life)
            .add_extension(x509.SubjectAlternativeName(here), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_signed_by(self.key), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        paths = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        _write(paths[0], made.public_bytes(serialization.Encoding.PEM))
        _write(paths[1], _pem(key))
        return paths


def new_authority(folder: Path, *, name: str = "test-authority") -> CertificateAuthority:
    """Make an authority in this folder; only its certificate is written, never its key."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    made = (
        _unsigned(name, issuer=subject, key=key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    ca_file = folder / f"{name}.pem"
    _write(ca_file, made.public_bytes(serialization.Encoding.PEM))
    return CertificateAuthority(folder=folder, ca_file=ca_file, key=key, certificate=made)


def _unsigned(
    name: str, *, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, life: timedelta = LIFE
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + life)
    )


def _signed_by(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
