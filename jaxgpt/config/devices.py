"""Where a run runs: the devices of one host, and several hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxgpt.config.conversion import require

Strategy = Literal["auto", "single", "pmap", "mesh"]
Distributed = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class ParallelConfig:
    """How one step is spread over devices. It changes how long a step takes, not what it computes."""

    strategy: Strategy = "auto"
    """single: one device; pmap: data-parallel jax.pmap; mesh: jit over a mesh; auto: mesh if one is given or there are
    several hosts, else pmap if several devices"""
    devices: int | None = None
    """how many devices of each host (default: all that divide the batch)"""
    mesh: str | None = None
    """how many devices along each axis of a mesh, as in data=2,fsdp=2,tensor=2 (default, with mesh: all along data)"""
    gradient_accumulation: int = 1
    """micro-batches a device computes one after another for one step"""
    virtual_shards: int = 8
    """with strict-reproducibility: parts of every batch, each computed by itself; at most so many devices have work"""

    def __post_init__(self) -> None:
        require(self.devices is None or self.devices >= 1, f"parallel.devices is {self.devices}; it must be at least 1")
        require(
            self.mesh is None or self.strategy in ("auto", "mesh"),
            f"parallel.mesh is {self.mesh}, but parallel.strategy is {self.strategy}; with that it must be None",
        )
        for name in ("gradient_accumulation", "virtual_shards"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name.replace('_', '-')} is {value}; it must be at least 1")


@dataclass(frozen=True)
class HostsConfig:
    """Where the other processes of a run are, which only a launcher that JAX does not know has to say."""

    coordinator: str | None = None
    """address and port of process 0, as in 10.0.0.1:8476"""
    processes: int | None = None
    """how many there are, of all hosts together"""
    process: int | None = None
    """which this one is, from 0"""
    timeout: int = 300
    """seconds in which all must have come together"""
    heartbeat: int = 100
    """seconds without a sign of life after which a process counts as dead, and the others end"""

    def __post_init__(self) -> None:
        for name in ("processes", "timeout", "heartbeat"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"hosts.{name} is {value}; it must be at least 1")
        address, _, port = (self.coordinator or "host:1").rpartition(":")
        fits = bool(address) and port.isdecimal() and 0 < int(port) < 2**16
        require(fits, f"hosts.coordinator is {self.coordinator}; it must be ADDRESS:PORT")
        one, count = self.process, self.processes
        require(one is None or one >= 0, f"hosts.process is {one}; it must not be negative")
        fits = one is None or count is None or one < count
        require(fits, f"hosts.process is {one}, and the {count} of hosts.processes are numbered from 0")
