"""The tables. A column is named like the field of the model that it holds.

The database repeats the invariants (CHECKs, partial unique indexes, a trigger on tombstones), so
that a bug in the code above cannot store an illegal state. `migrations/` builds what is declared
here; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from keyturn.core import model
from keyturn.core.own import OwnState
from keyturn.storage import codec


class Instant(TypeDecorator[datetime]):
    """An aware datetime as whole microseconds since 1970 UTC."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> int | None:
        """To the database."""
        return None if value is None else codec.micros(value)

    def process_result_value(self, value: int | None, _dialect: Dialect) -> datetime | None:
        """From the database."""
        return None if value is None else codec.instant(value)


class Span(TypeDecorator[timedelta]):
    """A timedelta as whole microseconds."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: timedelta | None, _dialect: Dialect) -> int | None:
        """To the database."""
        return None if value is None else value // codec.MICROSECOND

    def process_result_value(self, value: int | None, _dialect: Dialect) -> timedelta | None:
        """From the database."""
        return None if value is None else timedelta(microseconds=value)


class Word(TypeDecorator[StrEnum]):
    """One of the words of an enumeration, as text."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, words: type[StrEnum]) -> None:
        super().__init__()
        self.words = words

    def process_bind_param(self, value: StrEnum | None, _dialect: Dialect) -> str | None:
        """To the database."""
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, _dialect: Dialect) -> StrEnum | None:
        """From the database."""
        return None if value is None else self.words(value)


class Coded(TypeDecorator[Any]):
    """A structured value as JSON text, by two functions of the codec."""

    impl = sa.Text
    cache_ok = True

    def __init__(self, encode: Callable[[Any], str], decode: Callable[[str], Any]) -> None:
        super().__init__()
        self.encode = encode
        self.decode = decode

    def process_bind_param(self, value: Any, _dialect: Dialect) -> str | None:
        """To the database."""
        return None if value is None else self.encode(value)

    def process_result_value(self, value: str | None, _dialect: Dialect) -> Any:
        """From the database."""
        return None if value is None else self.decode(value)


class store_now(FunctionElement[datetime]):  # noqa: N801 - a function of the database
    """The store's time inside a statement: the database's clock, on SQLite the one given to it."""

    type = Instant()
    inherit_cache = True


SQLITE_NOW = "keyturn_now"  # given to every connection by the engine


@compiles(store_now, "sqlite")
def _now_on_sqlite(_element: store_now, _compiler: SQLCompiler, **_more: Any) -> str:
    return f"{SQLITE_NOW}()"


@compiles(store_now, "postgresql")
def _now_on_postgresql(_element: store_now, _compiler: SQLCompiler, **_more: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)"


def now_micros() -> ColumnElement[int]:
    """The store's time as whole microseconds, to calculate with."""
    return sa.type_coerce(store_now(), sa.BigInteger)


TARGETS = Coded(codec.targets_text, codec.targets_from)
REQUEST = Coded(codec.request_text, codec.request_from)
DRIFT = Coded(codec.drift_text, codec.drift_from)
LOOKS = Coded(codec.looks_text, codec.looks_from)
REPAIRS = Coded(codec.repairs_text, codec.repairs_from)
NAMES = Coded(codec.names_text, codec.names_from)
WAITING = Coded(codec.waiting_text, codec.waiting_from)
DETAIL = Coded(codec.detail_text, codec.detail_from)

metadata = sa.MetaData()


def _one_of(column: str, words: type[StrEnum]) -> str:
    return f"{column} IN ({', '.join(repr(str(word)) for word in words)})"


def _text(name: str, **more: Any) -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, **more)


def _number(name: str, **more: Any) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, **more)


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean, nullable=False)


def _only_where(name: str, table: sa.Table, *columns: str, where: str) -> sa.Index:
    """Return a unique index over the rows that fulfil `where`, for both databases."""
    condition = sa.text(where)
    return sa.Index(
        name,
        *(table.c[column] for column in columns),
        unique=True,
        sqlite_where=condition,
        postgresql_where=condition,
    )


