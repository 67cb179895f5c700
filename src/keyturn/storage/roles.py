"""Who may do what on PostgreSQL, as SQL that an administrator reads and pipes into psql.

    keyturn_migrator        owns the tables; `keyturn store upgrade` logs in as it, nothing else does
    keyturn_daemon          rows, no tables; adds to the audit and to the versions, never rewrites them
    keyturn_verifier        reads what a decision needs, column by column; its own rows of `verifiers`,
                            and adds to what it counted
    keyturn_reader_GROUP    one view: the hashes of its agents that are accepted now

The first part (`roles`) needs an administrator of the server, once and whenever a group is added. The
second (`rights`) is the owner's: `store upgrade` carries it out with every change of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import Connection, make_url

from keyturn.errors import StorageError
from keyturn.storage.postgresql import IDLE_MS, LOCK_MS, STATEMENT_MS
from keyturn.storage.tables import metadata
from keyturn.storage.usage_tables import usage_metadata

MIGRATOR, DAEMON, VERIFIER = "keyturn_migrator", "keyturn_daemon", "keyturn_verifier"
READER = "keyturn_reader_"  # and the name of the group
SCHEMA = "public"
VIEWS = "keyturn_readers"

Readers = Mapping[str, Sequence[str]]  # agents by the name of their group

_NOW = "(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)"

# SECURITY: what the daemon may never change, whoever speaks through it. An audit entry stands as it
# was written, and so does a version: another hash under an old id would be another secret.
_FIXED: dict[str, frozenset[str]] = {
    "meta": frozenset({"id", "store_id", "created_at"}),
    "versions": frozenset(
        {"id", "credential_uid", "seq", "scheme", "digest", "tag", "origin", "minted_at"}
    ),
    "chains": frozenset({"chain"}),
    "intents": frozenset({"uid", "credential_uid", "version_id", "target", "effect", "writer"}),
    "rotations": frozenset({"uid", "credential_uid", "opened_at"}),
    "credentials": frozenset({"uid", "agent_uid"}),
    "agents": frozenset({"uid"}),
}
_NEVER_CHANGED = frozenset({"audit", "alembic_version", "verifiers"})
_NEVER_ADDED = frozenset({"alembic_version", "verifiers"})
_NEVER_DELETED = frozenset({"audit", "alembic_version", "chains", *_FIXED})

# What a decision is made of (`storage.decisions`), and nothing else.
_READ_BY_VERIFIERS: dict[str, Sequence[str]] = {
    "agents": ("uid", "name", "login", "state"),
    "credentials": ("uid", "agent_uid"),
    "daemons": ("boot_id", "boottime", "wall"),
    "meta": ("id", "incarnation", "epoch"),
    "quarantine": ("agent_uid", "reason"),
    "versions": (
        "id", "credential_uid", "seq", "login", "state", "scheme", "digest", "tag", "origin",
        "deadline", "not_after",
    ),
    "verifiers": tuple(column.name for column in metadata.tables["verifiers"].columns),
}  # fmt: skip
# Its lease is what a revoke waits for: that stays what it was registered with.
_RENEWED_BY_VERIFIERS = ("incarnation", "epoch", "renewals", "renewed_at")

# What verifiers count (`storage.usage`): what they insert and what they may change of it. Nothing is
# theirs to delete, and nothing to mark as told.
_COUNTED_BY_VERIFIERS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "usage_sources": (("source", "number", "flushed_at"), ("number", "flushed_at")),
    "usage_versions": (
        ("version_id", "first_used_at", "last_used_at", "uses", "hour", "hour_uses", "hour_before"),
        ("first_used_at", "last_used_at", "uses", "hour", "hour_uses", "hour_before"),
    ),
    "usage_results": (("span", "result", "slot", "at", "number"), ("at", "number")),
    "usage_presented": (
        ("version_id", "state", "first_at", "last_at", "number"),
        ("state", "last_at", "number"),
    ),
}

_LIMITS = {  # statement, lock and idle-in-transaction timeouts in ms, connections
    MIGRATOR: (600_000, 10_000, 60_000, 5),
    DAEMON: (STATEMENT_MS, LOCK_MS, IDLE_MS, -1),
    VERIFIER: (5_000, 1_000, 5_000, -1),
}
_LIMITS_OF_READERS = (5_000, 1_000, 5_000, 20)


def policy(url: str, readers: Readers) -> str:
    """Return all of it, to be run by an administrator, in one transaction, as often as one likes."""
    database = make_url(url).database or "keyturn"
    parts = [
        _INTRODUCTION.format(database=database),
        "BEGIN;",
        *(f"{statement};" for statement in roles(database, readers)),
        "\n-- What follows is done again by `keyturn store upgrade`.",
        f"SET LOCAL ROLE {MIGRATOR};",
        _guarded(rights(readers)),
        "COMMIT;",
    ]
    return "\n".join(parts)


_INTRODUCTION = """\
-- The least rights of Keyturn in the database {database}, which is its own: psql -v ON_ERROR_STOP=1.
-- No role has a password yet: \\password ROLE, and the same text into the file that the
-- configuration names. It can be run again: whenever `store.readers` changes, or after an upgrade."""


def roles(database: str, readers: Readers) -> list[str]:
    """Return what an administrator of the server does: roles, their limits, database, schemas."""
    of_readers = [READER + group for group in sorted(readers)]
    every = [MIGRATOR, DAEMON, VERIFIER, *of_readers]
    return [
        *(_CREATE_ROLE.format(role=role) for role in every),
        _REFUSE_POWERS.format(roles=", ".join(f"'{role}'" for role in every)),
        *(
            statement
            for role in every
            for statement in _limits(role, database, _LIMITS.get(role, _LIMITS_OF_READERS))
        ),
        f"REVOKE ALL ON DATABASE {_name(database)} FROM PUBLIC",
        f"GRANT CONNECT ON DATABASE {_name(database)} TO {', '.join(every)}",
        _NO_SIDE_DOORS.format(daemon=DAEMON, migrator=MIGRATOR),
        _TAKE_OVER.format(schema=SCHEMA, migrator=MIGRATOR),
        f"ALTER SCHEMA {SCHEMA} OWNER TO {MIGRATOR}",
        f"REVOKE ALL ON SCHEMA {SCHEMA} FROM PUBLIC",
        f"GRANT USAGE ON SCHEMA {SCHEMA} TO {DAEMON}, {VERIFIER}",
        f"CREATE SCHEMA IF NOT EXISTS {VIEWS} AUTHORIZATION {MIGRATOR}",
        f"REVOKE ALL ON SCHEMA {VIEWS} FROM PUBLIC",
        *(f"GRANT USAGE ON SCHEMA {VIEWS} TO {role}" for role in of_readers),
    ]


_CREATE_ROLE = """\
DO $$ BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{role}') THEN CREATE ROLE {role}; END IF;
END $$"""
# Not taken away: that needs a superuser on some servers, and who gave it had a reason.
_REFUSE_POWERS = """\
DO $$ DECLARE found text; BEGIN
  SELECT string_agg(rolname, ', ') INTO found FROM pg_roles WHERE rolname IN ({roles})
    AND (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls);
  IF found IS NOT NULL THEN RAISE EXCEPTION 'these roles have powers that Keyturn must not: %', found;
  END IF;
