"""What the daemon itself logs in with, where it replaces that (ADR 22).

Written out and never edited again.

Revision ID: 0005
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"

contracts_to = None

_TABLES = """
CREATE TABLE own_credentials (
    connection TEXT NOT NULL,
    host TEXT NOT NULL,
    revision BIGINT NOT NULL,
    rotated_at BIGINT,
    problem_code TEXT,
    problem_detail TEXT,
    problem_since BIGINT,
    problem_tries BIGINT,
    problem_until BIGINT,
    PRIMARY KEY (connection, host)
);
CREATE TABLE own_versions (
    id TEXT NOT NULL,
    connection TEXT NOT NULL,
    host TEXT NOT NULL,
    seq BIGINT NOT NULL,
    state TEXT NOT NULL,
    at BIGINT NOT NULL,
    accessor TEXT NOT NULL,
    ends_at BIGINT,
    deadline BIGINT,
    PRIMARY KEY (id),
    CONSTRAINT own_versions_credential FOREIGN KEY(connection, host)
        REFERENCES own_credentials (connection, host),
    CONSTRAINT own_versions_state CHECK
        (state IN ('minting', 'pending', 'current', 'previous', 'surplus', 'retired')),
    CONSTRAINT own_versions_accessor CHECK
        (accessor <> '' OR state IN ('minting', 'retired')),
    CONSTRAINT own_versions_deadline CHECK ((state = 'previous') = (deadline IS NOT NULL))
);
CREATE UNIQUE INDEX own_versions_one_current ON own_versions (connection, host)
    WHERE state = 'current'
"""


def upgrade() -> None:
    """Build both tables."""
    for statement in _TABLES.split(";"):
        op.execute(statement)
