"""What each role of the database can do, and above all what it cannot, on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from keyturn.core.model import AgentState, VersionState
from keyturn.errors import StoreUnavailable
from keyturn.storage.decisions import DecisionReader
from keyturn.storage.roles import DAEMON, MIGRATOR, VERIFIER
from keyturn.storage.usage import UsageRecords
from keyturn.testing.fakes import FakeClock
from keyturn.verifier.decision import Verified
from keyturn.verifier.usage import Usage
from support.least_rights import READERS, LeastRights, least_rights, psql, put, put_version
from support.postgres import Cluster, postgres  # noqa: F401 - a fixture
from support.stores import entry

WEB = "keyturn_reader_web"
NO_RIGHT = "42501"


@pytest.fixture(scope="module")
def rights(postgres: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LeastRights]:  # noqa: F811
    """Give a store with rows of every kind that must not be seen."""
    with least_rights(postgres, tmp_path_factory.mktemp("store")) as made:
        _fill(made)
        yield made


def _fill(rights: LeastRights) -> None:
    store = rights.open()
    now = store.now()
    uid = "cred-web-bot"
    put(store, "web-bot", seed=1)
    for seq, state, deadline in (
        (2, VersionState.PREVIOUS, timedelta(hours=1)),
        (3, VersionState.PREVIOUS, timedelta(seconds=-1)),
        (4, VersionState.KEPT, timedelta(seconds=-1)),
        (5, VersionState.RETIRED, None),
        (6, VersionState.REVOKED, None),
    ):
        more = {"deadline": None if deadline is None else now + deadline, "state": state}
        if deadline is None:
            more["ended_at"] = now
        put_version(store, uid, "web-bot", seed=seq, seq=seq, **more)
    put_version(
        store, uid, "web-bot", seed=7, seq=7, state=VersionState.KEPT,
        not_after=now - timedelta(seconds=1),
    )  # fmt: skip
    put_version(store, uid, "web-bot", seed=8, seq=8, state=VersionState.KEPT, scheme="hmac-sha256")
    put(store, "shop-bot", seed=9)
    put(store, "other-bot", seed=10)
    put(store, "off-bot", seed=11)
    agent = store.agent("off-bot")
    off = replace(agent, state=AgentState.SUSPENDED)
    identities = {t.key: f"file:///{t.key}" for t in agent.targets}
    store.amend_agent(agent.uid, off, identities=identities, audit=[entry("suspend")])


def test_a_reader_sees_what_is_accepted_now_and_nothing_else(rights: LeastRights) -> None:
    """Of nine versions of its agents two are accepted; the suspended agent's none."""
    with rights.connect(WEB) as connection:
        rows = connection.execute("SELECT agent, version, hash FROM web").fetchall()
        again = connection.execute("TABLE keyturn_readers.web").fetchall()
    with rights.connect() as admin:
        query = "SELECT id FROM versions WHERE credential_uid = 'cred-web-bot' AND seq <= 2"
        expected = {one for (one,) in admin.execute(query).fetchall()}
    assert {(agent, version) for agent, version, _ in rows} == {("web-bot", v) for v in expected}
    assert all(hashed.startswith("$argon2id$") for _, _, hashed in rows)
    assert len(again) == 2
    assert set(READERS["web"]) == {"web-bot", "off-bot"}


def test_a_revoke_is_out_of_the_view_at_once(rights: LeastRights) -> None:
    """The view has no memory: what was committed before the query is what it shows."""
    store = rights.open()
    version_id, _ = put(store, "gone-bot", seed=12)
    with rights.connect(MIGRATOR) as owner:
        owner.execute("INSERT INTO keyturn_readers._members VALUES ('web', 'gone-bot')")
    query = "SELECT count(*) FROM web WHERE version = %s"
    with rights.connect(WEB) as connection:
        assert connection.execute(query, (version_id,)).fetchone() == (1,)
        uid = "cred-gone-bot"
        store.amend(
            uid,
            lambda case: (
                replace(
                    case,
                    versions=tuple(
                        replace(v, state=VersionState.REVOKED, ended_at=store.now())
                        for v in case.versions
                    ),
                ),
                [entry()],
            ),
        )
        assert connection.execute(query, (version_id,)).fetchone() == (0,)