END $$"""
# SECURITY: everybody may create large objects and take any advisory lock: a full disk, or an upgrade
# that never begins.
_NO_SIDE_DOORS = """\
DO $$ DECLARE f regprocedure; BEGIN
  FOR f IN SELECT oid FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND
    (proname ~ '^pg_(try_)?advisory_' OR proname ~ '^lo_(creat|create|from_bytea|import|put)$') LOOP
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f);
  END LOOP;
  GRANT EXECUTE ON FUNCTION pg_advisory_xact_lock(bigint) TO {migrator}, {daemon};
END $$"""
# A store that one login has made and used so far.
_TAKE_OVER = """\
DO $$ DECLARE r record; BEGIN
  IF to_regclass('{schema}.alembic_version') IS NULL THEN RETURN; END IF;
  FOR r IN SELECT oid::regclass AS name FROM pg_class
    WHERE relnamespace = '{schema}'::regnamespace AND relkind = 'r' LOOP
    EXECUTE format('ALTER TABLE %s OWNER TO {migrator}', r.name);
  END LOOP;
  FOR r IN SELECT oid::regprocedure AS name FROM pg_proc
    WHERE pronamespace = '{schema}'::regnamespace AND prokind = 'f' LOOP
    EXECUTE format('ALTER FUNCTION %s OWNER TO {migrator}', r.name);
  END LOOP;
