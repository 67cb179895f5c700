"""What holds between the key ring, the policies and the store; nothing is read from a key's file here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from keyturn.config.file import Document, Problem, did_you_mean
from keyturn.config.models import StoreSettings
from keyturn.config.settings import AgentDefinition
from keyturn.config.verifying import VerifierSection
from keyturn.core.model import Policy

ARGON2ID, HMAC_SHA256 = "argon2id", "hmac-sha256"


def check_keys(
    verifier: VerifierSection,
    store: StoreSettings,
    policies: Mapping[str, Policy],
    main: Document,
) -> Iterator[Problem]:
    """Yield what cannot work, or would keep a key where its hashes are, each with its line."""
    if verifier.key is not None and verifier.key not in verifier.keys:
        known = did_you_mean(verifier.key, verifier.keys) if verifier.keys else "there is none"
        yield main.problem(("verifier", "key"), f"unknown key: {known}", "unknown-name")
    yield from _files(verifier, store, main)
    for name, policy in policies.items():
        at = ("policies", name, "scheme")
        if policy.scheme == HMAC_SHA256 and verifier.key is None:
            text = "expected verifier.key, which names the key of new hashes, beside hmac-sha256"
            yield main.problem(at, text, "together")
        if policy.scheme not in verifier.schemes:
            # SECURITY: what no verifier accepts must never be minted, or agents would be refused.
            text = f"expected a scheme of verifier.schemes, which leaves {policy.scheme} out"
            yield main.problem(at, text, "together")


def _files(verifier: VerifierSection, store: StoreSettings, main: Document) -> Iterator[Problem]:
    """SECURITY: who gets a copy of the store's folder must not get a key with it."""
    folder, seen = store.folder.resolve(), dict[Path, str]()
    for key_id, key in verifier.keys.items():
        at, real = ("verifier", "keys", key_id, "file"), key.file.resolve()
        if any(folder in (one, *one.parents) for one in (real, key.file.absolute())):
            text = "expected a file outside of the store's folder: a copy of that would hold the key too"
            yield main.problem(at, text, "key-beside-store")
        if (twin := seen.setdefault(real, key_id)) != key_id:
            text = f"expected a file of its own; {twin} has it"
            yield main.problem(at, text, "together")


def shown_to_readers(
    store: StoreSettings, policies: Mapping[str, Policy], agents: Mapping[str, AgentDefinition]
) -> Iterator[str]:
    """Yield a remark for each agent of a readers' group whose new hashes its view will not show."""
    for group, names in store.read_by.items():
        for name in names:
            policy = policies.get(agents[name].policy) if name in agents else None
            if policy is not None and policy.scheme != ARGON2ID:
                yield (
                    f"store.readers.{group}: agent {name} has {policy.scheme} by its policy"
                    f" {policy.name}, and the view shows argon2id only: what is minted for it from now"
                    " on is refused there"
                )
