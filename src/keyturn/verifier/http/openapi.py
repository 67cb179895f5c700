"""The OpenAPI document of the service, as it is served at /openapi.json."""

from __future__ import annotations

from typing import Any

from keyturn import __version__

_TEXT = {"type": "string"}
_DEADLINE = {
    "type": ["string", "null"],
    "format": "date-time",
    "description": "until when a retiring version is accepted",
}
_STATES = {"type": "string", "enum": ["pending", "current", "previous", "kept"]}
_YES_HEADERS = {
    "Keyturn-Agent": {"schema": _TEXT},
    "Keyturn-Login": {"schema": _TEXT},
    "Keyturn-Version": {"schema": _TEXT},
    "Keyturn-State": {"schema": _STATES},
    "Keyturn-Deadline": {
        "description": "there if the secret that was shown retires, and when",
        "schema": {"type": "string", "format": "date-time"},
    },
}
_CHALLENGE = {"WWW-Authenticate": {"schema": _TEXT}}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/x-www-form-urlencoded": {"schema": schema}}


_ERROR = _json(_object(["error"], error=_TEXT, error_description=_TEXT))
_MALFORMED = {"description": "no request that could be answered", "content": _ERROR}
_TOO_LARGE = {"description": "the body is above 16 KiB", "content": _ERROR}
_UNAVAILABLE = {
    "description": "nobody can tell now; this is no refusal",
    "headers": {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}},
    "content": _ERROR,
}
_STRANGER = {"description": "the caller is no relying party", "content": _ERROR}
_PAIR = _object(["secret"], login=_TEXT, secret=_TEXT) | {"additionalProperties": False}
_CLIENT = _object(["client_id", "client_secret"], client_id=_TEXT, client_secret=_TEXT)
_TOKEN = _object(["token"], token=_TEXT, token_type_hint=_TEXT)
_VERIFIED = _object(
    ["accepted", "agent", "login", "version", "state", "deadline"],
    accepted={"const": True},
    agent=_TEXT,
    login=_TEXT,
    version=_TEXT,
    state=_STATES,
    deadline=_DEADLINE,
)
_REFUSED = _object(["accepted", "error"], accepted={"const": False}, error=_TEXT)
_INTROSPECTION = _object(
    ["active"],
    active={"type": "boolean"},
    client_id=_TEXT,
    sub=_TEXT,
    token_type=_TEXT,
    exp={"type": "integer", "description": "seconds since 1970"},
    keyturn_version=_TEXT,
    keyturn_state=_STATES,
)
_SHOWN: list[dict[str, Any]] = [{"basic": []}, {"bearer": []}]
_CALLERS: list[dict[str, Any]] = [{"caller": []}, {"mutual": []}, {}]


def _auth(method: str) -> dict[str, Any]:
    return {
        "operationId": f"auth_{method}",
        "summary": "For nginx auth_request and Envoy ext_authz: by status alone.",
        "security": [*_SHOWN, {}],
        "responses": {
            "200": {"description": "accepted", "headers": _YES_HEADERS},
            "401": {"description": "refused", "headers": _CHALLENGE},
            "413": {"description": "a body above 1 MiB that nobody reads", "content": _ERROR},
            "503": {"description": "nobody can tell now, or the caller is no relying party"},
        },
    }


DOCUMENT: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "Keyturn verifier",
        "version": __version__,
        "summary": "Is this secret good?",
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    },
    "paths": {
        "/v1/verify": {
            "post": {
                "operationId": "verify",
                "summary": "Ask about a secret: Basic, Bearer, form or JSON; exactly one of them.",
                "security": [*_SHOWN, *_CALLERS],
                "requestBody": {"content": _json(_PAIR) | _form(_CLIENT)},
                "responses": {
                    "200": {
                        "description": "accepted",
                        "headers": _YES_HEADERS,
                        "content": _json(_VERIFIED),
                    },
                    "400": _MALFORMED,
                    "401": {
                        "description": "refused: unknown, wrong, expired, revoked or suspended",
                        "headers": _CHALLENGE,
                        "content": _json(_REFUSED),
                    },
                    "403": _STRANGER,
                    "413": _TOO_LARGE,
                    "503": _UNAVAILABLE,
                },
            }
        },
        "/v1/auth": {method: _auth(method) for method in ("get", "post", "put", "delete", "patch")},
        "/v1/introspect": {
            "post": {
                "operationId": "introspect",
                "summary": "OAuth 2.0 Token Introspection (RFC 7662) of a secret.",
                "security": _CALLERS,
                "requestBody": {"required": True, "content": _form(_TOKEN)},
                "responses": {
                    "200": {"description": "active or not", "content": _json(_INTROSPECTION)},
                    "400": _MALFORMED,
                    "401": {
                        "description": "the caller is no relying party",
                        "headers": _CHALLENGE,
                        "content": _ERROR,
                    },
                    "413": _TOO_LARGE,
                    "503": _UNAVAILABLE,
                },
            }
        },
    },
    "components": {
        "securitySchemes": {
            "basic": {"type": "http", "scheme": "basic", "description": "login and secret"},
            "bearer": {"type": "http", "scheme": "bearer", "description": "the secret alone"},
            "caller": {
                "type": "apiKey",
                "in": "header",
                "name": "Keyturn-Caller-Token",
                "description": "the token of a relying party",
            },
            "mutual": {"type": "mutualTLS"},
        }
    },
}
