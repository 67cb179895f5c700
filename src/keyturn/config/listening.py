"""The section `listen`: where health, readiness and metrics are served over HTTP."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from keyturn.config.models import File, required_path
from keyturn.config.shape import Section
from keyturn.destinations.base import Form

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[0-9.]{7,15}):([0-9]{1,5})", re.ASCII)


def _address(value: object) -> object:
    found = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError
    ipaddress.ip_address(found[1].strip("[]"))
    return value


Address = Annotated[str | None, BeforeValidator(_address)]


def host_of(address: str) -> str:
    """Return the IP of IP:PORT, without brackets."""
    return address.rpartition(":")[0].strip("[]")


def port_of(address: str) -> int:
    """Return the port of IP:PORT."""
    return int(address.rpartition(":")[2])


def is_loopback(address: str) -> bool:
    """Tell whether only this host can reach IP:PORT."""
    return ipaddress.ip_address(host_of(address)).is_loopback


class TlsSection(Section):
    """The listener's own certificate. The files are read again when they change."""

    certificate: Annotated[
        Path,
        BeforeValidator(required_path),
        Form("an absolute path"),
        Field(description="PEM, with the chain below it"),
    ]
    key: Annotated[
        Path,
        BeforeValidator(required_path),
        Form("an absolute path"),
        Field(description="PEM, without a passphrase, closed to other users"),
    ]
    client_ca: Annotated[
        File, Field(description="only clients with a certificate of this authority are answered")
    ] = None


class ListenSettings(Section):
    """Health, readiness and metrics over HTTP. Without an address nothing listens."""

    rule: ClassVar[str] = "an address with `tls`, or one of loopback such as 127.0.0.1:9464"

    address: Annotated[
        Address,
        Form("IP:PORT such as 127.0.0.1:9464 or [::1]:9464"),
        Field(description="where to listen; any but loopback needs `tls`"),
    ] = None
    tls: Annotated[TlsSection | None, Form("a mapping of certificate and key")] = None

    @model_validator(mode="after")
    def _closed(self) -> ListenSettings:
        # SECURITY: what the metrics tell, names of connections among it, is for nobody on the way.
        if self.tls is None and self.address is not None and not self.loopback:
            raise ValueError
        if self.tls is not None and self.address is None:
            raise ValueError
        return self

    @property
    def host(self) -> str:
        """The IP address, without brackets."""
        return host_of(self.address or "")

    @property
    def port(self) -> int:
        """The TCP port."""
        return port_of(self.address or ":0")

    @property
    def loopback(self) -> bool:
        """Whether only this host can reach the address."""
        return is_loopback(self.address or "")
