# shellcheck shell=bash
# Sourced by every wrapper: strict mode, repository root, the environment that setup.sh made, `run` and `launch`.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export ROOT

# setup.sh notes the environment's prefix (a conda environment, a venv, or the one that was active) in .environment;
# a command runs in it by having its bin first, the same for all three.
if [[ -n "${DRDPO_ENV:-}" || -f "$ROOT/.environment" ]]; then
    prefix="${DRDPO_ENV:-$(<"$ROOT/.environment")}"
    if [[ ! -x "$prefix/bin/python" ]]; then
        echo "error: the environment $prefix is gone; run: bash setup.sh" >&2
        exit 1
    fi
    export PATH="$prefix/bin:$PATH"
    unset prefix
fi

# Scripts outside src/ import this clone's drdpo, also where another clone's is installed in the environment.
export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}"
export PYTHONUNBUFFERED=1
# Bars of transformers and the hub are drawn anew on one line, which a log file shows as a hundred.
[[ -t 2 ]] || export HF_HUB_DISABLE_PROGRESS_BARS="${HF_HUB_DISABLE_PROGRESS_BARS:-1}"
unset gpus_found # See has_gpu.
# Threads that wait sleep, in place of spinning: on cores that anything else uses too, spinning made vLLM ten times slower.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

# run COMMAND...: print a command, then run it.
run() {
    printf '+ ' >&2
    printf '%q ' "$@" >&2
    printf '\n' >&2
    "$@"
}

# wants_help FLAG...: does the user ask for --help?
wants_help() {
    local word
    for word in "$@"; do
        case "$word" in -h | --help) return 0 ;; esac
    done
    return 1
}

# flag_value NAME FLAG...: the value of --NAME=value or --NAME value.
flag_value() {
    local name="$1" value=""
    shift
    while (($#)); do
        # The parser takes dashes for underscores.
        case "$1" in
            "--$name="* | "--${name//_/-}="*) value="${1#*=}" ;;
            "--$name" | "--${name//_/-}") value="${2:-}" ;;
        esac
        shift
    done
    printf '%s' "$value"
}

# ask_cuda: how many GPUs CUDA sees, and the CUDA version of the driver, e.g. "8 12040" for 12.4; nothing where there is no
# driver. It needs no nvidia-smi, which containers may lack, and no torch, which setup.sh has yet to install.
ask_cuda() {
    [[ -e /dev/nvidiactl || -e /dev/dxg ]] || return 0
    python -c 'import ctypes
cuda, count, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
cuda.cuDriverGetVersion(ctypes.byref(version))
seen = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value if seen else 0, version.value)' 2>/dev/null || true
}

