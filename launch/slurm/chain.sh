#!/usr/bin/env bash
# Submit batch scripts, each to start once the one before has ended well; print their job ids. When one fails, those
# behind it are cancelled. In the repository's root: `launch/slurm/chain.sh SCRIPT...`; without scripts, Stage I, pairs
# of its answers, Stage II (whose ARGUMENTS then say --train runs/pairs/pairs.jsonl), the evaluation.
set -euo pipefail
[ $# -gt 0 ] || set -- launch/slurm/{stage1,pairs,stage2,evaluate}.sh

after=()
for script; do
    job=$(sbatch --parsable --kill-on-invalid-dep=yes "${after[@]}" "$script")
    job=${job%%;*}  # a cluster's name may follow
    echo "$job"
    after=(--dependency="afterok:$job")
done