END $$"""


def _limits(role: str, database: str, limits: tuple[int, int, int, int]) -> list[str]:
    statement, lock, idle, connections = limits
    path = VIEWS if role.startswith(READER) else SCHEMA
    values = {
        "statement_timeout": f"{statement}ms",
        "lock_timeout": f"{lock}ms",
        "idle_in_transaction_session_timeout": f"{idle}ms",
    }
    return [
        f"ALTER ROLE {role} LOGIN NOINHERIT CONNECTION LIMIT {connections}",
        *(
            f"ALTER ROLE {role} IN DATABASE {_name(database)} SET {name} = '{value}'"
            for name, value in values.items()
        ),
        # Temporary tables last: they come first where nobody says.
        f"ALTER ROLE {role} IN DATABASE {_name(database)} SET search_path = {path}, pg_temp",
    ]


def rights(readers: Readers) -> list[str]:
    """Return what the owner of the tables does: who may do what with which, and the views."""
    statements = [
        f"REVOKE ALL ON ALL TABLES IN SCHEMA {SCHEMA} FROM PUBLIC, {DAEMON}, {VERIFIER}",
        f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA {SCHEMA} FROM PUBLIC, {DAEMON}, {VERIFIER}",
        f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {SCHEMA} FROM PUBLIC",
        f"GRANT SELECT ON {SCHEMA}.alembic_version TO {DAEMON}",
    ]
    for table in (*metadata.sorted_tables, *usage_metadata.sorted_tables):
        verbs = _verbs(table)
        statements.append(f"GRANT {verbs} ON {SCHEMA}.{table.name} TO {DAEMON}")
        if table.name in _READ_BY_VERIFIERS:
            columns = ", ".join(_READ_BY_VERIFIERS[table.name])
            statements.append(f"GRANT SELECT ({columns}) ON {SCHEMA}.{table.name} TO {VERIFIER}")
    for name, (added, changed) in _COUNTED_BY_VERIFIERS.items():
        verbs = f"SELECT, INSERT ({', '.join(added)}), UPDATE ({', '.join(changed)})"
        statements.append(f"GRANT {verbs} ON {SCHEMA}.{name} TO {VERIFIER}")
    statements.append(f"GRANT USAGE ON SEQUENCE {SCHEMA}.audit_position_seq TO {DAEMON}")
    return [*statements, *_own_rows(), *_views(readers)]


def _own_rows() -> list[str]:
    """Return what lets a verifier register, and keeps its hands off those of other logins."""
    table, renewed = f"{SCHEMA}.verifiers", ", ".join(_RENEWED_BY_VERIFIERS)
    # SECURITY: whoever acknowledges for another, or takes its row away, lets a revoke return too early.
    policies = {
        "read_all": f"FOR SELECT TO {VERIFIER}, {DAEMON} USING (true)",
        "end_all": f"FOR DELETE TO {DAEMON} USING (true)",
        "add_own": f"FOR INSERT TO {VERIFIER} WITH CHECK (login = current_user)",
        "renew_own": f"FOR UPDATE TO {VERIFIER} USING (login = current_user)",
        "end_own": f"FOR DELETE TO {VERIFIER} USING (login = current_user)",
    }
    return [
        f"GRANT INSERT, UPDATE ({renewed}), DELETE ON {table} TO {VERIFIER}",
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
        *(
            statement
            for name, rule in policies.items()
            for statement in (
                f"DROP POLICY IF EXISTS {name} ON {table}",
                f"CREATE POLICY {name} ON {table} {rule}",
            )
        ),
    ]


def _verbs(table: sa.Table) -> str:
    verbs = ["SELECT"]
    if table.name not in _NEVER_ADDED:
        verbs.append("INSERT")
    if table.name not in _NEVER_CHANGED:
        fixed = _FIXED.get(table.name, frozenset())
        columns = ", ".join(c.name for c in table.columns if c.name not in fixed)
        verbs.append(f"UPDATE ({columns})" if fixed else "UPDATE")
    if table.name not in _NEVER_DELETED:
        verbs.append("DELETE")
    return ", ".join(verbs)


_DROP_VIEWS = """\
DO $$ DECLARE r record; BEGIN
  FOR r IN SELECT oid::regclass AS name FROM pg_class
    WHERE relnamespace = '{views}'::regnamespace AND relkind = 'v' LOOP
    EXECUTE format('DROP VIEW %s', r.name);
  END LOOP;
