#!/usr/bin/env bash
# Stage II with several settings, each a task of a job array. In the repository's root: `sbatch launch/slurm/sweep.sh`.
# Change by hand what stands here, or let `python launch/submit.py sweep` fill it in. See job.sh.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --array=0-1

VENV=.venv  # of python; empty: the python of PATH, as in a container
LAUNCHER=torchrun  # or deepspeed
CONTAINER=()  # what runs a command in one, such as (apptainer exec --nv image.sif) or srun's (--container-image=...)
DS=ds_configs/z3.json
OUTPUT=runs/sweep  # of all; member 0 writes runs/sweep/0
ARGUMENTS=(--model runs/stage1 --train pairs.jsonl --save-every 100)  # of all
MEMBERS=('--beta 0.1' '--beta 0.2 --learning-rate 5e-6')  # as many as --array says; quotes as in a shell

[ "$SLURM_ARRAY_TASK_ID" -lt "${#MEMBERS[@]}" ] || { echo "--array: no member $SLURM_ARRAY_TASK_ID" >&2 && exit 2; }
mapfile -t member < <(xargs -r -n 1 printf '%s\n' <<< "${MEMBERS[SLURM_ARRAY_TASK_ID]}")
OUTPUT=$OUTPUT/$SLURM_ARRAY_TASK_ID
PROGRESS=("$OUTPUT/checkpoints" "$(dirname "$OUTPUT")/reference_cache")
source launch/slurm/job.sh
job on_nodes launch/stage2.py --ds "$DS" --output "$OUTPUT" "${ARGUMENTS[@]}" "${member[@]}"
