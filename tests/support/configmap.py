"""A volume as kubelet makes it of a ConfigMap, and changes it: by the swap of one link.

kubernetes/pkg/volume/util/atomic_writer.go: files in `..TIME/`, `..data` leads there, each name of the
volume leads to `..data/NAME`; a new content is a new folder, and one rename.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path


class ConfigMap:
    """One mounted ConfigMap."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)

    def swap(self, files: Mapping[str, str]) -> None:
        """Give the volume another content, in kubelet's order."""
        self._number += 1
        fresh, data = f"..2026_{self._number:06}", self.folder / "..data"
        before = data.readlink() if data.is_symlink() else None
        (self.folder / fresh).mkdir(mode=0o755)
        for name, text in files.items():
            path = self.folder / fresh / name
            path.write_text(text)
            path.chmod(0o644)
        waiting = self.folder / "..data_tmp"
        waiting.symlink_to(fresh)
        waiting.replace(data)
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        for path in self.folder.iterdir():
            if path.is_symlink() and not path.name.startswith("..") and path.name not in files:
                path.unlink()
        if before is not None:
            shutil.rmtree(self.folder / before)
