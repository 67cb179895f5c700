"""OpenBao by its Kubernetes login, against a TokenReview over TLS: the contract, and what is refused."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hvac.exceptions import VaultError
from pydantic import ValidationError

from keyturn.destinations.vault import VaultDestination
from keyturn.destinations.vault_auth import SERVICE_ACCOUNT, AuthOptions, Kubernetes
from keyturn.errors import Denied, DestinationUnavailable
from keyturn.testing import openbao
from keyturn.testing.contract import PLACE, new_entry
from keyturn.testing.kubernetes import PATH, ApiServer, api_server
from keyturn.testing.wire import Answer, Call
from support.vault import (
    AUDIENCE,
    ByPolicyContract,
    Root,
    connect,
    kubernetes,
    new_prefix,
    printed_policy,
    project,
    root_of,
    sibling_of,
)

MOUNT = "kv"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openbao.Server]:
    """Give one server for all tests; each has a role and a prefix of its own."""
    with openbao.dev_server(tmp_path_factory.mktemp("openbao")) as one:
        yield one


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Give one Kubernetes cluster for all tests."""
    with api_server(tmp_path_factory.mktemp("kubernetes")) as one:
        yield one


class TestVaultByKubernetes(ByPolicyContract):
    """By the service account of a pod, with the printed policy to the letter."""

    @pytest.fixture
    def destination(
        self, server: openbao.Server, cluster: ApiServer, tmp_path: Path
    ) -> Iterator[VaultDestination]:
        self.root, self.server, self.cluster = root_of(server), server, cluster
        one = self.by_policy(server.address, tmp_path, mount=MOUNT)
        yield one
        one.close()

    def login(self, folder: Path, *, uses: int) -> AuthOptions:
        policy = printed_policy(self.mount, self.prefix, [])
        return kubernetes(
            self.root, folder, self.cluster, self.role, policy=policy, token_num_uses=uses
        )

    def sibling(self, destination: Any) -> VaultDestination:
        auth = AuthOptions(method="token", token_file=str(self.server.token_file))
        return sibling_of(destination, self.server.address, auth)


class Scene:
    """One role and one entry, and connections to it."""

    def __init__(self, server: openbao.Server, cluster: ApiServer, folder: Path) -> None:
        self.server, self.cluster, self.folder = server, cluster, folder
        self.root: Root = root_of(server)
        self.name = new_prefix()
        self.opened: list[VaultDestination] = []

    def connect(self, **role: Any) -> VaultDestination:
        """Make a role, a token and a connection."""
        policy = printed_policy(MOUNT, self.name, [PLACE])
        self.auth = kubernetes(
            self.root, self.folder, self.cluster, self.name, policy=policy, **role
        )
        self.opened.append(connect(self.server.address, self.auth, prefix=self.name, mount=MOUNT))
        return self.opened[-1]

    def project(self, token: str | None = None, **more: Any) -> None:
        """Replace the token that is projected, with one of the same account unless told."""
        account = self.cluster._accounts[f"system:serviceaccount:prod:{self.name}"]
        fresh = self.cluster.token(account, **{"audiences": [AUDIENCE], **more})
        project(Path(str(self.auth.token_file)), fresh if token is None else token)

    def revoke(self, destination: VaultDestination) -> None:
        """Let the server forget the connection's token: it must log in again."""
        token = destination._login._client.token
        self.root("POST", "auth/token/revoke", {"token": token})


@pytest.fixture
def scene(server: openbao.Server, cluster: ApiServer, tmp_path: Path) -> Iterator[Scene]:
    """Give a place for one entry."""
    one = Scene(server, cluster, tmp_path)
    yield one
    for destination in one.opened:
        destination.close()


def move(destination: VaultDestination, seed: int) -> None:
    """Publish one version as the saga does."""
    token = destination.observe(PLACE).token
    destination.activate(PLACE, new_entry(seed), expected=token)


# --- the life of a login --------------------------------------------------------------------