# --- the matrix ---------------------------------------------------------------------------

_LEAK = "CREATE FUNCTION {schema}.leak(text) RETURNS boolean COST 0.0000001 LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE '%', $1; RETURN true; END $$"
EVERYBODY = [
    "CREATE TABLE public.mine (x int)",
    "CREATE TABLE keyturn_readers.mine (x int)",
    "CREATE SCHEMA mine",
    "CREATE TEMPORARY TABLE versions (id text)",
    "CREATE EXTENSION dblink",
    "CREATE ROLE friend",
    "CREATE FUNCTION public.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE VIEW public.w AS SELECT 1",
    "COPY (SELECT 1) TO PROGRAM 'cat'",
    "COPY public.versions TO '/tmp/x'",
    "COPY public.alembic_version FROM '/etc/passwd'",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT lo_create(0)",
    "SELECT pg_advisory_lock(28541989087736430)",
    "SELECT pg_try_advisory_lock(1)",
    "SET ROLE keyturn_migrator",
    "SET ROLE keyturn",
    "SET SESSION AUTHORIZATION keyturn",
    "SET session_replication_role = replica",
    "ALTER ROLE keyturn_migrator PASSWORD 'x'",
    "GRANT keyturn_migrator TO CURRENT_USER",
    "ALTER TABLE public.versions DISABLE TRIGGER ALL",
    "ALTER TABLE public.versions ADD COLUMN x int",
    "DROP TABLE public.versions CASCADE",
    "DROP VIEW keyturn_readers.web",
    "ALTER VIEW keyturn_readers.web SET (security_barrier = false)",
    "ALTER TABLE public.audit OWNER TO CURRENT_USER",
    "CREATE RULE r AS ON INSERT TO public.audit DO INSTEAD NOTHING",
    "CREATE TRIGGER t BEFORE INSERT ON public.audit FOR EACH ROW EXECUTE FUNCTION public.versions_tombstones()",
    "TRUNCATE public.audit",
    "TRUNCATE public.versions CASCADE",
    "DELETE FROM public.audit",
    "UPDATE public.audit SET actor = 'nobody'",
    "DELETE FROM public.versions",
    "DELETE FROM public.chains",
    "UPDATE public.versions SET digest = 'x'",
    "UPDATE public.versions SET tag = NULL",
    "UPDATE public.versions SET id = 'x'",
    "UPDATE public.versions SET credential_uid = 'cred-web-bot'",
    "DELETE FROM public.agents",
    "DELETE FROM public.credentials",
    "DELETE FROM public.intents",
    "DELETE FROM public.rotations",
    "DELETE FROM public.meta",
    "UPDATE public.meta SET store_id = 'x'",
    "UPDATE public.alembic_version SET version_num = '9999'",
    "DELETE FROM public.alembic_version",
    "SELECT * FROM keyturn_readers._members",
    "INSERT INTO keyturn_readers._members VALUES ('web', 'other-bot')",
    "SELECT * FROM keyturn_readers.shop",
]
NOT_FOR_VERIFIERS = [
    "SELECT * FROM public.audit",
    "SELECT * FROM public.versions",
    "SELECT fence FROM public.versions",
    "SELECT owner FROM public.agents",
    "SELECT * FROM public.credentials",
    "SELECT * FROM public.intents",
    "SELECT * FROM public.requests",
    "SELECT * FROM public.placements",
    "SELECT * FROM public.identities",
    "SELECT * FROM public.rotations",
    "SELECT * FROM public.chains",
    "SELECT writer FROM public.daemons",
    "SELECT store_id FROM public.meta",
    "SELECT * FROM public.alembic_version",
    "INSERT INTO public.versions (id) VALUES ('x')",
    "INSERT INTO public.meta (id) VALUES (2)",
    "INSERT INTO public.audit (chain) VALUES ('x')",
    "UPDATE public.versions SET state = 'current'",
    "UPDATE public.versions SET deadline = NULL",
    "UPDATE public.agents SET state = 'enabled'",
    "UPDATE public.credentials SET wake_at = 0",
    "UPDATE public.meta SET epoch = 0",
    "SELECT id FROM public.versions FOR UPDATE",
    "SELECT nextval('public.audit_position_seq')",
    "LOCK TABLE public.versions IN ACCESS EXCLUSIVE MODE",
    "LOCK TABLE public.agents IN SHARE MODE",
    "COPY public.versions TO STDOUT",
    "INSERT INTO public.verifiers VALUES ('x', 'keyturn_daemon', 'h', '1', 1, 1, 1, 1, 1, 1)",
    "UPDATE public.verifiers SET lease = 300000000",
    "UPDATE public.verifiers SET login = 'keyturn_daemon'",
    "UPDATE public.verifiers SET id = 'x'",
    "TRUNCATE public.verifiers",
    "ALTER TABLE public.verifiers DISABLE ROW LEVEL SECURITY",
    "DROP POLICY renew_own ON public.verifiers",
    "DELETE FROM public.usage_presented",
    "DELETE FROM public.usage_versions",
    "DELETE FROM public.usage_sources",
    "DELETE FROM public.usage_results",
    "TRUNCATE public.usage_results",
    "UPDATE public.usage_presented SET told_at = 1",
    "UPDATE public.usage_presented SET told_number = 9",
    "UPDATE public.usage_presented SET first_at = 1",
    "UPDATE public.usage_versions SET version_id = 'x'",
    "INSERT INTO public.usage_presented (version_id, state, first_at, last_at, number, told_at)"
    " VALUES ('x', 'retired', 1, 1, 1, 1)",
    "LOCK TABLE public.usage_versions IN ACCESS EXCLUSIVE MODE",
]
# Who is waited for says so itself; the daemon ends what is dead, and nothing else.
NOT_FOR_DAEMONS = [
    "INSERT INTO public.verifiers VALUES ('x', 'keyturn_daemon', 'h', '1', 1, 1, 1, 1, 1, 1)",
    "UPDATE public.verifiers SET epoch = 99",
    "UPDATE public.verifiers SET renewals = renewals",
    "ALTER TABLE public.verifiers DISABLE ROW LEVEL SECURITY",
]
NOT_FOR_READERS = [
    "SELECT id FROM public.versions",
    "SELECT name FROM public.agents",
    "SELECT uid FROM public.credentials",
    "SELECT boottime FROM public.daemons",
    "SELECT epoch FROM public.meta",
    "SELECT digest FROM public.versions WHERE id = 'x'",
    "SELECT * FROM public.usage_versions",
    "SELECT * FROM public.usage_presented",
    "INSERT INTO public.usage_results (span, result, slot, at, number) VALUES ('day', 'x', 1, 1, 1)",
    "INSERT INTO web (agent) VALUES ('x')",
    "UPDATE web SET hash = 'x'",
    "DELETE FROM web",
    "SELECT * FROM web FOR UPDATE",
    "LOCK TABLE web",
    "COPY web TO PROGRAM 'cat'",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'keyturn_daemon'",
    "SELECT pg_catalog.pg_stat_reset()",
    "SELECT most_common_vals FROM pg_catalog.pg_statistic, pg_catalog.pg_stats",
]
CASES = [
    *((role, text) for role in (DAEMON, VERIFIER, WEB) for text in EVERYBODY),
    *((role, text) for role in (VERIFIER, WEB) for text in NOT_FOR_VERIFIERS),
    *((WEB, text) for text in NOT_FOR_READERS),
    *((DAEMON, text) for text in NOT_FOR_DAEMONS),
]


