"""The sections of the configuration file, as models.

The forms and descriptions here are the configuration reference, and the texts of errors.
"""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BeforeValidator, Field, model_validator

from keyturn.config.shape import Section
from keyturn.core.duration import FORM as DURATION_FORM
from keyturn.core.duration import parse_duration
from keyturn.core.walltime import WINDOW_FORM, ZONE_FORM, parse_window, zone_of
from keyturn.credential_file import CREDENTIAL_FORM, credential_path
from keyturn.destinations.base import Form

CRON_FORM = 'a crontab line of five fields such as "0 3 * * tue"'
ID_FORM = "an id of a-z 0-9 . _ - (63 at most, a letter or digit first, no ..)"
ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_PATH = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*", re.ASCII)
WORDS_FORM = "a text of 1 to 128 characters"
LOGIN_FORM = "1 to 128 printable ASCII characters without colon and space"
_LOGIN = re.compile(r"[!-9;-~]{1,128}", re.ASCII)  # printable ASCII but colon and space
_WORDS = re.compile(r"[^\x00-\x1f\x7f]{1,128}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_CRON = re.compile(r"[0-9*,/-]+( +[0-9*,/-]+){2}( +[0-9A-Za-z*,/-]+){2}", re.ASCII)
_PERCENT = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,3})?)%", re.ASCII)
_FOLDER = re.compile(r"/[A-Za-z0-9_./-]*", re.ASCII)  # no comma: that would be one more host
_NETLOC = re.compile(
    r"([A-Za-z0-9_.~%-]+@)?(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]*)(:[0-9]{1,5})?", re.ASCII
)
_STORE_KEYS = {
    "host": _FOLDER,
    "sslmode": re.compile(r"disable|allow|prefer|require|verify-ca|verify-full"),
    "sslrootcert": re.compile(rf"system|{_FOLDER.pattern}", re.ASCII),
    "sslcert": _FOLDER,
    "sslkey": _FOLDER,
}
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,30}", re.ASCII)  # a part of a name in SQL, never quoted
_LOCAL_HOSTS = {None, "", "localhost", "127.0.0.1", "::1"}
_WEBHOOK = re.compile(r"https?://[!-~]{1,1000}", re.ASCII)


def is_id(text: str) -> bool:
    """Tell whether a text can name an agent, a connection or a policy."""
    return ID.fullmatch(text) is not None and ".." not in text


def is_login(text: str) -> bool:
    """Tell whether a text can be what an agent presents as its name."""
    return _LOGIN.fullmatch(text) is not None


def is_words(text: str) -> bool:
    """Tell whether a text can be shown to people."""
    return _WORDS.fullmatch(text) is not None


def matches(pattern: re.Pattern[str], value: object) -> object:
    """Refuse a text of another form; what is no text is refused by its type."""
    if isinstance(value, str) and not pattern.fullmatch(value):
        raise ValueError
    return value


def _matching(pattern: re.Pattern[str]) -> BeforeValidator:
    return BeforeValidator(partial(matches, pattern))  # the schema reads the pattern there


def _duration(value: object) -> timedelta:
    if isinstance(value, timedelta):  # a default; a file never gives one
        return value
    if not isinstance(value, str):
        raise ValueError  # noqa: TRY004  # pydantic turns only a ValueError into a problem
    return parse_duration(value)


def _positive(value: object) -> timedelta:
    if (found := _duration(value)) <= timedelta(0):
        raise ValueError
    return found


def read_interval(value: object) -> timedelta | None:
    """Read a duration, or `manual`."""
    return None if value == "manual" else _positive(value)


