"""Check a node before a run: a line for each thing that a run needs, ok, warn or FAIL with what to do."""

import os
import sys
from pathlib import Path

import click

from mede2.trainer.commandline import close_to_others
from mede2.trainer.doctor.examine import examine, num_own_ranks, ranks_of_slurm, start_ranks

HELP = f"""{__doc__}

Under `deepspeed`, `torchrun` or srun, with the ranks of the run to come, it checks every node and the way between them:
`torchrun --nnodes 2 --nproc_per_node 8 ... launch/doctor.py`. Alone it starts a rank for each GPU of this node, or two
where there is none. It ends with a training step under ZeRO-3 on the small model that ships with MedE2.

Exit code 0 where nothing FAILs, else 1."""


@click.command(help=HELP)
@click.option("--output", default="runs", show_default=True, metavar="DIR", help="Folder that runs will write to.")
@click.option(
    "--need-gib", default=10.0, show_default=True, type=click.FloatRange(0), help="GiB that should be free there."
)
@click.option("--model", metavar="PATH_OR_HUB_NAME", help="Model that runs will start from: is it there?")
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)
def main(output: str, need_gib: float, model: str | None) -> None:
    close_to_others()
    os.environ.update(ranks_of_slurm(os.environ))
    if "RANK" not in os.environ:
        sys.exit(start_ranks(num_own_ranks()))
    sys.exit(int(bool(examine(Path(output), need_gib, model))))


if __name__ == "__main__":
    main()
