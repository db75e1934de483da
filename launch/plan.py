"""Know before you book the node: memory, time and GPU-hours of a recipe on a cluster. See --help."""

from pathlib import Path

from mede2.trainer.planning.command import plan_command

if __name__ == "__main__":
    plan_command(Path(__file__).resolve().parents[1])()