def test_a_login_outlives_its_tokens(scene: Scene) -> None:
    """Tokens of two seconds, and a service account token that ends and is replaced: work goes on.

    Each login sends the token that was projected last.
    """
    destination = scene.connect(ttl="1s", token_max_ttl="2s")
    scene.project(life=timedelta(seconds=2))
    before = len(scene.cluster.reviews)
    for seed in range(1, 9):
        move(destination, seed)
        time.sleep(0.6)
        scene.project(life=timedelta(seconds=2))

    assert destination.observe(PLACE).token == "8"
    asked = scene.cluster.reviews[before:]
    assert len({one["token"] for one in asked}) == len(asked) >= 2
    assert all(one.get("authenticated") for one in asked)
    assert "logged in by kubernetes" in destination.probe()


def due(destination: VaultDestination) -> str:
    """Let two thirds of the token's life be over; returns the token."""
    login = destination._login
    login._renew_at = time.monotonic()
    return str(login._client.token)


def test_a_token_is_renewed_at_two_thirds_of_its_life(scene: Scene) -> None:
    """Then it is the same token for as long as before."""
    destination = scene.connect(token_max_ttl="1h")
    move(destination, 1)
    assert 35 < destination._login._renew_at - time.monotonic() <= 40
    token = due(destination)
    destination._login._ends_at = None
    move(destination, 2)

    assert destination._login._client.token == token
    assert destination.login_ends_in is not None
    assert timedelta(seconds=50) < destination.login_ends_in <= timedelta(seconds=60)


def test_a_token_whose_service_account_token_has_ended_is_replaced(scene: Scene) -> None:
    """OpenBao reviews at each renewal what the login was made with: then a new login is made."""
    destination = scene.connect()
    scene.project(life=timedelta(seconds=1))
    move(destination, 1)
    time.sleep(1.1)
    scene.project()
    token = due(destination)
    move(destination, 2)

    assert destination._login._client.token != token
    assert scene.cluster.reviews[-2].get("error")
    assert scene.cluster.reviews[-1]["authenticated"]


def test_a_token_that_lives_is_used_while_the_cluster_is_away(scene: Scene) -> None:
    """Neither renewed nor replaced, it is good until it ends; then that is waited out."""
    destination = scene.connect()
    move(destination, 1)
    token = due(destination)
    with scene.cluster.away():
        move(destination, 2)
        assert destination._login._client.token == token
        assert 4 < destination._login._renew_at - time.monotonic() <= 5
        due(destination)
        destination._login._ends_at = time.monotonic()
        with pytest.raises(DestinationUnavailable, match="does not confirm"):
            destination.observe(PLACE)
    move(destination, 3)

    assert destination._login._client.token != token


def test_the_token_is_revoked_at_close(scene: Scene) -> None:
    """What the login brought is worth nothing after the end."""
    destination = scene.connect()
    move(destination, 1)
    token = destination._login._client.token
    assert scene.root("POST", "auth/token/lookup", {"token": token})["data"]["display_name"]
    destination.close()

    with pytest.raises(OSError, match="403"):
        scene.root("POST", "auth/token/lookup", {"token": token})


# --- what is refused ------------------------------------------------------------------------


def _of_another(scene: Scene) -> None:
    scene.project(scene.cluster.token(scene.cluster.account("prod", "x"), audiences=[AUDIENCE]))


def _forged(scene: Scene) -> None:
    good = Path(str(scene.auth.token_file)).read_text()
    scene.project(f"{good.rpartition('.')[0]}.{'A' * 86}")


