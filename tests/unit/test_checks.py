"""What `keyturn policy vault` prints from a configuration."""

from __future__ import annotations

from pathlib import Path

import yaml

from keyturn.daemon.checks import vault_policy

CONTENT = {
    "version": 1,
    "connections": {
        "bao": {
            "type": "vault",
            "address": "https://vault.example:8200",
            "mount": "kv",
            "prefix": "agents",
            "auth": {"method": "token", "token_file": "/etc/keyturn/token"},
        },
        "files": {"type": "file", "root": "/srv/agents"},
    },
    "policies": {
        "default": {"every": "30d", "grace": "48h"},
        "strict": {"every": "30d", "grace": "48h", "retire": "destroy"},
    },
    "agents": {
        "mild": {"destinations": [{"to": "bao", "path": "mild"}]},
        "strict": {"policy": "strict", "destinations": [{"to": "bao", "path": "strict"}]},
        "elsewhere": {"policy": "strict", "destinations": [{"to": "files", "path": "x"}]},
    },
}


def test_each_entry_gets_what_its_own_agents_policy_needs(tmp_path: Path) -> None:
    """Destroying is granted where that agent's policy destroys, and nowhere else."""
    path = tmp_path / "keyturn.yaml"
    store = {"url": f"sqlite:///{tmp_path}/state/keyturn.db"}
    path.write_text(yaml.safe_dump({**CONTENT, "store": store}))
    path.chmod(0o600)
    text = vault_policy(path)

    assert '"kv/destroy/agents/strict"' in text
    assert '"kv/destroy/agents/mild"' not in text
    assert '"kv/delete/agents/mild"' in text
    assert '"kv/delete/agents/strict"' not in text
    assert "elsewhere" not in text
    assert "agents/x" not in text
