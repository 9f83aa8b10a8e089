# shellcheck shell=bash
# Sourced by what runs as a SLURM job: env.sh, the parts of a job, on one node or several, and what a signal does to them.
# shellcheck source=src/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

last_signal="" step_pid="" # See job_step.

# job_step COMMAND...: run a part of a SLURM job; if it fails, end the job with its status. SIGTERM and SIGUSR1 are passed on to
# it; after one that comes between two parts, the next does not begin. After SIGUSR1, which announces the time limit, the job is
# queued again and ends with 75; where `resumable` is set, only if the part ended with that status.
job_step() {
    local status=75 # Stopped before it began.
    trap 'note_signal TERM' TERM INT
    trap 'note_signal USR1' USR1
    if [[ -z "$last_signal" ]]; then
        printf '+ %s\n' "$(printf '%q ' "$@")" >&2
        "$@" &
        step_pid=$! noted=yes
        [[ -z "$last_signal" ]] || note_signal "$last_signal" # It came before the number of the process was known.
        while [[ -n "$noted" ]]; do
            noted="" status=0
            wait "$step_pid" || status=$? # A signal ends `wait` too.
        done
        step_pid=""
    fi
    ((status)) || return 0
    # After SIGTERM it is for SLURM to say what becomes of the job: preemption queues it again, scancel does not.
    if [[ "$last_signal" == USR1 ]] && ((status == ${resumable:-status})); then
        run scontrol requeue "$SLURM_JOB_ID"
        status=75
    fi
    exit "$status"
}
note_signal() {
    last_signal="$1" noted=yes
    [[ -z "$step_pid" ]] || kill -s "$1" "$step_pid" 2>/dev/null || true
}

# on_nodes SECONDS COMMAND...: run such a part on every node of the job at once. If a node ends, the others may take SECONDS more
# (0: no limit). srun passes signals on to all nodes, but does not take over the job's CPUs by itself.
on_nodes() {
    export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"
    # shellcheck disable=SC2016
    job_step srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait="$1" \
        bash -c 'export DRDPO_NODE_RANK="$SLURM_NODEID"; exec "$@"' node "${@:2}"
}

# in_three_rounds COMMAND...: one process divides the work, every node does its share, one process writes the results.
in_three_rounds() {
    job_step "$@"
    on_nodes 0 "$@"
    DRDPO_WRITE=true job_step "$@"
}

# name_meeting: where the ranks of several nodes meet: a port of the first one, another for every job that shares it.
name_meeting() {
    MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}"
    export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((12000 + SLURM_JOB_ID % 20000))}"
}
