#!/usr/bin/env bash
# Stage II under SLURM: `sbatch launch/slurm/stage2.sh` in the repository's root. Change what stands here by hand, or let
# `python launch/submit.py stage2` fill it in. The same job goes on in the queue until the run is done; see job.sh.
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

VENV=.venv          # of python; empty: what PATH finds, as in a container
LAUNCHER=torchrun   # or deepspeed
CONTAINER=()        # what runs a command in one, such as (apptainer exec --nv image.sif)
DS=ds_configs/z3.json
OUTPUT=runs/stage2  # on a disk that all nodes share
ARGUMENTS=(--train pairs.jsonl --save-every 100)  # more: python launch/stage2.py --help

PROGRESS=$OUTPUT/checkpoints
source launch/slurm/job.sh
until_stopped on_nodes launch/stage2.py --ds "$DS" --output "$OUTPUT" "${ARGUMENTS[@]}"
