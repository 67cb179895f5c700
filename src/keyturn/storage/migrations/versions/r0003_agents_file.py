"""The file that an agent belongs to; null where the command line owns it, or nobody knows yet.

Revision ID: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

contracts_to = None


def upgrade() -> None:
    """Add the column; the next start or reload fills it."""
    op.execute("ALTER TABLE agents ADD COLUMN file TEXT")