WRONG: dict[str, Callable[[Scene], None]] = {
    "audience": lambda scene: scene.project(audiences=["https://elsewhere"]),
    "ended": lambda scene: scene.project(life=timedelta(hours=-1)),
    "just ended": lambda scene: scene.project(life=timedelta(seconds=-2)),
    "account": _of_another,
    "forged": _forged,
    "garbage": lambda scene: scene.project("canary.e30.canary"),
    "role": lambda scene: scene.root("DELETE", f"auth/kubernetes/role/{scene.name}"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_login_that_is_wrong_is_denied_with_what_to_check(scene: Scene, wrong: str) -> None:
    """A wrong token or role needs a person: the hint names role, file and audience, never the token."""
    destination = scene.connect()
    WRONG[wrong](scene)
    sent = Path(str(scene.auth.token_file)).read_text()

    for attempt in (lambda: destination.observe(PLACE), destination.probe):
        with pytest.raises(Denied, match="Kubernetes login is refused") as caught:
            attempt()
        hint = caught.value.hint
        for part in (f"auth/kubernetes/role/{scene.name}", str(scene.auth.token_file), "audience"):
            assert part in hint
        assert ("has run out" in str(caught.value)) == (wrong in WITHOUT_LIFE)
        assert not sent or sent not in f"{caught.value} {hint}"


WITHOUT_LIFE = {"ended", "just ended", "garbage"}


def test_an_empty_token_file_is_named_so(scene: Scene) -> None:
    """Nothing is asked of the server with no token at all."""
    destination = scene.connect()
    scene.project("")
    with pytest.raises(Denied, match="is empty"):
        destination.observe(PLACE)


@pytest.mark.parametrize("wrong", ["audience", "ended", "just ended", "account", "role"])
def test_what_goes_wrong_later_is_denied_as_well(scene: Scene, wrong: str) -> None:
    """Where the server says what is wrong, or our token has ended, waiting would not help."""
    destination = scene.connect()
    move(destination, 1)
    WRONG[wrong](scene)
    scene.revoke(destination)

    with pytest.raises(Denied, match="Kubernetes login is refused"):
        destination.observe(PLACE)


def test_a_cluster_that_cannot_be_asked_is_waited_out(scene: Scene) -> None:
    """OpenBao says 403 where its TokenReview does not answer: retryable for a login that has worked.

    The first login of all is denied, with a hint that names the review: nothing tells it apart from
    a token of a wrong cluster.
    """
    destination = scene.connect()
    with scene.cluster.away():
        with pytest.raises(Denied) as first:
            destination.observe(PLACE)
        assert "may review tokens" in first.value.hint
    move(destination, 1)
    token = destination.observe(PLACE).token
    scene.revoke(destination)
    with scene.cluster.away():
        for attempt in (
            lambda: destination.observe(PLACE),
            lambda: destination.activate(PLACE, new_entry(2), expected=token),
        ):
            with pytest.raises(DestinationUnavailable, match="does not confirm") as caught:
                attempt()
            assert (caught.value.retryable, caught.value.sent) == (True, False)
            assert "auth/kubernetes/config" in caught.value.hint

    assert destination.activate(PLACE, new_entry(2), expected=token) == "2"


@pytest.mark.parametrize(
    ("mode", "good"),
    [(0o600, True), (0o640, True), (0o644, True), (0o444, True), (0o646, False), (0o664, False)],
)
def test_anybody_may_read_a_projected_token_and_nobody_write_it(
    scene: Scene, mode: int, good: bool
) -> None:
    """Kubelet projects it 0644, 0640 or 0600; one that others may write is refused."""
    destination = scene.connect()
    Path(str(scene.auth.token_file)).chmod(mode)

    if good:
        assert destination.observe(PLACE).exists is False
    else:
        with pytest.raises(Denied, match="open to other users"):
            destination.observe(PLACE)


def test_a_token_that_is_not_projected_is_named_by_its_file(scene: Scene) -> None:
    """Outside of a pod the message says which file is missing."""
    destination = scene.connect()
    Path(str(scene.auth.token_file)).unlink()

    with pytest.raises(Denied, match="service-account cannot be read"):
        destination.observe(PLACE)


@pytest.mark.parametrize(
    ("status", "text", "waits"),
    [
        (403, "permission denied", True),
        (403, "1 error occurred:\n\t* permission denied\n\n", True),
        (403, "service account name not authorized", False),
        (400, "permission denied", False),
    ],
)
def test_a_no_without_a_reason_is_known_in_both_forms(
    cluster: ApiServer, tmp_path: Path, status: int, text: str, waits: bool
) -> None:
    """Vault wraps the words that OpenBao says alone; a reason, or another status, is no outage."""
    path = tmp_path / "token"
    project(path, cluster.token(cluster.account("prod", "x")))
    method = Kubernetes(AuthOptions(method="kubernetes", role="k", token_file=str(path)), "bao")
    error = VaultError.from_status(status, "refused", errors=[text])
    assert set(method.credentials(lambda *_: None)) == {"role", "jwt"}

    assert isinstance(method.refusal(error, worked=True), DestinationUnavailable) is waits
    assert isinstance(method.refusal(error, worked=False), Denied)


# --- options --------------------------------------------------------------------------------


def test_a_role_is_all_that_is_needed() -> None:
    """File and mount have the defaults that every pod and every server has."""
    auth = AuthOptions(method="kubernetes", role="keyturn")

    assert auth.place == "kubernetes"
    assert str(SERVICE_ACCOUNT) == "/var/run/secrets/kubernetes.io/serviceaccount/token"
    assert AuthOptions(method="kubernetes", role="k", mount="/k8s/eu/").place == "k8s/eu"


@pytest.mark.parametrize(
    "options",
    [
        {"method": "kubernetes"},
        {"method": "kubernetes", "role": ""},
        {"method": "kubernetes", "role": "k", "role_id": "x"},
        {"method": "kubernetes", "role": "k", "wrapped": True},
        {"method": "kubernetes", "role": "k", "token_file": "relative"},
        {"method": "kubernetes", "role": "k", "mount": "../sys"},
        {"method": "kubernetes", "role": "k", "mount": "a%2fb"},
        {"method": "approle", "role_id": "x", "secret_id_file": "/x", "role": "k/../x"},
        {"method": "token", "token_file": "/x", "mount": "kubernetes"},
    ],
)
def test_what_does_not_belong_to_a_method_is_refused(options: dict[str, Any]) -> None:
    """An option of another method would be ignored, and a person would think that it holds."""
    with pytest.raises(ValidationError):
        AuthOptions.model_validate(options)


# --- the stand-in ---------------------------------------------------------------------------


def test_the_stand_in_asks_who_asks(cluster: ApiServer) -> None:
    """As at a real API server the reviewer needs a token of his own, and the right to review."""
    other = cluster.account("prod", "nobody")
    good = json.dumps({"spec": {"token": cluster.token(other)}}).encode()

    def asked(bearer: str) -> Answer:
        headers = {"authorization": f"Bearer {bearer}"}
        return cluster.answer(Call(method="POST", target=PATH, headers=headers, body=good))

    assert PATH.endswith("/tokenreviews")
    assert asked("").status == 401
    assert asked(cluster.token(other)).status == 403
    answer = asked(cluster.reviewer)
    assert answer.status == 201
    assert json.loads(answer.body)["status"]["user"]["username"] == other.username


def test_the_stand_in_takes_no_token_for_another(cluster: ApiServer) -> None:
    """Audience, expiry, signature and the account's uid decide, each alone."""
    account = cluster.account("prod", "one")
    good = cluster.token(account, audiences=["x", "y"])
    head, claims, signature = good.split(".")
    changed = json.loads(base64.urlsafe_b64decode(claims + "=="))
    changed["aud"] = ["z"]
    forged = base64.urlsafe_b64encode(json.dumps(changed).encode()).rstrip(b"=").decode()

    assert cluster.review(good, ["y", "z"])["audiences"] == ["y"]
    for token, audiences in (
        (good, ["z"]),
        (good, []),
        (f"{head}.{forged}.{signature}", ["z"]),
        (cluster.token(account, audiences=["x"], life=timedelta(seconds=-1)), ["x"]),
    ):
        assert "authenticated" not in cluster.review(token, audiences)
    cluster.account("prod", "one")
    assert "authenticated" not in cluster.review(good, ["x"])