# find_gpus: how many GPUs CUDA sees. Where it sees none, how many nvidia-smi lists: the steps then say what keeps CUDA from
# them. An empty CUDA_VISIBLE_DEVICES, or DS_ACCELERATOR=cpu, hides all.
find_gpus() {
    local count=0 listed
    if [[ "${DS_ACCELERATOR:-}" != cpu && -n "${CUDA_VISIBLE_DEVICES-unset}" ]]; then
        count="$(ask_cuda)"
        count="$((${count% *}))"
        if ((count == 0)) && command -v nvidia-smi >/dev/null; then
            listed="$(timeout 10 nvidia-smi --list-gpus 2>&1)" || echo "note: nvidia-smi fails: ${listed%%$'\n'*}" >&2
            count="$(grep -c '^GPU' <<<"$listed" || true)"
            # CUDA stops at the first number that is negative or that no GPU has; NoDevFiles is how Slurm says none.
            if ((count > 0)) && [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
                count="$(awk -v RS=, -v count="$count" '
                    NF == 0 || $1 ~ /^(-|NoDevFiles)/ || ($1 ~ /^[0-9]+$/ && $1 >= count) { exit }
                    { visible++ }
                    END { print visible + 0 }' <<<"$CUDA_VISIBLE_DEVICES")"
            fi
        fi
    fi
    printf '%s' "$count"
}

# visible_gpus: how many GPUs are visible. has_gpu notes the number, so that later calls need not ask again.
visible_gpus() {
    printf '%s' "${gpus_found:-$(find_gpus)}"
}

# has_gpu: is a GPU visible?
has_gpu() {
    : "${gpus_found:=$(find_gpus)}"
    ((gpus_found > 0))
}

# process_count: processes on this machine, $DRDPO_PROCESSES or the number of visible GPUs, at least 1.
process_count() {
    local gpus
    gpus="$(visible_gpus)"
    printf '%s' "${DRDPO_PROCESSES:-$((gpus > 0 ? gpus : 1))}"
}

# refuse_command MESSAGE: end with a usage error.
refuse_command() {
    echo "error: $1" >&2
    exit 2
}

# check_processes: can so many processes be started on the GPUs that are visible?
check_processes() {
    local gpus
    gpus="$(visible_gpus)"
    [[ "$(process_count)" =~ ^[1-9][0-9]*$ ]] || refuse_command "DRDPO_PROCESSES=${DRDPO_PROCESSES:-} is not a number from 1"
    ((gpus == 0 || $(process_count) <= gpus)) ||
        refuse_command "DRDPO_PROCESSES=$DRDPO_PROCESSES, but $gpus GPUs are visible; one process needs one GPU"
    if ((gpus > 0)) && [[ "${CUDA_VISIBLE_DEVICES:-0}" =~ [^0-9,\ ] ]]; then
        refuse_command "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: DeepSpeed's launcher takes device numbers, e.g. 0,1; nvidia-smi --list-gpus shows them"
    fi
}

# node_count: machines that work together, $DRDPO_NODES or 1; one launcher runs on each of them.
node_count() {
    printf '%s' "${DRDPO_NODES:-1}"
}

# world_size: processes on all machines.
world_size() {
    if [[ -n "${DRDPO_HOSTFILE:-}" ]]; then
        awk -F 'slots=' '!/^ *(#|$)/ {sum += $2} END {print sum + 0}' "$DRDPO_HOSTFILE"
    else
        printf '%s' "$(($(process_count) * $(node_count)))"
    fi
}

# check_nodes: is all there that several machines need to find each other?
check_nodes() {
    [[ "$(node_count)" =~ ^[1-9][0-9]*$ ]] || refuse_command "DRDPO_NODES=$DRDPO_NODES is not a number from 1"
    if [[ -n "${DRDPO_HOSTFILE:-}" ]]; then
        [[ -f "$DRDPO_HOSTFILE" ]] || refuse_command "DRDPO_HOSTFILE=$DRDPO_HOSTFILE: no such file"
        (($(world_size) > 0)) || refuse_command "DRDPO_HOSTFILE=$DRDPO_HOSTFILE: no line like: host1 slots=8"
        (($(node_count) == 1)) || refuse_command "DRDPO_HOSTFILE and DRDPO_NODES exclude each other; give one"
    fi
    (($(node_count) > 1)) || return 0
    local rank="${DRDPO_NODE_RANK:-${SLURM_NODEID:-}}"
    if [[ ! "$rank" =~ ^[0-9]+$ ]] || ((rank >= $(node_count))); then
        refuse_command "DRDPO_NODES=$DRDPO_NODES, but DRDPO_NODE_RANK=$rank is not this machine's number, from 0"
    fi
    [[ -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" ]] ||
        refuse_command "DRDPO_NODES=$DRDPO_NODES needs MASTER_ADDR, the first machine, and MASTER_PORT, a free port there"
    if has_gpu && [[ -n "${CUDA_VISIBLE_DEVICES:-}" &&
        "${CUDA_VISIBLE_DEVICES// /}" != "$(seq -s, 0 "$(($(process_count) - 1))")" ]]; then
        refuse_command "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: on several machines the devices are those from 0 on"
    fi
}

# check SCRIPT FLAG...: flags and inputs in one plain process, which knows how many there will be.
check() {
    WORLD_SIZE="$(world_size)" python "$@" --check_only=true
}

# launch SCRIPT FLAG...: run a script by DeepSpeed's launcher, one process per GPU, after `check`. --help and a wrong
# command never start the launcher.
launch() {
    local launcher=()
    if wants_help "$@"; then
        python "$1" --help
        return
    fi
    prepare_launch "$@"
    run "${launcher[@]}" "$@"
}

# launch_resumable SCRIPT FLAG...: as `launch`, for a script that notes SIGTERM and SIGUSR1, saves and ends with a status
# of its own, which becomes ours. DeepSpeed's launcher would die of the one and kill the ranks 30 s after the other, so both
# are blocked for it, and the ranks, who unblock them, learn of what reached this shell alone by a file.
launch_resumable() {
    local launcher=() shield status=0
    if wants_help "$@"; then
        python "$1" --help
        return
    fi
    if started_as_rank; then
        run exec python "$@"
    fi
    prepare_launch "$@"
    if [[ -n "${DRDPO_HOSTFILE:-}" ]]; then
        # Through ssh no signal and no file would reach the ranks.
        run "${launcher[@]}" "$@"
        return
    fi
    shield='import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
os.execvp(sys.argv[1], sys.argv[1:])'
    DRDPO_STOP_FILE="$(mktemp -d)/stop"
    export DRDPO_STOP_FILE
    printf '+ %s\n' "$(printf '%q ' "${launcher[@]}" "$@")" >&2
    run_noting note_stop python -c "$shield" "${launcher[@]}" "$@" || status=$?
    rm -rf "$(dirname "$DRDPO_STOP_FILE")"
    return "$status"
}

# note_stop SIGNAL PID: tell the ranks of this machine, by a file that appears whole.
note_stop() {
    printf 'SIG%s' "$1" >"$DRDPO_STOP_FILE.part"
    mv "$DRDPO_STOP_FILE.part" "$DRDPO_STOP_FILE"
}

# run_noting FUNCTION COMMAND...: run a command and give its status; on SIGTERM and SIGUSR1 call FUNCTION SIGNAL PID.
run_noting() {
    local react="$1" signalled=none pid="" status
    shift
    # The functions that are called may need the signal later.
    trap 'signalled=TERM; last_signal=TERM; [[ -z "$pid" ]] || "$react" TERM "$pid"' TERM
    trap 'signalled=USR1; last_signal=USR1; [[ -z "$pid" ]] || "$react" USR1 "$pid"' USR1
    # From a terminal it reaches the command as well; its status is waited for.
    trap 'signalled=INT' INT
    "$@" &
    pid=$!
    case "${last_signal:-}" in TERM | USR1) "$react" "$last_signal" "$pid" ;; esac
    while [[ -n "$signalled" ]]; do
        signalled=""
        status=0
        # A signal ends `wait` too.
        wait "$pid" || status=$?
    done
    trap - TERM USR1 INT
    return "$status"
}

# started_as_rank: did torchrun, or anyone who sets its variables, start this as one of its ranks?
started_as_rank() {
    [[ -n "${RANK:-}" && -n "${LOCAL_RANK:-}" && -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" && "${WORLD_SIZE:-1}" != 1 ]]
}

# prepare_launch SCRIPT FLAG...: check, and set the array `launcher`, the first words of the command.
prepare_launch() {
    local processes port where level cores hostfile node
    has_gpu || true # Asked once: the subshells below do not pass the answer on.
    check_processes
    check_nodes
    check "$@"
    if ! has_gpu; then
        # Set here as well as for the ranks: DeepSpeed would look for other accelerators and say so.
        export DS_ACCELERATOR=cpu
    fi
    processes="$(process_count)"
    port="${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
    where=(--num_gpus "$processes")
    if [[ -n "${DRDPO_HOSTFILE:-}" ]]; then
        where=(--hostfile "$DRDPO_HOSTFILE")
    elif (($(node_count) > 1)); then
        # Names stand for numbers: without ssh nobody looks them up.
        hostfile="$(mktemp)"
        # shellcheck disable=SC2064 # of this name, now
        trap "rm -f $(printf '%q' "$hostfile")" EXIT
        for ((node = 0; node < $(node_count); node++)); do
            echo "node$node slots=$processes"
        done >"$hostfile"
        where=(--hostfile "$hostfile" --no_ssh --node_rank "${DRDPO_NODE_RANK:-$SLURM_NODEID}" --master_addr "$MASTER_ADDR")
    elif has_gpu && [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
        # --num_gpus would count from device 0, whatever is visible.
        where=(--include "localhost:$(tr -d ' ' <<<"$CUDA_VISIBLE_DEVICES" | cut -d, -f"1-$processes")")
    elif ((processes > 1)); then
        cores="$(getconf _NPROCESSORS_ONLN)"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    fi
    # On one machine the launcher's only warning is that there is no list of machines; ranks have loggers of their own.
    level=warning
    [[ "${where[0]}" == --hostfile ]] || level=error
    launcher=(deepspeed "${where[@]}" --no_local_rank --master_port "$port" --log_level "$level")
}

# launch_if_several SCRIPT FLAG...: as `launch`, but a single process needs no launcher.
launch_if_several() {
    if wants_help "$@" || (($(process_count) > 1)); then
        launch "$@"
    else
        # Left over from a cluster's template, these would have it wait for ranks that never come.
        (unset RANK LOCAL_RANK WORLD_SIZE && run python "$@")
    fi
}