END $$"""
# The names stand in a table and not in the views: everybody who may log in can read a view's text.
_MEMBERS = (
    f"CREATE TABLE IF NOT EXISTS {VIEWS}._members"
    " (reader text NOT NULL, agent text NOT NULL, PRIMARY KEY (reader, agent))"
)
_VIEW = """\
CREATE VIEW {views}.{group} WITH (security_barrier = true) AS
  SELECT a.name AS agent, v.login, v.id AS version, v.digest AS hash, v.origin = 'imported' AS imported,
    to_timestamp(LEAST(v.deadline, v.not_after) / 1000000.0) AS accepted_until
  FROM {views}._members m
    JOIN {schema}.agents a ON a.name = m.agent
    JOIN {schema}.credentials c ON c.agent_uid = a.uid
    JOIN {schema}.versions v ON v.credential_uid = c.uid
  WHERE m.reader = '{group}' AND a.state = 'enabled'
    AND v.state IN ('pending', 'current', 'previous', 'kept')
    AND (v.deadline IS NULL OR v.deadline > {now}) AND (v.not_after IS NULL OR v.not_after > {now})
    AND v.scheme = 'argon2id' AND v.digest LIKE '$argon2id$%'{quarantine}"""
# After a restore nobody can tell about these.
_NOT_QUARANTINED = (
    "\n    AND NOT EXISTS (SELECT FROM {schema}.quarantine q WHERE q.agent_uid IN ('', a.uid))"
)


def _views(readers: Readers) -> list[str]:
    """Return what makes one view per group, and ends those of groups that are no more."""
    statements = [
        _DROP_VIEWS.format(views=VIEWS),
        _MEMBERS,
        f"REVOKE ALL ON {VIEWS}._members FROM PUBLIC",
        f"DELETE FROM {VIEWS}._members",  # noqa: S608  # a name of ours
    ]
    known = "quarantine" in metadata.tables
    quarantine = _NOT_QUARANTINED.format(schema=SCHEMA) if known else ""
    for group, agents in sorted(readers.items()):
        rows = ", ".join(f"('{group}', '{agent}')" for agent in sorted(set(agents)))
        view = _VIEW.format(
            views=VIEWS, schema=SCHEMA, group=group, now=_NOW, quarantine=quarantine
        )
        statements += [
            f"INSERT INTO {VIEWS}._members VALUES {rows}",  # noqa: S608  # ids, by their form
            view,
            f"GRANT SELECT ON {VIEWS}.{group} TO {READER}{group}",
        ]
    return statements


def apply(connection: Connection, readers: Readers) -> bool:
    """Carry out the owner's part in the caller's transaction; False where nobody made the roles.

    One login that does everything needs none of this. Raises StorageError where a group has no role.
    """
    wanted = [DAEMON, VERIFIER, *(READER + group for group in sorted(readers))]
    found = set(
        connection.execute(
            sa.text("SELECT rolname FROM pg_roles WHERE rolname = ANY(:names)"), {"names": wanted}
        ).scalars()
    )
    missing = [role for role in wanted if role not in found]
    if missing and not readers:
        return False
    if missing:
        raise StorageError(
            f"the server has no role {missing[0]}",
            hint="an administrator makes it: `keyturn policy postgresql -c FILE | psql …`",
        )
    try:
        for statement in rights(readers):
            connection.exec_driver_sql(statement.replace("%", "%%"))
    except exc.ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) != "42501":
            raise
        raise StorageError(
            "this login does not own the store's tables",
            hint=f"log in as {MIGRATOR} (KEYTURN_STORE__URL, KEYTURN_STORE__PASSWORD_FILE)",
        ) from None
    return True


def _guarded(statements: Sequence[str]) -> str:
    """Return statements that are left out as long as there are no tables."""
    inside = ";\n".join(_within(statement) for statement in statements)
    return (
        f"DO $keyturn$ BEGIN\nIF to_regclass('{SCHEMA}.alembic_version') IS NULL THEN\n"
        "  RAISE NOTICE 'there are no tables yet: run `keyturn store upgrade`'; RETURN;\n"
        f"END IF;\n{inside};\nEND $keyturn$;"
    )


def _within(statement: str) -> str:
    """Return a statement as it stands inside another block."""
    if not statement.startswith("DO $$"):
        return statement
    return statement.removeprefix("DO $$ ").removesuffix(" $$")


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
