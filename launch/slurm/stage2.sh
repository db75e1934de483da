#!/usr/bin/env bash
# Stage II under SLURM, one job for all updates. In the repository's root: `sbatch launch/slurm/stage2.sh`.
# Change by hand what stands here, or let `python launch/submit.py stage2` fill it in. See job.sh.
#SBATCH --job-name=stage2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

VENV=.venv  # of python; empty: the python of PATH, as in a container
LAUNCHER=torchrun  # or deepspeed
CONTAINER=()  # what runs a command in one, such as (apptainer exec --nv image.sif) or srun's (--container-image=...)
DS=ds_configs/z3.json
OUTPUT=runs/stage2  # starts from the stage1 beside it
ARGUMENTS=(--train pairs.jsonl --save-every 100)  # launch/stage2.py --help

PROGRESS=("$OUTPUT/checkpoints" "$(dirname "$OUTPUT")/reference_cache")
source launch/slurm/job.sh
job on_nodes launch/stage2.py --ds "$DS" --output "$OUTPUT" "${ARGUMENTS[@]}"
