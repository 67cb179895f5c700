"""The first schema.

Written out and never edited again: a store that was made by this revision must stay what it is.

Revision ID: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None

_TABLES = """
CREATE TABLE agents (
    uid TEXT NOT NULL,
    name TEXT NOT NULL,
    login TEXT NOT NULL,
    owner TEXT,
    policy TEXT NOT NULL,
    managed_by TEXT NOT NULL,
    state TEXT NOT NULL,
    targets TEXT NOT NULL,
    listed BOOLEAN NOT NULL,
    PRIMARY KEY (uid),
    CONSTRAINT agents_state CHECK (state IN ('enabled', 'suspended', 'removed')),
    CONSTRAINT agents_managed_by CHECK (managed_by IN ('file', 'command'))
);
CREATE UNIQUE INDEX agents_one_login ON agents (login) WHERE state <> 'removed';
CREATE UNIQUE INDEX agents_one_name ON agents (name) WHERE state <> 'removed';
CREATE TABLE audit (
    position {serial} NOT NULL,
    chain TEXT NOT NULL,
    seq BIGINT NOT NULL,
    at BIGINT NOT NULL,
    action TEXT NOT NULL,
    actor TEXT NOT NULL,
    agent TEXT NOT NULL,
    version_id TEXT NOT NULL,
    outcome TEXT NOT NULL,
    detail TEXT NOT NULL,
    hash TEXT NOT NULL,
    PRIMARY KEY (position),
    CONSTRAINT audit_one_seq UNIQUE (chain, seq)
);
CREATE INDEX audit_by_agent ON audit (agent, position);
CREATE TABLE chains (
    chain TEXT NOT NULL,
    seq BIGINT NOT NULL,
    hash TEXT NOT NULL,
    PRIMARY KEY (chain)
);
CREATE TABLE daemons (
    writer TEXT NOT NULL,
    leads BOOLEAN NOT NULL,
    started_at BIGINT NOT NULL,
    until BIGINT NOT NULL,
    died_at BIGINT,
    boot_id TEXT,
    boottime BIGINT,
    wall BIGINT,
    PRIMARY KEY (writer)
);
CREATE UNIQUE INDEX daemons_one_leader ON daemons (leads) WHERE leads;
CREATE TABLE meta (
    id INTEGER NOT NULL,
    store_id TEXT NOT NULL,
    incarnation BIGINT NOT NULL,
    epoch BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT meta_one_row CHECK (id = 1)
);
CREATE TABLE credentials (
    uid TEXT NOT NULL,
    agent_uid TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    seq BIGINT NOT NULL,
    next_rotation_at BIGINT,
    sweep_at BIGINT,
    wake_at BIGINT,
    request TEXT,
    successor_owed BOOLEAN NOT NULL,
    leaving TEXT NOT NULL,
    withheld TEXT NOT NULL,
    drift TEXT NOT NULL,
    looks TEXT NOT NULL,
    revision BIGINT NOT NULL,
    holder TEXT,
    holder_writer TEXT,
    until BIGINT,
    fence BIGINT DEFAULT 0 NOT NULL,
    wake_requested BIGINT,
    PRIMARY KEY (uid),
    CONSTRAINT credentials_agent FOREIGN KEY(agent_uid) REFERENCES agents (uid),
    CONSTRAINT credentials_one_name UNIQUE (agent_uid, name),
    CONSTRAINT credentials_claim CHECK ((holder IS NULL) = (until IS NULL)),
    CONSTRAINT credentials_numbers CHECK (seq >= 0 AND revision >= 0 AND fence >= 0)
);
CREATE INDEX credentials_due ON credentials (wake_at);
CREATE TABLE identities (
    identity TEXT NOT NULL,
    agent_uid TEXT NOT NULL,
    target TEXT NOT NULL,
    PRIMARY KEY (identity),
    CONSTRAINT identities_agent FOREIGN KEY(agent_uid) REFERENCES agents (uid)
);
CREATE INDEX identities_by_agent ON identities (agent_uid, target);
CREATE TABLE requests (
    id TEXT NOT NULL,
    credential_uid TEXT NOT NULL,
    digest TEXT NOT NULL,
    at BIGINT NOT NULL,
    outcome TEXT NOT NULL,
    PRIMARY KEY (id, credential_uid),
    CONSTRAINT requests_credential FOREIGN KEY(credential_uid) REFERENCES credentials (uid)
);
CREATE INDEX requests_by_time ON requests (at);
CREATE TABLE rotations (
    uid TEXT NOT NULL,
    credential_uid TEXT NOT NULL,
    cause TEXT NOT NULL,
    state TEXT NOT NULL,
    version_id TEXT,
    attempt BIGINT NOT NULL,
    targets TEXT NOT NULL,
    grace BIGINT,
    opened_at BIGINT NOT NULL,
    waiting TEXT,
    error_code TEXT NOT NULL,
    error_where TEXT NOT NULL,
    error_detail TEXT NOT NULL,
    closed_at BIGINT,
    PRIMARY KEY (uid),
    CONSTRAINT rotations_credential FOREIGN KEY(credential_uid) REFERENCES credentials (uid),
    CONSTRAINT rotations_state CHECK (state IN ('running', 'waiting', 'stalled', 'done', 'abandoned', 'closed')),
    CONSTRAINT rotations_cause CHECK (cause IN ('first', 'schedule', 'request', 'reissue', 'drift', 'new-destination', 'new-login')),
    CONSTRAINT rotations_waiting CHECK (state <> 'waiting' OR waiting IS NOT NULL),
    CONSTRAINT rotations_closed CHECK ((state IN ('running', 'waiting', 'stalled')) = (closed_at IS NULL))
);
CREATE INDEX rotations_newest ON rotations (credential_uid, opened_at);
CREATE UNIQUE INDEX rotations_one_open ON rotations (credential_uid) WHERE state IN ('running', 'waiting', 'stalled');
CREATE TABLE versions (
    id TEXT NOT NULL,
    credential_uid TEXT NOT NULL,
    seq BIGINT NOT NULL,
    login TEXT NOT NULL,
    state TEXT NOT NULL,
    scheme TEXT NOT NULL,
    digest TEXT NOT NULL,
    tag {blob},
    origin TEXT NOT NULL,
    exposed BOOLEAN NOT NULL,
    fence BIGINT NOT NULL,
    minted_at BIGINT NOT NULL,
    promoted_at BIGINT,
    deadline BIGINT,
    not_after BIGINT,
    ended_at BIGINT,
    PRIMARY KEY (id),
    CONSTRAINT versions_credential FOREIGN KEY(credential_uid) REFERENCES credentials (uid),
    CONSTRAINT versions_one_seq UNIQUE (credential_uid, seq),
    CONSTRAINT versions_state CHECK (state IN ('pending', 'current', 'previous', 'kept', 'retired', 'revoked')),
    CONSTRAINT versions_deadline CHECK (deadline IS NULL OR state NOT IN ('pending', 'current')),
    CONSTRAINT versions_ended CHECK ((state IN ('retired', 'revoked')) = (ended_at IS NOT NULL)),
    CONSTRAINT versions_seq CHECK (seq >= 1)
);
CREATE INDEX versions_by_login ON versions (login, state);
CREATE UNIQUE INDEX versions_one_current ON versions (credential_uid) WHERE state = 'current';
CREATE UNIQUE INDEX versions_one_pending ON versions (credential_uid) WHERE state = 'pending';
CREATE TABLE intents (
    uid TEXT NOT NULL,
    credential_uid TEXT NOT NULL,
    version_id TEXT NOT NULL,
    target TEXT NOT NULL,
    effect TEXT NOT NULL,
    expected TEXT NOT NULL,
    writer TEXT NOT NULL,
    fence BIGINT NOT NULL,
    incarnation BIGINT NOT NULL,
    at BIGINT NOT NULL,
    outcome TEXT,
    ended_at BIGINT,
    PRIMARY KEY (uid),
    CONSTRAINT intents_credential FOREIGN KEY(credential_uid) REFERENCES credentials (uid),
    CONSTRAINT intents_version FOREIGN KEY(version_id) REFERENCES versions (id),
    CONSTRAINT intents_effect CHECK (effect IN ('stage', 'activate', 'retire', 'withdraw')),
    CONSTRAINT intents_outcome CHECK (outcome IS NULL OR outcome IN ('done', 'failed', 'settled')),
    CONSTRAINT intents_ended CHECK ((outcome IS NULL) = (ended_at IS NULL))
);
CREATE INDEX intents_by_credential ON intents (credential_uid, outcome);
CREATE TABLE placements (
    version_id TEXT NOT NULL,
    target TEXT NOT NULL,
    locator TEXT NOT NULL,
    credential_uid TEXT NOT NULL,
    gone BOOLEAN NOT NULL,
    PRIMARY KEY (version_id, target, locator),
    CONSTRAINT placements_version FOREIGN KEY(version_id) REFERENCES versions (id),
    CONSTRAINT placements_credential FOREIGN KEY(credential_uid) REFERENCES credentials (uid)
);
CREATE INDEX placements_by_credential ON placements (credential_uid, gone)
"""

# A tombstone is for ever: whatever the code above asks, a refused version is never accepted again.
_REFUSED_AGAIN = (
    "OLD.state IN ('retired', 'revoked')"
    " AND (NEW.state NOT IN ('retired', 'revoked') OR OLD.state = 'revoked' AND NEW.state <> 'revoked')"
)
TOMBSTONES = {
    "sqlite": [
        f"""
        CREATE TRIGGER versions_tombstones BEFORE UPDATE ON versions WHEN {_REFUSED_AGAIN}
        BEGIN SELECT RAISE(ABORT, 'versions_tombstones'); END
        """
    ],
    "postgresql": [
        """
        CREATE FUNCTION versions_tombstones() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'versions_tombstones' USING ERRCODE = 'check_violation';
        END $$
        """,
        f"""
        CREATE TRIGGER versions_tombstones BEFORE UPDATE ON versions
        FOR EACH ROW WHEN ({_REFUSED_AGAIN}) EXECUTE FUNCTION versions_tombstones()
        """,
    ],
}
_TYPES = {
    "sqlite": {"blob": "BLOB", "serial": "INTEGER"},
    "postgresql": {"blob": "BYTEA", "serial": "BIGSERIAL"},
}


def upgrade() -> None:
    """Build every table, index and trigger."""
    dialect = op.get_context().dialect.name
    for statement in _TABLES.format(**_TYPES[dialect]).split(";"):
        op.execute(statement)
    for statement in TOMBSTONES[dialect]:
        op.execute(statement)
