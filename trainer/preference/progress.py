"""How far a long step is: a line that renews itself on a terminal, and one now and then in a log."""

import sys
import time
from typing import TextIO

EVERY_S = {True: 0.5, False: 20.0}  # on a terminal, in a log


class Progress:
    """Counts what was done.

    Args:
        title: what is done, such as "answers".
        total: how many there are.
        found: how many of them were done before, by an earlier run.
        file: where the lines go.
    """

    def __init__(self, title: str, total: int, found: int = 0, file: TextIO | None = None):
        self.title, self.total, self.found, self.done = title, total, found, found
        self.file = file or sys.stderr
        self.live = self.file.isatty()
        self.start = self.told = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.found:
            print(f"{self.title}: {self.found} of {self.total} were there already", file=self.file, flush=True)
        return self

    def __exit__(self, *_) -> None:
        if self.done > self.found:
            self._tell(end="\n")

    def advance(self, num: int = 1) -> None:
        self.done += num
        now = time.monotonic()
        if now - self.told >= EVERY_S[self.live]:
            self.told = now
            self._tell(end="" if self.live else "\n")

    def _tell(self, end: str) -> None:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self.found) / seconds
        left = (self.total - self.done) / rate
        line = f"{self.title}: {self.done} of {self.total}, {rate:.2g} a second, {left:.0f} s left"
        print(f"\r{line}\x1b[K" if self.live else line, end=end, file=self.file, flush=True)
