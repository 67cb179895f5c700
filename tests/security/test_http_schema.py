"""The service does what its OpenAPI document says: schemathesis asks, with inputs that fit and that do not."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from keyturn.verifier.http.openapi import DOCUMENT
from support.http_verifier import Served, served

SEED = int(os.environ.get("KEYTURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Give one service."""
    folder: Path = tmp_path_factory.mktemp("schema")
    with served(folder) as found:
        yield found


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param(15, id="some"),
        pytest.param(1000, id="whole", marks=[pytest.mark.full, pytest.mark.timeout(3600)]),
    ],
)
def test_every_answer_is_one_of_the_document(service: Served, examples: int) -> None:
    """No 500, no status, header, type or body that the document does not name."""
    url = f"http://127.0.0.1:{service.port}"
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    seen: Counter[str] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        def ask(case: schemathesis.Case) -> None:
            answer = case.call(base_url=url, timeout=20)
            seen[f"{case.method} {case.path} {answer.status_code}"] += 1
            case.validate_response(answer, checks=CHECKS)

        ask(operation.Case(**good(operation.path, service)))
        for mode in schemathesis.GenerationMode:
            given = hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            settled = hypothesis.settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            with suppress(Unsatisfiable):  # where there is nothing that could be wrong
                hypothesis.seed(SEED)(settled(given(ask)))()
    print(f"seed {SEED}: {dict(seen)}")
    assert seen["POST /v1/verify 200"]
    assert {key.rsplit(" ", 1)[0] for key in seen} == {
        f"{method.upper()} {path}" for path, verbs in DOCUMENT["paths"].items() for method in verbs
    }


def good(path: str, service: Served) -> dict[str, Any]:
    """Return what asks about a good secret at this path."""
    held = service.held[0]
    if path == "/v1/introspect":
        token = {"token": held.secret.reveal()}
        return {"body": token, "media_type": "application/x-www-form-urlencoded"}
    return {"headers": {"Authorization": held.basic}}


def test_the_document_is_one_that_others_can_read() -> None:
    """It is JSON, names every route, and no path or address of a host."""
    text = json.dumps(DOCUMENT)
    assert json.loads(text) == DOCUMENT
    assert set(DOCUMENT["paths"]) >= {"/v1/verify", "/v1/auth", "/v1/introspect"}
    assert "localhost" not in text
