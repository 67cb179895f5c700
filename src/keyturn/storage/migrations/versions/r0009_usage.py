"""What verifiers saw: uses, answers, and ended versions that were presented (ADR 28).

On SQLite these are in a file of their own, since a guesser's failures must not reach the store's lock.

Written out and never edited again.

Revision ID: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"

contracts_to = None

_TABLES = """
CREATE TABLE usage_sources (
    source TEXT NOT NULL,
    number BIGINT NOT NULL,
    flushed_at BIGINT NOT NULL,
    PRIMARY KEY (source)
);
CREATE TABLE usage_versions (
    version_id TEXT NOT NULL,
    first_used_at BIGINT NOT NULL,
    last_used_at BIGINT NOT NULL,
    uses BIGINT NOT NULL,
    hour BIGINT NOT NULL,
    hour_uses BIGINT NOT NULL,
    hour_before BIGINT NOT NULL,
    PRIMARY KEY (version_id)
);
CREATE TABLE usage_results (
    span TEXT NOT NULL,
    result TEXT NOT NULL,
    slot BIGINT NOT NULL,
    at BIGINT NOT NULL,
    number BIGINT NOT NULL,
    PRIMARY KEY (span, result, slot),
    CONSTRAINT usage_results_span CHECK (span IN ('minute', 'hour', 'day'))
);
CREATE TABLE usage_presented (
    version_id TEXT NOT NULL,
    state TEXT NOT NULL,
    first_at BIGINT NOT NULL,
    last_at BIGINT NOT NULL,
    number BIGINT NOT NULL,
    told_at BIGINT,
    told_number BIGINT DEFAULT 0 NOT NULL,
    PRIMARY KEY (version_id),
    CONSTRAINT usage_presented_state CHECK (state IN ('retired', 'revoked'))
)
"""


def upgrade() -> None:
    """Build the tables where the store is a server."""
    if op.get_bind().dialect.name == "postgresql":
        for statement in _TABLES.split(";"):
            op.execute(statement)
