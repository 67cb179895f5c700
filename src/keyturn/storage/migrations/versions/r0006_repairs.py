"""How often an entry was mended lately, and since when somebody undoes that.

Revision ID: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"

contracts_to = None


def upgrade() -> None:
    """Add the column."""
    op.execute("ALTER TABLE credentials ADD COLUMN repairs TEXT DEFAULT '[]' NOT NULL")
