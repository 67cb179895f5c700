"""Somebody who can write the store: changes the audit with more or less skill."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from keyturn.ports import AuditEntry
from keyturn.storage import audit, codec

KINDS = (
    "cut", "rewrite", "swap", "swap-chains", "drop", "insert", "remove", "restore", "rename", "empty",
)  # fmt: skip


class Forger:
    """Manipulates one store's file.

    `skill` 0: the rows alone; 1: hashes and heads as well; 2: also what the anchors in the audit name.
    """

    def __init__(self, path: Path, draw: random.Random, anchored: dict[str, int]) -> None:
        self._path = path
        self._draw = draw
        self._anchored = anchored  # by chain, the last entry that the file of anchors names
        self.skill = draw.randrange(3)

    def act(self, kind: str, older: list[Path]) -> None:
        """Do one manipulation."""
        if kind == "restore":
            shutil.copy(self._draw.choice(older), self._path)
            return
        with closing(sqlite3.connect(self._path)) as self._db:
            getattr(self, "_" + kind.replace("-", "_"))()
            self._db.commit()

    # --- kinds ------------------------------------------------------------------------------

    def _cut(self) -> None:
        chain, seq = self._victim()
        self._run("DELETE FROM audit WHERE chain = ? AND seq >= ?", chain, seq)
        self._mend(chain, always=True)

    def _rewrite(self) -> None:
        chain, seq = self._victim()
        column, value = self._draw.choice(
            [("actor", "mallory"), ("outcome", "fine"), ("at", 1), ("version_id", "v0"),
             ("agent", "other"), ("action", "audited"), ("detail", '[["reason","x"]]')]
        )  # fmt: skip
        self._run(f"UPDATE audit SET {column} = ? WHERE chain = ? AND seq = ?", value, chain, seq)
        self._mend(chain)

    def _swap(self) -> None:
        chain, seq = self._victim(least=2)
        other = self._draw.randrange(1, seq)
        self._exchange((chain, seq), (chain, other))
        self._mend(chain)

    def _swap_chains(self) -> None:
        (one, seq), (two, other) = self._victim(), self._victim()
        if one == two:
            self._rewrite()
            return
        self._exchange((one, seq), (two, other))
        self._mend(one, two)

    def _drop(self) -> None:
        chain, _ = self._victim()
        for table in ("audit", "chains", "anchored"):
            self._run(f"DELETE FROM {table} WHERE chain = ?", chain)
        self._mend(chain)

    def _insert(self) -> None:
        chain, seq = self._victim()
        self._shift(chain, seq, 1)
        # Not the same once more: behind the last entry that is named, that would be one more in a row.
        row = self._row(chain, seq + 1) | {"actor": "mallory"}
        columns = [name for name in row if name != "position"]
        values = [seq if name == "seq" else row[name] for name in columns]
        marks = ", ".join("?" * len(columns))
        self._run(f"INSERT INTO audit ({', '.join(columns)}) VALUES ({marks})", *values)
        self._mend(chain)

    def _remove(self) -> None:
        chain, seq = self._victim()
        self._run("DELETE FROM audit WHERE chain = ? AND seq = ?", chain, seq)
        self._shift(chain, seq + 1, -1)
        self._mend(chain)

    def _rename(self) -> None:
        chain, _ = self._victim()
        new = chain.replace("w", "x", 1)
        for table in ("audit", "chains", "anchored"):
            self._run(f"UPDATE {table} SET chain = ? WHERE chain = ?", new, chain)
        self._mend(new)

    def _empty(self) -> None:
        for table in ("audit", "chains", "anchored"):
            self._run(f"DELETE FROM {table}")

    # --- small things -----------------------------------------------------------------------

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        return self._db.execute(statement, values)

    def _victim(self, least: int = 1) -> tuple[str, int]:
        """Choose an entry that an anchor covers."""
        chains = sorted(chain for chain, seq in self._anchored.items() if seq >= least)
        chain = self._draw.choice(chains)
        return chain, self._draw.randrange(least, self._anchored[chain] + 1)

    def _row(self, chain: str, seq: int) -> dict[str, Any]:
        found = self._run("SELECT * FROM audit WHERE chain = ? AND seq = ?", chain, seq)
        return dict(zip([one[0] for one in found.description], found.fetchone(), strict=True))

    def _exchange(self, one: tuple[str, int], two: tuple[str, int]) -> None:
        rows = self._row(*one), self._row(*two)
        fields = ("at", "action", "actor", "agent", "version_id", "outcome", "detail")
        if all(rows[0][name] == rows[1][name] for name in fields):
            rows[0]["actor"] = "mallory"
        for place, row in ((one, rows[1]), (two, rows[0])):
            sets = ", ".join(f"{name} = ?" for name in fields)
            values = [row[name] for name in fields]
            self._run(f"UPDATE audit SET {sets} WHERE chain = ? AND seq = ?", *values, *place)

    def _shift(self, chain: str, seq: int, by: int) -> None:
        self._run("UPDATE audit SET seq = -(seq + ?) WHERE chain = ? AND seq >= ?", by, chain, seq)
        self._run("UPDATE audit SET seq = -seq WHERE chain = ? AND seq < 0", chain)

    def _mend(self, *chains: str, always: bool = False) -> None:
        """Cover the traces, as far as the skill goes."""
        if self.skill or always:
            for chain in chains:
                self._rehash(chain)
        if self.skill == 2:
            self._requote()

    def _rehash(self, chain: str) -> None:
        head = (0, audit.START)
        for row in self._all("SELECT * FROM audit WHERE chain = ? ORDER BY seq", chain):
            seq = head[0] + 1
            made = audit._hash(head[1], chain, seq, codec.instant(row["at"]), _entry(row))
            self._run(
                "UPDATE audit SET seq = ?, hash = ? WHERE position = ?", seq, made, row["position"]
            )
            head = (seq, made)
        self._run("UPDATE chains SET seq = ?, hash = ? WHERE chain = ?", *head, chain)

    def _requote(self) -> None:
        """Let the anchors in the audit name what is there now."""
        hashes = {(r["chain"], r["seq"]): r["hash"] for r in self._all("SELECT * FROM audit")}
        for chain in {chain for chain, _ in hashes if chain.endswith("/anchor")}:
            for row in self._all("SELECT * FROM audit WHERE chain = ?", chain):
                detail = dict(codec.detail_from(row["detail"]))
                detail["heads"] = [
                    [c, n, hashes[c, n]] for c, n, _ in detail.get("heads", []) if (c, n) in hashes
                ]
                text = codec.detail_text(tuple(sorted(detail.items())))
                self._run("UPDATE audit SET detail = ? WHERE position = ?", text, row["position"])
            self._rehash(chain)

    def _all(self, query: str, *values: Any) -> list[dict[str, Any]]:
        found = self._run(query, *values)
        names = [one[0] for one in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def _entry(row: dict[str, Any]) -> AuditEntry:
    return AuditEntry(
        action=row["action"],
        actor=row["actor"],
        agent=row["agent"],
        version_id=row["version_id"],
        outcome=row["outcome"],
        detail=codec.detail_from(row["detail"]),
    )
