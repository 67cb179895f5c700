"""What webhooks have told, and what the audit's anchors have quoted.

Revision ID: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"

contracts_to = None

_TABLES = """
CREATE TABLE hooks (
    name TEXT NOT NULL,
    receiver TEXT NOT NULL,
    gone_at BIGINT,
    summaries TEXT NOT NULL,
    number BIGINT NOT NULL,
    PRIMARY KEY (name)
);
CREATE TABLE hook_cursors (
    hook TEXT NOT NULL,
    chain TEXT NOT NULL,
    seq BIGINT NOT NULL,
    PRIMARY KEY (hook, chain)
);
CREATE TABLE anchored (
    chain TEXT NOT NULL,
    seq BIGINT NOT NULL,
    PRIMARY KEY (chain)
)
"""


def upgrade() -> None:
    """Build the tables."""
    for statement in _TABLES.split(";"):
        op.execute(statement)
