"""When a version's last activation had landed for sure, or could land no more (ADR 25).

Revision ID: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"

contracts_to = None

# A version that was written just before the upgrade would otherwise count as one that every read shows.
_FROM_THE_JOURNAL = """
UPDATE versions SET landed_at = (
    SELECT MAX(intents.ended_at) FROM intents WHERE intents.version_id = versions.id
        AND intents.effect = 'activate' AND intents.outcome IN ('done', 'settled')
) WHERE state NOT IN ('retired', 'revoked')
"""


def upgrade() -> None:
    """Add the column, and fill it from the intents."""
    op.execute("ALTER TABLE versions ADD COLUMN landed_at BIGINT")
    op.execute(_FROM_THE_JOURNAL)
