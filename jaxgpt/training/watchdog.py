"""A run that hangs says where and ends, rather than hold its machine for ever."""

from __future__ import annotations

import faulthandler
import os
import threading
import time

GRACE = 2.0  # seconds until the stacks are printed without Python's help
STDERR = 2  # the descriptor: sys.stderr may be anybody's


class Watchdog:
    """Ends the process, with the stacks of all threads, when nothing was done for a number of seconds.

    A thread of Python's says what was under way. It cannot run while a hanging call holds the interpreter's lock:
    then `faulthandler`, which needs no lock, prints the stacks alone, `GRACE` seconds later. Either way the process
    ends with exit code 1, and what was committed to disk stays as it was.
    """

    def __init__(self, seconds: float | None) -> None:
        """Watch from the first `doing`; None: never."""
        self._seconds, self._deadline, self._what = seconds, float("inf"), ""
        self._changed, self._closed = threading.Condition(), False
        if seconds is not None:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def doing(self, what: str) -> None:
        """Something was done, and `what` begins now."""
        if self._seconds is not None:
            self._set(time.monotonic() + self._seconds, what)
            faulthandler.dump_traceback_later(self._seconds + GRACE, exit=True, file=STDERR)

    def rest(self) -> None:
        """Nothing is watched until the next `doing`."""
        if self._seconds is not None:
            self._set(float("inf"), "")
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Watch no more."""
        self.rest()
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _set(self, deadline: float, what: str) -> None:
        with self._changed:
            sooner = deadline < self._deadline
            self._deadline, self._what = deadline, what
            if sooner:  # else the thread wakes at the old deadline, and sees that there is a new one
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    self._end()
                self._changed.wait(left if left < threading.TIMEOUT_MAX else None)

    def _end(self) -> None:
        message = f"jaxgpt: nothing was done for {self._seconds:g} seconds, in {self._what}; the stacks of all threads:"
        os.write(STDERR, f"\n{message}\n\n".encode())
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        time.sleep(GRACE)  # the end of one host is that of the others: let theirs be printed too
        os._exit(1)
