"""SIGINT and SIGTERM stop a run after its step, not in the middle of it."""

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Inside the block, SIGINT and SIGTERM only set `signum`; the loop saves and stops after its step.

    A second one acts as if this block were not there.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.previous[signum] = signal.signal(signum, self._caught)
        return self

    def _caught(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, self.previous[signum])

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