def test_every_statement_that_a_role_must_not_run_is_denied(rights: LeastRights) -> None:
    """Hundreds of statements over three roles: each one denied for want of a right, and no row seen."""
    assert len({text for _, text in CASES}) > 90
    wrong = []
    daemon = rights.open()  # a session that the reader may want to end
    daemon.agents()
    for role in (DAEMON, VERIFIER, WEB):
        with rights.connect(role) as connection:
            wrong += [
                (role, text, found)
                for text in (text for one, text in CASES if one == role)
                if not _denied(text, found := _tried(connection, text))
            ]
    assert wrong == []


def _denied(text: str, found: str) -> bool:
    # A view over several tables takes no writes, whoever asks: that is looked at first.
    return found == NO_RIGHT or (" web" in text and found == "55000")


def _tried(connection: psycopg.Connection[Any], text: str) -> str:
    try:
        with connection.transaction(force_rollback=True):
            cursor = connection.execute(text)
            return f"done, {cursor.rowcount} rows"
    except psycopg.Error as error:
        return error.sqlstate or type(error).__name__


_PEEKS = [
    "SELECT count(*) FROM web WHERE agent IN ('shop-bot', 'other-bot', 'off-bot')",
    "SELECT count(*) FROM pg_stat_activity WHERE usename <> CURRENT_USER AND query LIKE '%versions%'",
    "SELECT count(*) FROM pg_stats WHERE schemaname = 'public'",
    "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'",
    "SELECT count(*) FROM pg_views WHERE definition LIKE '%-bot%'",
    "SELECT count(*) FROM pg_rewrite WHERE pg_get_viewdef(ev_class) LIKE '%-bot%'",
    "SELECT count(*) FROM pg_prepared_statements",
    "SELECT count(*) FROM pg_largeobject_metadata",
    "SELECT CASE WHEN to_regclass('versions') IS NULL THEN 0 ELSE 1 END",
    "SELECT CASE WHEN set_config('search_path', 'public', false) = to_regclass('versions')::text THEN 1 ELSE 0 END",
]


