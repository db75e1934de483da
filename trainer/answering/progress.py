"""How far a long step is: a line that renews itself on a terminal, and one now and then in a log."""

import sys
import time

EVERY_S = {True: 0.5, False: 20.0}  # on a terminal, in a log


class Progress:
    """Counts what was done.

    Args:
        title: what is done, such as "answers".
        total: how many there are.
        found: how many of them were done before, by an earlier run.
        shown: whether it is told at all; of several ranks one tells.
    """

    def __init__(self, title: str, total: int, found: int = 0, shown: bool = True):
        self.title, self.total, self.found, self.done, self.shown = title, total, found, found, shown
        self.live = sys.stderr.isatty()
        self.start = self.told = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.found:
            self._print(f"{self.title}: {self.found} of {self.total} were there already", end="\n")
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
        rate = (self.done - self.found) / max(time.monotonic() - self.start, 1e-9)
        left = (self.total - self.done) / rate
        line = f"{self.title}: {self.done} of {self.total}, {rate:.2g} a second, {left:.0f} s left"
        self._print(f"\r{line}\x1b[K" if self.live else line, end)

    def _print(self, text: str, end: str) -> None:
        if self.shown:
            print(text, end=end, file=sys.stderr, flush=True)
