"""Where every process of ours starts: signals first, then hardening, then the command line."""

# SECURITY: this stands before every other import, and it is the C module because `signal` itself
# takes milliseconds. An import of ours takes up to half a second, in which an unhandled USR1
# ("revoke now") or HUP would kill the daemon. Children inherit the block.
import _signal  # type: ignore[import-not-found]

_signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGUSR1, _signal.SIGHUP})

import sys  # noqa: E402

_PR_SET_DUMPABLE = 4  # prctl(2)


def harden() -> None:
    """Leave no core file and let no process of the same uid read our memory (I2)."""
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    harden()
    from keyturn.cli.main import main as command_line

    sys.exit(command_line())


if __name__ == "__main__":
    main()