def required_path(value: object) -> Path:
    """Read an absolute path. Raises ValueError."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError
    return Path(value)


def _store_url(value: object) -> object:
    parts = urlsplit(str(value))
    if parts.scheme == "sqlite":
        good = not parts.netloc and parts.path.startswith("//") and not parts.query
    else:
        local = parts.hostname in _LOCAL_HOSTS
        asked = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        query = dict(asked)
        good = (
            parts.scheme == "postgresql"
            # No password: this text gets into logs and process lists. One host: `h:1,other:2` is two.
            and _NETLOC.fullmatch(parts.netloc) is not None
            and not parts.fragment
            # SECURITY: libpq takes some forty keys there, and the last one of two: another host, a
            # password, a file with all of these. Whatever is not on this list is refused.
            and len(query) == len(asked)
            and all(key in _STORE_KEYS and _STORE_KEYS[key].fullmatch(query[key]) for key in query)
            and ("host" not in query or parts.hostname is None)
            and (local or query.get("sslmode") == "verify-full")
        )
    if not good:
        raise ValueError
    return value


def _zone(value: object) -> object:
    zone_of(str(value))
    return value


def _window(value: object) -> object:
    parse_window(str(value))
    return value


def _percent(value: object) -> float:
    found = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError
    return float(found[1]) / 100


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError  # noqa: TRY004  # pydantic turns only a ValueError into a problem
    return value


def _groups(value: object) -> object:
    if isinstance(value, dict) and not all(_GROUP.fullmatch(str(name)) for name in value):
        raise ValueError
    return value


def _id(value: object) -> object:
    if not isinstance(value, str) or not is_id(value):
        raise ValueError
    return value


def _webhook(value: object) -> object:
    parts = urlsplit(value) if isinstance(value, str) and _WEBHOOK.fullmatch(value) else None
    if parts is None or not parts.hostname or "@" in parts.netloc or "#" in str(value):
        raise ValueError
    if not (parts.scheme == "https" or parts.hostname in _LOCAL_HOSTS) or parts.port == 0:
        raise ValueError
    return value


Duration = Annotated[timedelta, BeforeValidator(_positive), Form(DURATION_FORM)]
AnyDuration = Annotated[timedelta, BeforeValidator(_duration), Form(f"{DURATION_FORM}, or 0s")]
File = Annotated[Path | None, BeforeValidator(required_path), Form("an absolute path")]
CredentialFile = Annotated[Path | None, BeforeValidator(credential_path), Form(CREDENTIAL_FORM)]
Id = Annotated[str, BeforeValidator(_id), Form(ID_FORM)]
Group = Annotated[str | None, _matching(_NAME), Form("the name of a unix group")]
KeyName = Annotated[str, _matching(_NAME), Form("a key of A-Z a-z 0-9 . _ -, each one once")]
Flag = Annotated[bool, Form("true or false")]


Scheme = Literal["argon2id", "hmac-sha256"]


class ReaderSection(Section):
    """One group of foreign verifiers: `store.readers`, by name."""

    agents: Annotated[
        list[Id],
        Field(min_length=1, description="whose accepted hashes its view shows"),
        Form("a list of agents' ids, one at least"),
    ]


class StoreSettings(Section):
    """Where Keyturn keeps hashes, states, journal and audit."""

    rule: ClassVar[str] = "readers with PostgreSQL only"

    url: Annotated[
        str,
        BeforeValidator(_store_url),
        Form(
            "sqlite:////absolute/path or postgresql://user@host/name without a password in it, and "
            "with sslmode=verify-full where the host is another one (beside it only host=/folder, "
            "sslrootcert, sslcert and sslkey may stand there)"
        ),
        Field(description="the database"),
    ] = "sqlite:////var/lib/keyturn/keyturn.db"
    password_file: Annotated[CredentialFile, Field(description="file that holds the password")] = (
        None
    )
    state_dir: Annotated[
        File,
        Field(
            description="spool and ledger; default: the folder of the database, or /var/lib/keyturn"
        ),
    ] = None

    readers: Annotated[
        dict[str, ReaderSection],
        BeforeValidator(_groups),
        Form("a mapping of groups (a-z 0-9 _, a letter first, 31 at most) to {agents: […]}"),
        Field(description="services in other languages that verify against a view (PostgreSQL)"),
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _readers_fit(self) -> StoreSettings:
        if self.readers and self.url.startswith("sqlite:"):
            raise ValueError
        return self

    @property
    def read_by(self) -> dict[str, list[str]]:
        """The agents of each group of foreign verifiers."""
        return {group: reader.agents for group, reader in self.readers.items()}

    @property
    def folder(self) -> Path:
        """The state folder, given or by default."""
        if self.state_dir is not None:
            return self.state_dir
        if self.url.startswith("sqlite:"):
            return Path("/" + urlsplit(self.url).path.lstrip("/")).parent
        return Path("/var/lib/keyturn")


class LogSettings(Section):
    """What the daemon writes to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], Form("debug, info, warning or error")
    ] = "info"
    format: Annotated[
        Literal["auto", "json", "text"],
        Form("auto, json or text"),
        Field(description="auto: text on a terminal, else JSON"),
    ] = "auto"


