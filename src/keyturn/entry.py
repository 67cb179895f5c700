"""Where every process of ours starts: signals, then the environment, hardening, the command line."""

# SECURITY: this stands before every other import, and it is the C module because `signal` itself
# takes milliseconds. An import of ours takes up to half a second, in which an unhandled USR1
# ("revoke now") or HUP would kill the daemon. Children inherit the block.
import _signal  # type: ignore[import-not-found]

_signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGUSR1, _signal.SIGHUP})

# SECURITY: what libraries take from the environment by themselves. `SSLKEYLOGFILE` would write the
# keys of every TLS session to a file, `OPENSSL_CONF` can load code, the others lead elsewhere or
# trust somebody else. OpenSSL reads its own when it is loaded: so before anything imports `ssl`.
import os  # noqa: E402

from keyturn import ambient  # noqa: E402

_AMBIENT = ("PG", "VAULT_", "BAO_", "OPENSSL_", "SSL_CERT_", "SSLKEYLOGFILE", "NETRC")
_AMBIENT_SDKS = ("AWS_", "BOTO_", "AZURE_", "MSI_", "IDENTITY_", "IMDS_", "ARM_")
_AMBIENT_ENDS = ("_PROXY", "_CA_BUNDLE")
ambient.kept.update({name: os.environ[name] for name in ambient.CONTAINER if name in os.environ})
for _name in tuple(os.environ):
    if _name.upper().startswith(_AMBIENT + _AMBIENT_SDKS) or _name.upper().endswith(_AMBIENT_ENDS):
        del os.environ[_name]

import sys  # noqa: E402

_PR_SET_DUMPABLE = 4  # prctl(2)


def harden() -> None:
    """Leave no core file and let no process of the same uid read our memory (I2)."""
    import ctypes
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the memory of this process cannot be closed to others")


def main() -> None:
    """Run the command line and end the process with its exit code."""
    harden()
    from keyturn.cli.main import main as command_line

    sys.exit(command_line())


if __name__ == "__main__":
    main()
