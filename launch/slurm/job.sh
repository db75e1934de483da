# shellcheck shell=bash
# What the batch scripts beside this one share: a command on all nodes of the job, and its end, which may be a requeue.
#
# A script sets VENV, LAUNCHER, CONTAINER, OUTPUT and PROGRESS (files whose names or sizes change as the job gets on),
# sources this from the repository's root, and ends with one of
#
#     until_stopped on_nodes FILE.py ARGUMENT...    for what stops by itself when asked to, and says so by code 75
#     until_requeued COMMAND...                     for what may be killed at any time and goes on where it was
#
# SIGUSR1, which --signal sends before the time is up, and SIGTERM put the job back into the queue under its own id, and
# so does a command that stopped itself. Any other code ends the job: `afterok` goes on after 0 alone.
set -euo pipefail

REQUEUE=75      # exit code of a command that is to go on later
MAX_ATTEMPTS=3  # that began at the same point; a job whose time is too short for any progress fails then

[ -z "$VENV" ] || PATH=$(cd "$VENV" && pwd)/bin:$PATH
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over from sbatch by itself
PROCESSES=${SLURM_GPUS_ON_NODE:-1}                   # on each node: one for a GPU
PORT=$((10000 + SLURM_JOB_ID % 20000))               # below the ephemeral ones, of this job alone
SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s || true)}
export SLURM_JOB_END_TIME                            # for the ranks; older versions leave it to us
read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
signals=$(dirname "$OUTPUT")/signals/$SLURM_JOB_ID
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -rf "$signals"
export MEDE2_SIGNAL_FOLDER=$signals/${SLURM_RESTART_COUNT:-0}
mkdir -p "$MEDE2_SIGNAL_FOLDER"

# Run a script of launch/ on every GPU of every node. A rank that fails ends them all.
on_nodes() {
    local everywhere=(srun --kill-on-bad-exit=1 "${CONTAINER[@]}")
    case $LAUNCHER in
    torchrun)
        "${everywhere[@]}" torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$PROCESSES" --rdzv-backend=c10d \
            --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"
        ;;
    deepspeed) # its own --launcher slurm tells no process its rank
        local hosts=$MEDE2_SIGNAL_FOLDER/hostfile
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$PROCESSES/" > "$hosts"
        # shellcheck disable=SC2016
        "${everywhere[@]}" bash -c 'exec deepspeed --no_ssh --node_rank="$SLURM_NODEID" "$@"' _ \
            --hostfile="$hosts" --master_addr="$HEAD" --master_port="$PORT" "$@"
        ;;
    *)
        echo "LAUNCHER=$LAUNCHER: torchrun or deepspeed" >&2
        return 2
        ;;
    esac
}

until_stopped() {
    trap 'signalled=yes; touch "$MEDE2_SIGNAL_FOLDER/stop"' USR1 TERM
    run "$@"
    if [ "$code" = "$REQUEUE" ] || [ -e "$MEDE2_SIGNAL_FOLDER/requeue" ]; then requeue; fi # torchrun loses the code
    end
}

until_requeued() {
    trap 'signalled=yes; requeue' USR1 TERM
    run "$@"
    end
}

# Run in the background, as a trap waits for what runs in the foreground; leave its code in `code`. A trap ends `wait`.
run() {
    progress > "$MEDE2_SIGNAL_FOLDER/began_at"
    "$@" &
    local command=$!
    signalled=yes
    while [ "$signalled" = yes ]; do
        signalled=no code=0
        wait "$command" || code=$?
    done
}

progress() {
    { find "$PROGRESS" -name '.*' -prune -o -type f -printf '%P %s\n' 2> /dev/null || true; } | sort | cksum
}

requeue() {
    local attempts
    attempts=$(cat "$signals"/*/began_at | grep -cxF "$(progress)" || true)
    if [ "$attempts" -ge "$MAX_ATTEMPTS" ]; then
        echo "not requeued: $attempts attempts and nothing new in $PROGRESS; ask for more --time, or save more often" >&2
        exit 1
    fi
    if [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" != RUNNING ]; then
        echo "not requeued here: SLURM ends the job, cancelled or requeued already" >&2
        return
    fi
    echo "requeued after attempt ${SLURM_RESTART_COUNT:-0}"
    scontrol requeue "$SLURM_JOB_ID"
}

end() {
    [ "$code" != 0 ] || rm -r "$signals"
    exit "$code"
}
