"""Which role may ask the socket for what, as security.md has it."""

from __future__ import annotations

from typing import Any, cast

from keyturn.daemon.commands import Commands
from keyturn.daemon.peer import Role

ROLES = {
    Role.VIEW: {
        "status",
        "status.own",
        "names",
        "agents.list",
        "agents.show",
        "identify",
        "audit",
        "metrics",
        "health",
        "report",
        "clock",
        "store.status",
    },
    Role.RESPOND: {"rotate", "suspend", "resume", "revoke", "rotation.retry"},
    Role.ADMIN: {
        "agents.add",
        "agents.remove",
        "destinations.forget",
        "clock.trust",
        "store.release",
        "rotate.forced",
        "rotation.abandon",
        "reload",
        "reload.rehearsed",
    },
}


def test_each_command_needs_the_role_that_the_rules_name() -> None:
    """Whoever may only look changes nothing, and whoever responds cuts no agent off by force."""
    table = Commands(cast("Any", None)).table()
    found = {
        role: {name for name, command in table.items() if command.role is role} for role in ROLES
    }
    assert found == ROLES


def test_force_is_no_argument_of_the_small_role() -> None:
    """`rotate` stays what it is whatever a caller writes into its arguments."""
    asked: list[bool] = []

    class Noting(Commands):
        """Notes what would be done."""

        def _rotate(self, args: Any, peer: Any, progress: Any) -> Any:
            del peer, progress
            asked.append(args["force"])

    commands = Noting(cast("Any", None))
    commands.rotate({"agents": [], "force": True}, cast("Any", None), cast("Any", None))
    commands.rotate_forced({"agents": []}, cast("Any", None), cast("Any", None))
    assert asked == [False, True]