class GroupSettings(Section):
    """The unix groups that have a role on the admin socket. Root and the daemon's uid have all."""

    view: Annotated[Group, Field(description="may read status and audit")] = None
    respond: Annotated[
        Group, Field(description="may also rotate, suspend, resume, revoke and retry")
    ] = None
    admin: Annotated[Group, Field(description="may also add agents, abandon and force")] = None


class AdminSettings(Section):
    """The admin socket."""

    socket: Annotated[
        Path,
        BeforeValidator(required_path),
        Form("an absolute path"),
        Field(description="where commands reach the daemon"),
    ] = Path("/run/keyturn/admin.sock")
    groups: Annotated[GroupSettings, Form("a mapping")] = GroupSettings()


class ReloadSettings(Section):
    """When the files are read again without being asked."""

    on_change: Annotated[
        Flag,
        Field(
            description="read them again once they have changed and were still for two seconds, "
            "also by the swap of a link, as a ConfigMap's"
        ),
    ] = False


class RetrySection(Section):
    """How retryable errors of destinations are met."""

    first: Annotated[Duration, Field(description="first wait; it doubles")] = timedelta(seconds=2)
    max: Annotated[Duration, Field(description="longest wait")] = timedelta(minutes=15)
    settle_after: Annotated[
        Duration, Field(description="when a call without an answer can no longer land")
    ] = timedelta(minutes=5)


class MaxAge(Section):
    """A maximum age with its mode."""

    after: Duration
    mode: Annotated[Literal["alert", "enforce"], Form("alert or enforce")] = "alert"


def _grace(value: object) -> timedelta:
    return _positive(value)


def _max_age(value: object) -> MaxAge | None:
    if value == "none":
        return None
    return MaxAge.model_validate(value if isinstance(value, dict) else {"after": value})


class PolicySection(Section):
    """When credentials rotate and how long old versions live: `policies`, by name."""

    rule: ClassVar[str] = "`every` or `cron`, not both"

    extends: Annotated[
        str | None,
        Form("the name of a policy"),
        Field(description="policy whose values this one starts from"),
    ] = None
    every: Annotated[
        timedelta | None,
        BeforeValidator(read_interval),
        Form(f"{DURATION_FORM}, or manual"),
        Field(description="interval; manual: only people rotate"),
    ] = timedelta(days=30)
    cron: Annotated[
        str | None,
        _matching(_CRON),
        Form(CRON_FORM),
        Field(description="slots in the zone instead of an interval; 0 and 7 are Sunday"),
    ] = None
    zone: Annotated[
        str,
        BeforeValidator(_zone),
        Form(ZONE_FORM),
        Field(description="zone of cron and window"),
    ] = "UTC"
    window: Annotated[
        str | None,
        BeforeValidator(_window),
        Form(WINDOW_FORM),
        Field(description="rotations start inside it only"),
    ] = None
    jitter: Annotated[
        float,
        BeforeValidator(_percent),
        Form("a share below 100% such as 10%"),
        Field(
            description="share of `every`, early only, fixed for each credential; none with cron"
        ),
    ] = 0.1
    grace: Annotated[
        timedelta | None,
        BeforeValidator(_grace),
        Form(f"{DURATION_FORM} (adaptive grace is not available yet)"),
        Field(
            description="how long the previous version stays accepted; default: the longer of 48h "
            "and twice consumer_cache"
        ),
    ] = None
    consumer_cache: Annotated[
        AnyDuration, Field(description="how long an agent may keep what it read")
    ] = timedelta(hours=24)
    max_age: Annotated[
        MaxAge | None,
        BeforeValidator(_max_age),
        Form("a duration such as 90d, {after: 90d, mode: enforce}, or none"),
        Field(description="oldest age of a version; mode alert (default) or enforce"),
    ] = MaxAge(after=timedelta(days=90))
    first_rotation: Annotated[
        Literal["after-first-use", "next-slot", "now"],
        Form("after-first-use, next-slot or now"),
        Field(description="when an imported credential rotates first"),
    ] = "after-first-use"
    retry: Annotated[RetrySection, Form("a mapping")] = RetrySection()
    retire: Annotated[
        Literal["leave", "disable", "destroy"],
        Form("leave, disable or destroy"),
        Field(description="what happens to old copies at destinations"),
    ] = "disable"
    scheme: Annotated[
        Scheme,
        Form("argon2id or hmac-sha256"),
        Field(
            description="how the store keeps secrets that are minted from now on; hmac-sha256 needs"
            " `verifier.key`"
        ),
    ] = "argon2id"

    @model_validator(mode="before")
    @classmethod
    def _one_schedule(cls, data: Any) -> Any:
        if isinstance(data, dict) and "every" in data and "cron" in data:
            raise ValueError
        return data