@pytest.mark.parametrize("text", _PEEKS)
def test_nothing_of_others_shows_in_catalogues_either(rights: LeastRights, text: str) -> None:
    """Neither statistics nor other sessions nor the views' own texts tell of agents not in the group."""
    with rights.connect() as admin:
        admin.execute("ANALYZE")
    with rights.connect(WEB) as connection:
        assert connection.execute(text).fetchone() == (0,)


@pytest.mark.parametrize("barrier", [True, False])
def test_a_function_that_tells_sees_no_hidden_row(rights: LeastRights, barrier: bool) -> None:
    """A cheap function in a reader's condition is asked after the view's own conditions, not before.

    Without the barrier it sees them all, so this can fail.
    """
    with rights.connect() as admin:
        admin.execute("CREATE SCHEMA IF NOT EXISTS tools")
        with suppress(psycopg.errors.DuplicateFunction):
            admin.execute(_LEAK.format(schema="tools"))
        admin.execute(f"GRANT USAGE ON SCHEMA tools TO {WEB}")
        admin.execute(
            f"ALTER VIEW keyturn_readers.web SET (security_barrier = {'on' if barrier else 'off'})".encode()
        )
        hidden = {
            one
            for (one,) in admin.execute(
                "SELECT digest FROM versions EXCEPT SELECT hash FROM keyturn_readers.web"
            ).fetchall()
        }
    seen: set[str] = set()
    try:
        with rights.connect(WEB) as connection:
            connection.add_notice_handler(lambda notice: seen.add(str(notice.message_primary)))
            for _ in range(2):
                rows = connection.execute("SELECT * FROM web WHERE tools.leak(hash)").fetchall()
                connection.execute("SET enable_nestloop = off")
            wrong = "SELECT * FROM web WHERE hash::int > 0"
            with pytest.raises(psycopg.Error) as told:
                connection.execute(wrong)
    finally:
        with rights.connect() as admin:
            admin.execute("ALTER VIEW keyturn_readers.web SET (security_barrier = on)")
    assert len(rows) == 2
    if barrier:
        assert len(seen) == 2
        assert not any(one in str(told.value) for one in hidden)
        assert not seen & hidden
    else:
        assert seen & hidden