meta = sa.Table(
    "meta",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    _text("store_id"),
    _number("incarnation"),
    _number("epoch"),
    sa.Column("created_at", Instant, nullable=False),
    _text("oldest_schema", server_default="0001"),
    _text("ledger_id", server_default=""),
    sa.CheckConstraint("id = 1", name="meta_one_row"),
)

agents = sa.Table(
    "agents",
    metadata,
    sa.Column("uid", sa.Text, primary_key=True),
    _text("name"),
    _text("login"),
    sa.Column("owner", sa.Text),
    _text("policy"),
    sa.Column("managed_by", Word(model.ManagedBy), nullable=False),
    sa.Column("state", Word(model.AgentState), nullable=False),
    sa.Column("targets", TARGETS, nullable=False),
    sa.Column("listed", sa.Boolean, nullable=False),
    sa.Column("file", sa.Text),
    sa.CheckConstraint(_one_of("state", model.AgentState), name="agents_state"),
    sa.CheckConstraint(_one_of("managed_by", model.ManagedBy), name="agents_managed_by"),
)
_only_where("agents_one_name", agents, "name", where="state <> 'removed'")
_only_where("agents_one_login", agents, "login", where="state <> 'removed'")

identities = sa.Table(
    "identities",
    metadata,
    sa.Column("identity", sa.Text, primary_key=True),
    _text("agent_uid"),
    _text("target"),
    sa.ForeignKeyConstraint(["agent_uid"], ["agents.uid"], name="identities_agent"),
)
sa.Index("identities_by_agent", identities.c.agent_uid, identities.c.target)

credentials = sa.Table(
    "credentials",
    metadata,
    sa.Column("uid", sa.Text, primary_key=True),
    _text("agent_uid"),
    _text("name"),
    _text("kind"),
    _number("seq"),
    sa.Column("next_rotation_at", Instant),
    sa.Column("sweep_at", Instant),
    sa.Column("wake_at", Instant),
    sa.Column("request", REQUEST),
    _flag("successor_owed"),
    sa.Column("leaving", TARGETS, nullable=False),
    sa.Column("withheld", NAMES, nullable=False),
    sa.Column("drift", DRIFT, nullable=False),
    sa.Column("looks", LOOKS, nullable=False),
    sa.Column("repairs", REPAIRS, nullable=False, server_default="[]"),
    _number("revision"),
    sa.Column("holder", sa.Text),
    sa.Column("holder_writer", sa.Text),
    sa.Column("until", Instant),
    _number("fence", server_default="0"),
    sa.Column("wake_requested", Instant),
    sa.ForeignKeyConstraint(["agent_uid"], ["agents.uid"], name="credentials_agent"),
    sa.UniqueConstraint("agent_uid", "name", name="credentials_one_name"),
    sa.CheckConstraint("(holder IS NULL) = (until IS NULL)", name="credentials_claim"),
    sa.CheckConstraint("seq >= 0 AND revision >= 0 AND fence >= 0", name="credentials_numbers"),
)
sa.Index("credentials_due", credentials.c.wake_at)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("credential_uid"),
    _number("seq"),
    _text("login"),
    sa.Column("state", Word(model.VersionState), nullable=False),
    _text("scheme"),
    _text("digest"),
    sa.Column("tag", sa.LargeBinary),
    _text("origin"),
    _flag("exposed"),
    _number("fence"),
    sa.Column("minted_at", Instant, nullable=False),
    sa.Column("landed_at", Instant),
    sa.Column("promoted_at", Instant),
    sa.Column("deadline", Instant),
    sa.Column("not_after", Instant),
    sa.Column("ended_at", Instant),
    sa.ForeignKeyConstraint(["credential_uid"], ["credentials.uid"], name="versions_credential"),
    sa.UniqueConstraint("credential_uid", "seq", name="versions_one_seq"),
    sa.CheckConstraint(_one_of("state", model.VersionState), name="versions_state"),
    sa.CheckConstraint(
        "deadline IS NULL OR state NOT IN ('pending', 'current')", name="versions_deadline"
    ),
    sa.CheckConstraint(
        "(state IN ('retired', 'revoked')) = (ended_at IS NOT NULL)", name="versions_ended"
    ),
    sa.CheckConstraint("seq >= 1", name="versions_seq"),
)
_only_where("versions_one_current", versions, "credential_uid", where="state = 'current'")
sa.Index("versions_by_login", versions.c.login, versions.c.state)
_only_where("versions_one_pending", versions, "credential_uid", where="state = 'pending'")

