"""Who remembers what the store says, and up to which epoch each of them knows (rules 16 to 18).

Revision ID: 0008
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"

contracts_to = None

_TABLE = """
CREATE TABLE verifiers (
    id TEXT NOT NULL,
    login TEXT NOT NULL,
    host TEXT NOT NULL,
    release TEXT NOT NULL,
    started_at BIGINT NOT NULL,
    lease BIGINT NOT NULL,
    incarnation BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    renewals BIGINT NOT NULL,
    renewed_at BIGINT NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT verifiers_lease CHECK (lease BETWEEN 1 AND 300000000)
)
"""


def upgrade() -> None:
    """Build the table."""
    op.execute(_TABLE)
