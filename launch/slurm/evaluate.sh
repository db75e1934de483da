#!/usr/bin/env bash
# The evaluation under SLURM. In the repository's root: `sbatch launch/slurm/evaluate.sh`.
# Change by hand what stands here, or let `python launch/submit.py evaluate` fill it in. See job.sh.
#SBATCH --job-name=evaluate
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
OUTPUT=runs/evaluation
MODELS=("Stage I=runs/stage1" "Stage II=runs/stage2")
BENCHMARKS=(cases=held_out.jsonl)  # launch/evaluate.py list
ARGUMENTS=(--probe all)  # launch/evaluate.py run --help

PROGRESS=("$OUTPUT")
source launch/slurm/job.sh
job on_nodes launch/evaluate.py run --output "$OUTPUT" "${MODELS[@]/#/--model=}" "${BENCHMARKS[@]/#/--benchmark=}" \
    "${ARGUMENTS[@]}"
