"""What the processes of a run tell each other: values, failures, and whether they are alike."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxgpt.config import BAD_INPUT, HostsConfig, RunConfig

T = TypeVar("T")
Config = TypeVar("Config", bound=RunConfig)
PATIENCE = 24 * 3600.0  # seconds for what others do in their own time; one that dies is noticed by its heartbeat
SEEN_WITHIN = 5.0  # seconds until a shared disk shows to all what one has written


@dataclass(frozen=True)
class Hosts:
    """Which of how many processes this one is. One alone has nobody to talk to, and nothing here takes time."""

    index: int = 0
    count: int = 1
    client: Any = None
    """of the coordinator's key-value store; None for one alone"""
    keys: Iterator[str] = field(default_factory=lambda: iter(()), compare=False)
    """a new name for each exchange, the same on all hosts, which take part in all of them in the same order"""

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes the run folder and speaks for all."""
        return self.index == 0

    @property
    def devices(self) -> list[list[Any]]:
        """The devices of each host (`jax.Device`), in their order."""
        import jax

        return [jax.local_devices(process_index=number) for number in range(self.count)]

    def gather(self, value: T) -> list[T]:
        """The JSON values of all hosts, in their order; returns when all have given theirs."""
        if self.count == 1:
            return [value]
        key = next(self.keys)
        self.client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        if self.first:  # which reads all, so that each of the others has one thing to read
            values = [self._get(f"{key}/{number}") for number in range(self.count)]
            self.client.key_value_set(f"{key}/all", json.dumps(values))
        return self._get(f"{key}/all")

    def of_first(self, value: T) -> T:
        """The JSON value of process 0."""
        return self.gather(value)[0]

    def _get(self, key: str) -> Any:
        return json.loads(self.client.blocking_key_value_get(key, int(PATIENCE * 1000)))

    def together(self, action: Callable[[], T]) -> T:
        """Do `action` on every host, and go on when all have; if it fails on one, it fails on all.

        Raises:
            what `action` raises here.
            ValueError, RuntimeError: it failed elsewhere, by bad input or otherwise; what was said there.
        """
        try:
            result, error = action(), None
        except Exception as caught:
            error = caught
        told = None if error is None else [isinstance(error, BAD_INPUT), str(error)]
        outcomes = self.gather(told)
        if error is not None:
            raise error
        for number, failure in enumerate(outcomes):
            if failure is not None:
                bad_input, text = failure
                raise (ValueError if bad_input else RuntimeError)(f"process {number}: {text}")
        return result

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Raise `ValueError` on all hosts, naming the first fact that is not the same on all of them."""
        everywhere = self.gather(dict(facts))
        for number, others in enumerate(everywhere):
            for name, value in everywhere[0].items():
                if others.get(name) != value:
                    raise ValueError(
                        f"the processes of a run need the same {name}: process 0 has {value}, process {number} has "
                        f"{others.get(name)}"
                    )

    def check_shared(self, folder: Path) -> None:
        """Raise `ValueError` on all hosts unless `folder`, which process 0 has made, is the same one for all."""
        if self.count == 1:
            return
        proof = folder / f".{self.of_first(secrets.token_hex(8))}"
        if self.first:
            proof.touch()
        self.gather(None)
        deadline = time.monotonic() + SEEN_WITHIN
        # Listed, not looked for: a disk over a network remembers for a while that something was not there.
        while not (seen := _lists(folder.parent, folder) and _lists(folder, proof)) and time.monotonic() < deadline:
            time.sleep(0.2)
        unseen = [str(number) for number, sees in enumerate(self.gather(seen)) if not sees]
        if self.first:
            proof.unlink()
        if unseen:
            raise ValueError(
                f"the run folder {folder} is not one that all processes share: what process 0 writes there, process "
                f"{', '.join(unseen)} does not see; give an --out on a disk that all hosts have in common"
            )


ALONE = Hosts()


def _lists(folder: Path, one: Path) -> bool:
    return folder.is_dir() and one.name in os.listdir(folder)


def is_whole(x: Any) -> bool:
    """Whether this host has all of an array."""
    import jax

    return not isinstance(x, jax.Array) or x.is_fully_replicated or x.is_fully_addressable


def whole(x: Any) -> Any:
    """An array of which this host has only a part, as one that it has all of; others as they are.

    All hosts must ask for the same arrays in the same order.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    if is_whole(x):
        return x
    assert isinstance(x.sharding, NamedSharding)
    return jax.jit(_same, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)


def _same(x: Any) -> Any:
    return x


def code_version() -> str:
    """What computes: the versions of jaxgpt and JAX, and a digest of every line of this package."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} ".encode())
        digest.update(path.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("jaxgpt", "jax", "jaxlib")}
    return " ".join(f"{name} {version}" for name, version in versions.items()) + f" ({digest.hexdigest()[:12]})"


def without_hosts(config: Config) -> Config:
    """A run's config without where it runs: what is kept of it, and goes on anywhere."""
    return dataclasses.replace(config, distributed="auto", hosts=HostsConfig())
