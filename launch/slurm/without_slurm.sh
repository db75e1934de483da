#!/usr/bin/env bash
# A stage on several machines without SLURM: on each of them, in the repository's root on a disk that they share,
#
#     launch/slurm/without_slurm.sh NUMBER
#
# with its number, 0 for the first. Change by hand what stands here. The same commands again continue the run.

VENV=.venv  # of python
MACHINES=2
PROCESSES=8  # on each: one for a GPU
HEAD=node0  # name or address of the first, which all reach
PORT=29400  # free on the first
STAGE=2
DS=ds_configs/z3.json
OUTPUT=runs/stage2
ARGUMENTS=(--train pairs.jsonl --save-every 100)  # launch/stage2.py --help

set -euo pipefail
exec "$VENV/bin/torchrun" --nnodes="$MACHINES" --node-rank="${1:?the number of this machine}" \
    --nproc-per-node="$PROCESSES" --master-addr="$HEAD" --master-port="$PORT" \
    -- "launch/stage$STAGE.py" --ds "$DS" --output "$OUTPUT" "${ARGUMENTS[@]}"
