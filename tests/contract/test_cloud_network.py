"""Clouds whose answers drip: a call's time is one of its whole answer, so no thread is kept."""

from __future__ import annotations

import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from keyturn.core.model import Target
from keyturn.destinations.aws import AwsDestination
from keyturn.destinations.aws_options import AwsOptions
from keyturn.destinations.azure import AzureDestination, AzureOptions
from keyturn.errors import DestinationError, DestinationUnavailable
from keyturn.testing.certificates import new_authority
from keyturn.testing.contract import STORE_ID
from keyturn.testing.resolver import resolving
from keyturn.wiring import SystemClock
from support.raw_server import BEGINNINGS, dripping, listening

PLACE = Target(to="cloud", path="a")
FAILED = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\n{}"


def at_aws(folder: Path, port: int) -> AwsDestination:
    """Make a connection to AWS that is led here."""
    keys = folder / "keys.json"
    keys.touch(mode=0o600)
    keys.write_text('{"AccessKeyId": "AKIAXXXXXXXXXXXXXXXX", "SecretAccessKey": "x"}')
    options = {"region": "eu-west-1", "endpoint": f"http://127.0.0.1:{port}",
               "auth": {"method": "keys", "file": str(keys)}, "parallel": 2,
               "call_deadline": "1s"}  # fmt: skip
    read = AwsOptions.model_validate(options)
    return AwsDestination(read, name="cloud", store_id=STORE_ID, clock=SystemClock())


def at_azure(folder: Path, port: int, ca_file: Path) -> AzureDestination:
    """Make a connection to Azure whose machine's metadata are led here."""
    del folder, port
    options = {"vault": "https://dripping.vault.azure.net", "ca_file": str(ca_file), "parallel": 2,
               "call_deadline": "1s"}  # fmt: skip
    read = AzureOptions.model_validate(options)
    return AzureDestination(read, name="cloud", store_id=STORE_ID, clock=SystemClock())


@pytest.mark.parametrize("kind", ["aws", "azure"])
@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS)
def test_an_answer_that_drips_frees_its_thread(tmp_path: Path, kind: str, begin: bytes) -> None:
    """A byte now and then keeps no connection: once the server is well, calls are answered again."""
    drips = threading.Event()
    drips.set()
    authority = new_authority(tmp_path / "tls")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority.issue("azure", "dripping.vault.azure.net"))
    answer = dripping(drips, begin, FAILED)
    with listening(answer, tls=tls if kind == "azure" else None) as port:
        led = [("dripping.vault.azure.net", 443), ("169.254.169.254", 80)]
        places = dict.fromkeys(led, ("127.0.0.1", port))
        with resolving(places):
            destination: Any = (
                at_azure(tmp_path, port, authority.ca_file)
                if kind == "azure"
                else at_aws(tmp_path, port)
            )
            for _ in range(3):
                with pytest.raises(DestinationUnavailable):
                    destination.observe(PLACE)
            time.sleep(2.5)
            drips.clear()
            with pytest.raises(DestinationError) as caught:
                destination.observe(PLACE)
            assert "busy" not in str(caught.value)
            assert getattr(caught.value, "late", None) is None
            destination.close()
