"""A rank that is slowed for real: another process stops it nine tenths of the time."""

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

from harness import main

from mede2.trainer.pace import Pace
from mede2.trainer.world import World

BRAKE = """
import os, signal, time
rank = os.getppid()
print("on", flush=True)
while os.getppid() == rank:
    os.kill(rank, signal.SIGSTOP); time.sleep(0.09); os.kill(rank, signal.SIGCONT); time.sleep(0.01)
"""


def slowed(world: World, job: dict) -> dict:
    """Three looks while rank 1 is slowed."""
    said, pace = io.StringIO(), Pace(world, SimpleNamespace(waited_in_all_s=0.0), every=1)
    brake = None
    if world.rank == 1:
        brake = subprocess.Popen([sys.executable, "-c", BRAKE], stdout=subprocess.PIPE)
        brake.stdout.readline()
    with redirect_stdout(said):
        marks = [pace(done) for done in (1, 2, 3)]
    if brake:
        brake.kill()
        brake.wait()
        os.kill(os.getpid(), signal.SIGCONT)
    return {"marks": marks, "said": said.getvalue()}


if __name__ == "__main__":
    main({"slowed": slowed})