# --- what they can ------------------------------------------------------------------------


def test_the_verifier_decides_with_its_own_columns(rights: LeastRights) -> None:
    """The columns that a verifier is granted are all that a decision asks for."""
    reader = DecisionReader.open(rights.url(VERIFIER))
    with rights.connect() as admin:
        (known,) = admin.execute("SELECT id FROM versions LIMIT 1").fetchone() or ("",)
    assert reader.lookup(known) is not None
    assert reader.imported("web-bot") == []
    assert reader.anchor("boot") is None
    reader.close()
    stranger = DecisionReader.open(rights.url(WEB))
    with pytest.raises(StoreUnavailable, match="sees no tables") as refused:
        stranger.lookup(known)
    assert "keyturn policy postgresql" in refused.value.hint
    stranger.close()


def test_the_verifier_adds_what_it_counted_and_the_daemon_marks_it(rights: LeastRights) -> None:
    """The rights that a verifier has on its own tables are all that counting asks for."""
    store = rights.open()
    with rights.connect() as admin:
        epoch = admin.execute("SELECT epoch FROM meta").fetchone()
    clock, state_dir = FakeClock(), rights.place.state_dir
    counts = UsageRecords.open(rights.url(VERIFIER), state_dir=state_dir, clock=clock)
    usage = Usage(counts, clock, source="v")
    for _ in range(2):
        usage.accepted(
            Verified(agent="a", login="a", version_id="v1", state="current", deadline=None)
        )
        usage.failed("refused")
        usage._presented("v2", "retired")
        assert usage.flush(), usage.counts
    daemon = UsageRecords.beside(store.database, state_dir=state_dir, clock=clock)
    assert daemon.uses(["v1"])["v1"].uses == 2
    assert daemon.totals() == {"accepted": 2, "refused": 2}
    [one] = daemon.presented(untold=True)
    daemon.told(one, store.now())
    assert daemon.presented(untold=True) == []
    daemon.forget(store.now())
    assert daemon.flushed_at() is not None
    usage.close()
    with rights.connect() as admin:
        assert admin.execute("SELECT epoch FROM meta").fetchone() == epoch


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        (DAEMON, "statement_timeout", "10s"),
        (DAEMON, "lock_timeout", "5s"),
        (DAEMON, "idle_in_transaction_session_timeout", "10s"),
        (VERIFIER, "statement_timeout", "5s"),
        (WEB, "statement_timeout", "5s"),
        (WEB, "idle_in_transaction_session_timeout", "5s"),
        (WEB, "search_path", "keyturn_readers, pg_temp"),
        (MIGRATOR, "lock_timeout", "10s"),
    ],
)
def test_each_role_has_its_limits(rights: LeastRights, role: str, name: str, value: str) -> None:
    """Nobody can hold a transaction or a lock longer than a verifier's lease, whoever connects."""
    with rights.connect(role) as connection:
        assert connection.execute(f"SHOW {name}".encode()).fetchone() == (value,)


def test_a_role_with_powers_is_refused(postgres: Cluster, rights: LeastRights) -> None:  # noqa: F811
    """Roles that somebody made a superuser before are no least rights: nothing is done then."""
    with rights.connect() as admin:
        admin.execute("ALTER ROLE keyturn_reader_shop CREATEDB")
        try:
            with pytest.raises(AssertionError, match="have powers"):
                psql(rights.place.url, _policy(rights))
        finally:
            admin.execute("ALTER ROLE keyturn_reader_shop NOCREATEDB")
    psql(rights.place.url, _policy(rights))


def _policy(rights: LeastRights) -> str:
    from keyturn.storage import roles

    return roles.policy(rights.place.url, READERS)
