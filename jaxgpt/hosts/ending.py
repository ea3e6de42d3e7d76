"""How the processes of a run end together: at a signal, at an error, or because one of them is lost."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from jaxgpt.config import BAD_INPUT, Distributed, HostsConfig
from jaxgpt.hosts.exchange import Hosts
from jaxgpt.hosts.joining import connect, say_and_leave

PARTING = 5.0  # seconds in which all hosts come to the same error, if it is one of all
GONE = "another process of this run has ended, or cannot be reached; when all have ended, start all again with --resume"
_CALLS = itertools.count(1)  # of JAX's sync point, in this process
# The runtime, once a host is lost, ends the process from a thread of its own, by abort().
_ABORTED = ctypes.CFUNCTYPE(None, ctypes.c_int)


@contextlib.contextmanager
def joined(mode: Distributed, config: HostsConfig) -> Iterator[Hosts]:
    """`connect` for a whole program: only process 0 prints, and an error on one host is the end of all.

    An error that all hosts come to is left to process 0 to tell: the others raise `SystemExit`. From one that this host
    alone has, the process ends without waiting for the others, which the runtime tells.
    """
    hosts = connect(mode, config)
    if hosts.count == 1:
        yield hosts
        return
    if not hosts.first:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the libraries' lines too
    aborted = _ABORTED(lambda number: say_and_leave(GONE, 1))
    ctypes.CDLL(None).signal(signal.SIGABRT, aborted)
    try:
        yield hosts
    except Exception as error:
        code = 2 if isinstance(error, BAD_INPUT) else 1
        if not _all_come(hosts):
            atexit.register(_leave, code, aborted)  # before JAX's own farewell, which waits for all
            if _lost_connection(error):
                raise ConnectionError(GONE) from error
            raise
        _take_back_handler()
        if not hosts.first:
            raise SystemExit(code) from error
        raise
    except KeyboardInterrupt:
        atexit.register(_leave, 130, aborted)
        raise
    _take_back_handler()


def _take_back_handler() -> None:
    ctypes.CDLL(None).signal(signal.SIGABRT, None)


def _all_come(hosts: Hosts) -> bool:
    try:
        hosts.client.wait_at_barrier(f"{next(hosts.keys).rsplit('/', 1)[0]}/parting", int(PARTING * 1000))
    except Exception:
        return False
    return True


def _leave(code: int, aborted: Any) -> None:
    """End at once; until then `aborted`, which the C library may still call, is kept."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _lost_connection(error: Exception) -> bool:
    from jax.errors import JaxRuntimeError

    return isinstance(error, JaxRuntimeError) and any(sign in str(error) for sign in ("Gloo", "NCCL", "UNAVAILABLE"))


@dataclass
class SharedStop:
    """`training.stop.Stop` for several hosts: SIGTERM or Ctrl-C at any of them ends all after the same step.

    JAX listens to SIGTERM itself (which excludes a handler of ours) and has all hosts agree on a call of its sync
    point: the one after the last that any of them has made, the first if none has. So calls are numbered from 1, and
    not by the step; and nobody else may call: Orbax does, from a thread of process 0 alone, with a step that is over.
    """

    requested: bool = False
    _asked: bool = False
    _previous: Any = None
    _jax: Any = None
    _reached: Callable[[int], bool] | None = None

    def ask(self) -> bool:
        """All hosts are about to go on: decide together whether to."""
        assert self._reached is not None
        self.requested = self.requested or self._reached(next(_CALLS))
        return self.requested

    def __enter__(self) -> SharedStop:
        from jax.experimental import multihost_utils

        self._jax, self._reached = multihost_utils, multihost_utils.reached_preemption_sync_point
        self._jax.reached_preemption_sync_point = lambda step: False
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._jax.reached_preemption_sync_point = self._reached
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self._asked = True
        os.kill(os.getpid(), signal.SIGTERM)
