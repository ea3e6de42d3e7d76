"""Checkpoints under another name: N.damaged, until step N is saved anew, and N.replaced, while it is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.hosts import Hosts

DAMAGED, REPLACED = ".damaged", ".replaced"


@dataclass(frozen=True)
class Aside:
    """The folder of a run's checkpoints, in which process 0 alone renames and deletes."""

    folder: Path
    hosts: Hosts

    def others(self, *steps: int) -> list[int]:
        """Steps of the checkpoints that have their own name, but for these."""
        names = [path.name for path in self.folder.iterdir()]
        return [int(name) for name in names if name.isdecimal() and int(name) not in steps]

    def set_aside(self, step: int) -> str:
        """Name a checkpoint N.damaged, on all hosts before any goes on; return that name."""
        self._rename_together(step, DAMAGED)
        return f"{step}{DAMAGED}"

    def put_by(self, step: int) -> None:
        """Name a checkpoint N.replaced, on all hosts before any goes on."""
        self._rename_together(step, REPLACED)

    def _rename_together(self, step: int, suffix: str) -> None:
        def rename() -> None:
            place = self.folder / f"{step}{suffix}"
            shutil.rmtree(place, ignore_errors=True)
            (self.folder / str(step)).rename(place)

        self.hosts.together(rename if self.hosts.first else lambda: None)

    def put_back(self) -> None:
        """What was to be replaced, and was not, has its name again; what was is gone."""
        if not self.hosts.first:
            return
        for place in self.folder.glob(f"*{REPLACED}"):
            if (self.folder / place.stem).exists():
                shutil.rmtree(place)
            else:
                place.rename(self.folder / place.stem)

    def forget(self, step: int) -> None:
        """The checkpoint of a step is there anew: what it was before is deleted."""
        if self.hosts.first:
            for suffix in (DAMAGED, REPLACED):
                shutil.rmtree(self.folder / f"{step}{suffix}", ignore_errors=True)
