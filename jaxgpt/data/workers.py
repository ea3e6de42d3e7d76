"""Functions run by several processes of this machine."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeAlias

# Runs a function on each of some values, in any order, and yields what it returns as it comes. What is given to it can
# be sent to other processes and machines.
Mapper: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


def in_processes(count: int) -> Mapper:
    """Run in `count` processes of one thread each; fewer values than that have more threads each.

    The processes end when this one does, however it ends.
    """
    return functools.partial(_in_processes, count)


def _in_processes(count: int, function: Callable[[Any], Any], values: Sequence[Any]) -> Iterator[Any]:
    if not values:
        return
    processes = min(count, len(values))
    others = set(multiprocessing.active_children())
    # Spawned: a fork would copy locks that threads of the tokenizer's library hold.
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(count // processes,)
    )
    try:
        for future in as_completed([pool.submit(function, value) for value in values]):
            yield future.result()
    except BrokenProcessPool as error:
        raise OSError("a worker process was killed; if memory was short, fewer workers need less of it") from error
    finally:
        # All is done, or nothing more is wanted: then what is under way ends at once.
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()


def _begin(threads: int) -> None:
    """Set a worker up: threads of the tokenizer's library, and when to end."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