class KeysSection(Section):
    """The names under which an entry holds the three parts."""

    rule: ClassVar[str] = "three different keys"

    id: KeyName = "id"
    secret: KeyName = "secret"  # noqa: S105  # the name of a key
    version: KeyName = "version"

    @model_validator(mode="after")
    def _different(self) -> KeysSection:
        if len({self.id, self.secret, self.version}) != 3:
            raise ValueError
        return self


class TargetSection(Section):
    """One place where the agent reads."""

    to: Annotated[str, Form("the name of a connection"), Field(description="connection")]
    path: Annotated[
        str,
        _matching(_PATH),
        Form("a relative path of segments of A-Z a-z 0-9 . _ - without . and .."),
        Field(description="place under the connection's prefix"),
    ]
    keys: Annotated[
        KeysSection, Form("a mapping of id, secret and version to three different keys")
    ] = KeysSection()
    merge: Annotated[Flag, Field(description="keep keys of others in the entry")] = False
    adopt: Annotated[Flag, Field(description="take over an entry that exists")] = False


class AgentSection(Section):
    """A workload that holds a credential: `agents`, by id."""

    login: Annotated[
        str | None,
        _matching(_LOGIN),
        Form(LOGIN_FORM),
        Field(description="what it presents; default: the id"),
    ] = None
    owner: Annotated[
        str | None,
        _matching(_WORDS),
        Form(WORDS_FORM),
        Field(description="team"),
    ] = None
    policy: Annotated[str, Form("the name of a policy")] = "default"
    destinations: Annotated[
        list[TargetSection], Field(min_length=1), Form("a list of {to, path}, one at least")
    ]


Told = Literal["promoted", "stalled", "revoked", "incident"]


def _all_but_promoted() -> list[Told]:
    return ["stalled", "revoked", "incident"]


class HookSection(Section):
    """A receiver of signed webhooks (docs/howto/webhooks.md)."""

    name: Annotated[Id | None, Form(ID_FORM), Field(description="default: the host")] = None
    webhook: Annotated[
        str,
        BeforeValidator(_webhook),
        Form("https://host[:port]/path (http on loopback only), without login and #"),
        Field(description="where it is sent; redirects are not followed"),
    ]
    key_file: Annotated[
        Path,
        BeforeValidator(required_path),
        Form("an absolute path"),
        Field(description="file with the signing key `whsec_…`; two lines while it changes"),
    ]
    ca_file: Annotated[
        File, Field(description="authority to trust; default: those of the platform")
    ] = None
    on: Annotated[
        list[Told],
        Field(min_length=1, description="what is told"),
        Form("a list of promoted, stalled, revoked and incident (laggard is not available yet)"),
    ] = Field(default_factory=_all_but_promoted)

    @property
    def label(self) -> str:
        """The name, given or by default."""
        return self.name or (urlsplit(self.webhook).hostname or "")


class AuditSettings(Section):
    """The record of who did what."""

    anchor_file: Annotated[
        File,
        Field(description="file that anchors are appended to; keep copies of it elsewhere"),
    ] = None


MAIN_ONLY = (  # keys with a section of their own that files of agents never have
    "store",
    "log",
    "verifier",
    "admin",
    "audit",
    "listen",
    "reload",
    "connections",
    "policies",
)


class TopSection(Section):
    """The other keys of the main file."""

    beside = (*MAIN_ONLY, "agents")

    version: Annotated[
        Literal[1],
        BeforeValidator(_number),  # to Python `true` is 1
        Form("1"),
        Field(description="version of this format"),
    ]
    revocations_file: Annotated[
        File, Field(description="file of revocations; polled, and read at SIGUSR1")
    ] = None
    revocations: Annotated[
        list[str],
        Form("a list of lines as in the revocations file"),
        Field(description="the same lines here"),
    ] = Field(default_factory=list)
    include: Annotated[
        str | None,
        Form("a file pattern such as /etc/keyturn/agents.d/*.yaml"),
        Field(description="more files, with agents only"),
    ] = None
    notify: Annotated[
        list[HookSection],
        Form("a list of {webhook, key_file}, 16 at most"),
        Field(max_length=16, description="receivers of webhooks"),
    ] = Field(default_factory=list)
