"""Stage I as launchers run it, but that what the variable FAULT names goes wrong in one rank."""

import ctypes
import os
import signal
import time

from mede2.trainer import watchdog
from mede2.trainer.commandline import stage_command
from mede2.trainer.engine import Engine

watchdog.GRACE_S, watchdog.TERM_S = 2.0, 3.0
UPDATE = 2  # in which it happens
FAULTY = 1  # the rank


def hang() -> None:
    """In Python."""
    while True:
        time.sleep(0.1)


def hang_in_c() -> None:
    """With the interpreter's lock held, so that no other thread runs."""
    watchdog.MARGIN_S = 1.0
    ctypes.PyDLL(None).sleep(1000)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """This process stands still, as the others see one that is dead where no connection tells them."""
    os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    plain, count = Engine.backward, 0

    def backward(engine: Engine, loss) -> None:
        nonlocal count
        count += 1
        if count == UPDATE + 1 and engine.world.rank == FAULTY:  # after the rehearsal's and the first updates'
            {"hang": hang, "hang_in_c": hang_in_c, "die": die, "freeze": freeze}[os.environ["FAULT"]]()
        plain(engine, loss)

    Engine.backward = backward
    stage_command(1)()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)  # noted, not obeyed at once
    main()
