"""Being asked to end: SIGTERM or Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class Stop:
    """Whether somebody asked the run to end: SIGTERM or Ctrl-C ends it after the step under way."""

    requested: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    def ask(self) -> bool:
        """Whether to end here; several hosts decide together (see `hosts.SharedStop`)."""
        return self.requested

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.requested = True
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C once more leaves at once\n")
