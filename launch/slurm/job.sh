# shellcheck shell=bash
# What the batch scripts beside this one share: commands on the nodes of a job, and the end of the job, which may be
# another place in the queue. A script is started in the repository's root, sets VENV, LAUNCHER, CONTAINER, OUTPUT and
# PROGRESS (what grows while the job gets on), sources this, and ends with `job COMMAND...`.
#
# SIGUSR1, which #SBATCH --signal sends before the time is up, and SIGTERM ask the command to stop, by a file: launchers
# pass no signal on. A command that stopped where it can go on says so by code 75, or by a file where the launcher loses
# codes, and the job goes back into the queue under its own id; where a node died, SLURM itself puts it there. Other codes
# end it, and `afterok` goes on after 0 alone.
set -euo pipefail

REQUEUE=75
MAX_ATTEMPTS=5  # that began at the same point: a job whose time is too short for any progress fails then

# Run a script on every GPU of every node. A rank that fails ends them all. Without `--` the launchers would read the
# script's own `--num` as one of theirs, cut short.
on_nodes() {
    local everywhere=(srun --kill-on-bad-exit=1 "${CONTAINER[@]}")
    case $LAUNCHER in
    torchrun)
        "${everywhere[@]}" torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$PROCESSES" --rdzv-backend=c10d \
            --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="$SLURM_JOB_ID.$ATTEMPT" -- "$@"
        ;;
    deepspeed)  # one on each node, by a hostfile: with its own `--launcher slurm` no process learns its rank
        scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$PROCESSES/" > "$MEDE2_SIGNAL_FOLDER/hostfile"
        # shellcheck disable=SC2016
        "${everywhere[@]}" bash -c 'exec deepspeed --no_ssh --node_rank="$SLURM_NODEID" "$@"' _ \
            --hostfile="$MEDE2_SIGNAL_FOLDER/hostfile" --master_addr="$HEAD" --master_port="$PORT" -- "$@"
        ;;
    *)
        echo "LAUNCHER=$LAUNCHER: must be torchrun or deepspeed" >&2
        return 2
        ;;
    esac
}

# Run a script in one process, on one node.
on_one_node() {
    srun --nodes=1 --ntasks=1 "${CONTAINER[@]}" python "$@"
}

# Run a command to its end, and end the job with it. The command runs in the background: a trap waits for what runs in
# the foreground, and ends a `wait` early.
job() {
    local command
    trap 'signalled=yes; touch "$MEDE2_SIGNAL_FOLDER/stop"' USR1 TERM
    progress > "$MEDE2_SIGNAL_FOLDER/began_at"
    "$@" &
    command=$!
    signalled=yes
    while [ "$signalled" = yes ]; do
        signalled=no code=0
        wait "$command" || code=$?
    done
    if [ "$code" = "$REQUEUE" ] || [ -e "$MEDE2_SIGNAL_FOLDER/requeue" ]; then
        requeue
    elif [ "$code" = 0 ]; then
        rm -rf "$SIGNALS" || true  # NFS may keep a file that is still open
    fi
    exit "$code"
}

requeue() {
    local attempts state
    if ! state=$(patiently squeue --noheader --job="$JOB" --format=%T); then
        echo "job.sh: not requeued: SLURM does not answer; once it does: scontrol requeue $JOB" >&2
        return
    fi
    if [ "$state" != RUNNING ]; then
        echo "job.sh: not requeued here: SLURM itself is ending the job, for good or for later" >&2
        return
    fi
    attempts=$(cat "$SIGNALS"/*/began_at | grep -cxF "$(progress)" || true)
    if [ "$attempts" -ge "$MAX_ATTEMPTS" ]; then
        echo "job.sh: not requeued: $attempts attempts, and nothing new in ${PROGRESS[*]}; ask for more time" >&2
        exit 1
    fi
    echo "job.sh: requeued after attempt $ATTEMPT"
    patiently scontrol requeue "$JOB"
}

# A command of SLURM's, again while it fails: the controller may be restarting.
patiently() {
    local pause
    for pause in 5 10 20 40 60; do
        "$@" && return
        sleep "$pause"
    done
    "$@"
}

# A line that changes with the names and the dates of the files in PROGRESS, half-written ones left out.
progress() {
    { find "${PROGRESS[@]}" -name '*.partial' -prune -o -type f -printf '%p %T@\n' 2> /dev/null || true; } |
        sort | cksum
}

# A time of this job, %S (start) or %e (end), in seconds since 1970; nothing where it has no end.
time_of_job() {
    local time
    time=$(squeue --noheader --job="$JOB" --format="$1") || true
    [ -z "$time" ] || date --date="$time" +%s 2> /dev/null || true
}

if [ -n "$VENV" ]; then
    [ -x "$VENV/bin/python" ] || { echo "VENV=$VENV: no python environment in $PWD" >&2 && exit 2; }
    PATH=$(cd "$VENV" && pwd)/bin:$PATH
fi
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}  # a task's own: the last one of an array has the id of them all
ATTEMPT=${SLURM_RESTART_COUNT:-0}
PROCESSES=${SLURM_GPUS_ON_NODE:-1}      # on each node; one where it has no GPU
PORT=$((10000 + SLURM_JOB_ID % 20000))  # of this job alone, below those that systems hand out
read -r HEAD < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
SIGNALS=$(dirname "$OUTPUT")/signals/$SLURM_JOB_ID
[ "$ATTEMPT" -gt 0 ] || rm -rf "$SIGNALS"  # of another cluster's job
mkdir -p "$SIGNALS/$ATTEMPT"
export MEDE2_SIGNAL_FOLDER=$SIGNALS/$ATTEMPT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun takes it from sbatch no more
export SLURM_JOB_START_TIME=${SLURM_JOB_START_TIME:-$(time_of_job %S)}  # of SLURM itself only from 23.02
export SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-$(time_of_job %e)}