rotations = sa.Table(
    "rotations",
    metadata,
    sa.Column("uid", sa.Text, primary_key=True),
    _text("credential_uid"),
    sa.Column("cause", Word(model.Cause), nullable=False),
    sa.Column("state", Word(model.RotationState), nullable=False),
    sa.Column("version_id", sa.Text),
    _number("attempt"),
    sa.Column("targets", TARGETS, nullable=False),
    sa.Column("grace", Span),
    sa.Column("opened_at", Instant, nullable=False),
    sa.Column("waiting", WAITING),
    _text("error_code"),
    _text("error_where"),
    _text("error_detail"),
    sa.Column("closed_at", Instant),
    sa.ForeignKeyConstraint(["credential_uid"], ["credentials.uid"], name="rotations_credential"),
    sa.CheckConstraint(_one_of("state", model.RotationState), name="rotations_state"),
    sa.CheckConstraint(_one_of("cause", model.Cause), name="rotations_cause"),
    sa.CheckConstraint("state <> 'waiting' OR waiting IS NOT NULL", name="rotations_waiting"),
    sa.CheckConstraint(
        "(state IN ('running', 'waiting', 'stalled')) = (closed_at IS NULL)",
        name="rotations_closed",
    ),
)
_only_where(
    "rotations_one_open",
    rotations,
    "credential_uid",
    where="state IN ('running', 'waiting', 'stalled')",
)
sa.Index("rotations_newest", rotations.c.credential_uid, rotations.c.opened_at)

intents = sa.Table(
    "intents",
    metadata,
    sa.Column("uid", sa.Text, primary_key=True),
    _text("credential_uid"),
    _text("version_id"),
    _text("target"),
    sa.Column("effect", Word(model.Effect), nullable=False),
    _text("expected"),
    _text("writer"),
    _number("fence"),
    _number("incarnation"),
    sa.Column("at", Instant, nullable=False),
    sa.Column("outcome", Word(model.Outcome)),
    sa.Column("ended_at", Instant),
    sa.ForeignKeyConstraint(["credential_uid"], ["credentials.uid"], name="intents_credential"),
    sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="intents_version"),
    sa.CheckConstraint(_one_of("effect", model.Effect), name="intents_effect"),
    sa.CheckConstraint(
        f"outcome IS NULL OR {_one_of('outcome', model.Outcome)}", name="intents_outcome"
    ),
    sa.CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name="intents_ended"),
)
sa.Index("intents_by_credential", intents.c.credential_uid, intents.c.outcome)

placements = sa.Table(
    "placements",
    metadata,
    sa.Column("version_id", sa.Text, primary_key=True),
    sa.Column("target", sa.Text, primary_key=True),
    sa.Column("locator", sa.Text, primary_key=True),
    _text("credential_uid"),
    _flag("gone"),
    sa.ForeignKeyConstraint(["version_id"], ["versions.id"], name="placements_version"),
    sa.ForeignKeyConstraint(["credential_uid"], ["credentials.uid"], name="placements_credential"),
)
sa.Index("placements_by_credential", placements.c.credential_uid, placements.c.gone)

