"""What a restore needs, and what lets two releases work on one store for a while.

`meta.oldest_schema` is the oldest schema whose release may still work here, `daemons.knows` the schema
that a daemon's release knows (NULL: one that is older than this column). `quarantine` holds the agents
for which nobody can tell yet, "" for all of them; `meta.ledger_id` names the ledger that this store
writes to.

Revision ID: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"

# An expansion only adds, with a default where a row must have a value: the release before this one
# goes on working on the store. A contraction names the oldest schema that can go on after it.
contracts_to = None

_STATEMENTS = (
    "ALTER TABLE meta ADD COLUMN oldest_schema TEXT DEFAULT '0001' NOT NULL",
    "ALTER TABLE meta ADD COLUMN ledger_id TEXT DEFAULT '' NOT NULL",
    "ALTER TABLE daemons ADD COLUMN knows TEXT",
    """
    CREATE TABLE quarantine (
        agent_uid TEXT NOT NULL,
        reason TEXT NOT NULL,
        since BIGINT NOT NULL,
        detail TEXT DEFAULT '{}' NOT NULL,
        PRIMARY KEY (agent_uid)
    )
    """,
)


def upgrade() -> None:
    """Add three columns and a table."""
    for statement in _STATEMENTS:
        op.execute(statement)
