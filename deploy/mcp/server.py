"""An MCP server whose agents show the secrets that Keyturn rotates (docs/howto/mcp.md).

    pip install mcp
    KEYTURN_VERIFIER=http://127.0.0.1:8700 KEYTURN_TOKEN_FILE=… python server.py

The agent sends `Authorization: Bearer SECRET`. Each request is checked, nothing is remembered here: a
secret that was revoked is refused with the next request, a session that is open already included.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from mcp.server import MCPServer
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from starlette.middleware import Middleware


class CannotTell(Exception):
    """The verifier did not say yes and did not say no."""


class KeyturnVerifier:
    """Asks a Keyturn verifier about each secret (RFC 7662)."""

    def __init__(self, address: str, token_file: Path | None = None) -> None:
        self._token_file = token_file
        self._client = httpx2.AsyncClient(base_url=address, timeout=5.0)

    async def verify_token(self, token: str) -> AccessToken | None:
        """Return who shows this secret, None for a no. Raises CannotTell."""
        headers = {}
        if self._token_file is not None:  # read each time: it is replaced while we run
            headers["Keyturn-Caller-Token"] = self._token_file.read_text().split()[0]
        try:
            answer = await self._client.post(
                "/v1/introspect", data={"token": token}, headers=headers
            )
        except httpx2.HTTPError:
            raise CannotTell from None  # its text may quote the request
        if answer.status_code != 200:
            raise CannotTell
        found = answer.json()
        if not found["active"]:
            return None
        # Not `expires_at`: it would be judged by the clock of this host, and the verifier knows better.
        return AccessToken(
            token=token, client_id=found["client_id"], subject=found["sub"], scopes=[]
        )


class Honest:
    """Answers 503 where the verifier cannot tell: to an agent a 401 means that its secret is bad."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on."""
        try:
            await self._app(scope, receive, send)
        except CannotTell:  # raised before anything was answered
            headers = [(b"retry-after", b"1"), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": b""})


def application(address: str, verifier: KeyturnVerifier) -> Any:
    """Return the server as an ASGI application; `address` is its own."""
    server = MCPServer(
        "example",
        token_verifier=verifier,
        # A secret of Keyturn's names no resource. Which agents this server may hear of is said by
        # `relying_parties.NAME.agents` of the verifier.
        auth=AuthSettings(
            issuer_url=address, resource_server_url=address, validate_token_resource=False
        ),
    )

    @server.tool()
    def whoami() -> str:
        """Tell the agent by which name it is known here."""
        found = get_access_token()
        return found.subject or "" if found else ""

    app = server.streamable_http_app()
    app.user_middleware.insert(0, Middleware(Honest))
    return app


if __name__ == "__main__":
    token_file = os.environ.get("KEYTURN_TOKEN_FILE")
    asked = KeyturnVerifier(
        os.environ.get("KEYTURN_VERIFIER", "http://127.0.0.1:8700"),
        Path(token_file) if token_file else None,
    )
    port = int(os.environ.get("PORT", "8000"))
    uvicorn.run(application(f"http://127.0.0.1:{port}", asked), host="127.0.0.1", port=port)