chains = sa.Table(
    "chains",
    metadata,
    sa.Column("chain", sa.Text, primary_key=True),
    _number("seq"),
    _text("hash"),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("position", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    _text("chain"),
    _number("seq"),
    sa.Column("at", Instant, nullable=False),
    _text("action"),
    _text("actor"),
    _text("agent"),
    _text("version_id"),
    _text("outcome"),
    sa.Column("detail", DETAIL, nullable=False),
    _text("hash"),
    sa.UniqueConstraint("chain", "seq", name="audit_one_seq"),
)
sa.Index("audit_by_agent", audit.c.agent, audit.c.position)

# What a repeated command returns instead of being done twice; cleaned after a day.
requests = sa.Table(
    "requests",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("credential_uid", sa.Text, primary_key=True),
    _text("digest"),
    sa.Column("at", Instant, nullable=False),
    _text("outcome"),
    sa.ForeignKeyConstraint(["credential_uid"], ["credentials.uid"], name="requests_credential"),
)
sa.Index("requests_by_time", requests.c.at)

daemons = sa.Table(
    "daemons",
    metadata,
    sa.Column("writer", sa.Text, primary_key=True),
    _flag("leads"),
    sa.Column("started_at", Instant, nullable=False),
    sa.Column("until", Instant, nullable=False),
    sa.Column("died_at", Instant),
    # When its clock was last believed: core.timekeeping.
    sa.Column("boot_id", sa.Text),
    sa.Column("boottime", Span),
    sa.Column("wall", Instant),
    sa.Column("knows", sa.Text),  # the schema that its release knows
)
_only_where("daemons_one_leader", daemons, "leads", where="leads")

# Agents for which no verifier can tell: "" for all. A row each goes as it is decided.
quarantine = sa.Table(
    "quarantine",
    metadata,
    sa.Column("agent_uid", sa.Text, primary_key=True),
    _text("reason"),
    sa.Column("since", Instant, nullable=False),
    _text("detail", server_default="{}"),
)

# A webhook by its name: how far it has told, chain by chain, and what it told in sum only.
hooks = sa.Table(
    "hooks",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    _text("receiver"),
    sa.Column("gone_at", Instant),
    _text("summaries"),
    _number("number"),
)
hook_cursors = sa.Table(
    "hook_cursors",
    metadata,
    sa.Column("hook", sa.Text, primary_key=True),
    sa.Column("chain", sa.Text, primary_key=True),
    _number("seq"),
)

# Up to which entry of each audit chain an anchor in the audit has quoted it.
anchored = sa.Table(
    "anchored",
    metadata,
    sa.Column("chain", sa.Text, primary_key=True),
    _number("seq"),
)

# What the daemon logs in with where it replaces that itself, by connection and host (ADR 22).
own_credentials = sa.Table(
    "own_credentials",
    metadata,
    sa.Column("connection", sa.Text, primary_key=True),
    sa.Column("host", sa.Text, primary_key=True),
    _number("revision"),
    sa.Column("rotated_at", Instant),
    sa.Column("problem_code", sa.Text),
    sa.Column("problem_detail", sa.Text),
    sa.Column("problem_since", Instant),
    sa.Column("problem_tries", sa.BigInteger),
    sa.Column("problem_until", Instant),
)

own_versions = sa.Table(
    "own_versions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("connection"),
    _text("host"),
    _number("seq"),
    sa.Column("state", Word(OwnState), nullable=False),
    sa.Column("at", Instant, nullable=False),
    _text("accessor"),
    sa.Column("ends_at", Instant),
    sa.Column("deadline", Instant),
    sa.ForeignKeyConstraint(
        ["connection", "host"],
        ["own_credentials.connection", "own_credentials.host"],
        name="own_versions_credential",
    ),
    sa.CheckConstraint(_one_of("state", OwnState), name="own_versions_state"),
    sa.CheckConstraint(
        "accessor <> '' OR state IN ('minting', 'retired')", name="own_versions_accessor"
    ),
    sa.CheckConstraint(
        "(state = 'previous') = (deadline IS NOT NULL)", name="own_versions_deadline"
    ),
)
_only_where(
    "own_versions_one_current", own_versions, "connection", "host", where="state = 'current'"
)

# Each process that remembers, while it does (PostgreSQL only: `storage.leases`). `incarnation` and
# `epoch` are what it has applied, 0 before that; `renewed_at` is for people, nothing goes by it.
verifiers = sa.Table(
    "verifiers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _text("login"),
    _text("host"),
    _text("release"),
    sa.Column("started_at", Instant, nullable=False),
    sa.Column("lease", Span, nullable=False),
    _number("incarnation"),
    _number("epoch"),
    _number("renewals"),
    sa.Column("renewed_at", Instant, nullable=False),
    sa.CheckConstraint("lease BETWEEN 1 AND 300000000", name="verifiers_lease"),
)
