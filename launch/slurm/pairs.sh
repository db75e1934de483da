#!/usr/bin/env bash
# Pairs of a model's own answers under SLURM. In the repository's root: `sbatch launch/slurm/pairs.sh`.
# Change by hand what stands here, or let `python launch/submit.py pairs` fill it in. See job.sh.
#SBATCH --job-name=pairs
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
MODEL=runs/stage1
CASES=cases.jsonl
OUTPUT=runs/pairs  # samples.jsonl, judgements.jsonl, pairs.jsonl
ARGUMENTS=(--num 8)  # launch/pairs.py sample --help

PROGRESS=("$OUTPUT")
source launch/slurm/job.sh

# shellcheck disable=SC2317  # `job` calls it
pairs() {
    local given=(--cases "$CASES" --samples "$OUTPUT/samples.jsonl")
    on_nodes launch/pairs.py sample --cases "$CASES" --model "$MODEL" --output "$OUTPUT/samples.jsonl" "${ARGUMENTS[@]}"
    on_one_node launch/pairs.py judge "${given[@]}" --output "$OUTPUT/judgements.jsonl" --judge rules
    given+=(--judgements "$OUTPUT/judgements.jsonl")
    on_one_node launch/pairs.py select "${given[@]}" --output "$OUTPUT/pairs.jsonl"
    on_one_node launch/pairs.py check "$OUTPUT/pairs.jsonl" --model "$MODEL"
}

mkdir -p "$OUTPUT"
job pairs
