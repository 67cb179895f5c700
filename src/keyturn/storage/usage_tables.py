"""The tables of what verifiers saw: on PostgreSQL beside the others, on SQLite in a file of their own.

None is part of what a decision is made of, so none moves the epoch; and none grows with what strangers
send: rows are one per version and a ring of minutes and of hours per result.
"""

from __future__ import annotations

import sqlalchemy as sa

from keyturn.storage.tables import Instant

usage_metadata = sa.MetaData()

# A process that counts. `number` is that of its last flush, so that one whose outcome was lost on the
# way is not added again.
usage_sources = sa.Table(
    "usage_sources",
    usage_metadata,
    sa.Column("source", sa.Text, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("flushed_at", Instant, nullable=False),
)

# `hour` is the newest one with a use, counted since 1970; beside its number stands that of the hour
# before it.
usage_versions = sa.Table(
    "usage_versions",
    usage_metadata,
    sa.Column("version_id", sa.Text, primary_key=True),
    sa.Column("first_used_at", Instant, nullable=False),
    sa.Column("last_used_at", Instant, nullable=False),
    sa.Column("uses", sa.BigInteger, nullable=False),
    sa.Column("hour", sa.BigInteger, nullable=False),
    sa.Column("hour_uses", sa.BigInteger, nullable=False),
    sa.Column("hour_before", sa.BigInteger, nullable=False),
)

# How often each answer was given. A slot of a ring is overwritten when its time comes again.
usage_results = sa.Table(
    "usage_results",
    usage_metadata,
    sa.Column("span", sa.Text, primary_key=True),
    sa.Column("result", sa.Text, primary_key=True),
    sa.Column("slot", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.CheckConstraint("span IN ('minute', 'hour', 'day')", name="usage_results_span"),
    sqlite_with_rowid=False,
)

# Ended versions that somebody still presented, with the whole secret.
usage_presented = sa.Table(
    "usage_presented",
    usage_metadata,
    sa.Column("version_id", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("first_at", Instant, nullable=False),
    sa.Column("last_at", Instant, nullable=False),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("told_at", Instant),
    sa.Column("told_number", sa.BigInteger, nullable=False, server_default="0"),
    sa.CheckConstraint("state IN ('retired', 'revoked')", name="usage_presented_state"),
)
