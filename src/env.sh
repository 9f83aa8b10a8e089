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
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 # The stack of a crash outside Python, such as a kernel's.
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

# check_launch NODES NODE: can the processes be started, on so many machines, of which this is number NODE?
check_launch() {
    local gpus
    gpus="$(visible_gpus)"
    [[ "$(process_count)" =~ ^[1-9][0-9]*$ ]] || refuse_command "DRDPO_PROCESSES=${DRDPO_PROCESSES:-} is not a number from 1"
    ((gpus == 0 || $(process_count) <= gpus)) ||
        refuse_command "DRDPO_PROCESSES=$DRDPO_PROCESSES, but $gpus GPUs are visible; one process needs one GPU"
    [[ "$1" =~ ^[1-9][0-9]*$ ]] || refuse_command "DRDPO_NODES=$1 is not a number from 1"
    (($1 > 1)) || return 0
    if [[ ! "$2" =~ ^[0-9]+$ ]] || (($2 >= $1)); then
        refuse_command "DRDPO_NODES=$1, but DRDPO_NODE_RANK=$2 is not this machine's number, from 0"
    fi
    [[ -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" ]] ||
        refuse_command "DRDPO_NODES=$1 needs MASTER_ADDR, the first machine, and MASTER_PORT, a free port there"
}

# prepare_launch LOGS SCRIPT FLAG...: set the array `launched`, the command that runs a script on one process per GPU: python for a
# single one, torchrun for several, after a check of flags and inputs. LOGS: where the processes' output goes, or /dev/null.
prepare_launch() {
    local logs="$1" nodes="${DRDPO_NODES:-1}" node="${DRDPO_NODE_RANK:-${SLURM_NODEID:-}}" processes cores where
    shift
    launched=(python "$@")
    if wants_help "$@"; then
        launched=(python "$1" --help)
        return
    fi
    # torchrun, or whoever sets its variables, started this as one of its processes.
    if [[ -n "${RANK:-}" && -n "${LOCAL_RANK:-}" && -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" && "${WORLD_SIZE:-1}" != 1 ]]; then
        return
    fi
    # Left over from a cluster's template, these would have a single process wait for others that never come.
    unset RANK LOCAL_RANK WORLD_SIZE
    # Noted here: the subshells below do not pass the number on. DeepSpeed would look for other accelerators, and say so.
    has_gpu || export DS_ACCELERATOR=cpu
    check_launch "$nodes" "$node"
    processes="$(process_count)"
    ((processes * nodes > 1)) || return 0
    WORLD_SIZE="$((processes * nodes))" python "$@" --check_only=true
    cores="$(getconf _NPROCESSORS_ONLN)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    where=(--standalone --local-addr=127.0.0.1)
    if ((nodes > 1)); then
        where=(--nnodes="$nodes" --node-rank="$node" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
    fi
    launched=(python -P "$ROOT/src/drdpo/launch.py" "${where[@]}" --nproc-per-node="$processes" --log-dir="$logs" "$@")
}

# launch SCRIPT FLAG...: run a script on one process per GPU.
launch() {
    local launched
    prepare_launch /dev/null "$@"
    run "${launched[@]}"
}

# launch_run SCRIPT FLAG...: as `launch`, in place of this shell, so that its signals reach the processes. Several processes
# also write to a folder in <save_path>/logs, a new one each start.
launch_run() {
    local launched logs
    logs="$(flag_value save_path "$@")/logs/$(date +%Y-%m-%dT%H.%M.%S).$HOSTNAME"
    # A dry run writes nothing.
    [[ " $*" != *" --dry"[_-]run* ]] || logs=/dev/null
    prepare_launch "$logs" "$@"
    run exec "${launched[@]}"
}

# run_noting COMMAND...: run a command, pass SIGTERM and SIGUSR1 on to it, and give its status; `last_signal` is the last of them.
run_noting() {
    local pid="" status=0 signalled=yes
    last_signal=""
    trap 'signalled=yes last_signal=TERM; [[ -z "$pid" ]] || kill -s TERM "$pid"' TERM INT
    trap 'signalled=yes last_signal=USR1; [[ -z "$pid" ]] || kill -s USR1 "$pid"' USR1
    "$@" &
    pid=$!
    [[ -z "$last_signal" ]] || kill -s "$last_signal" "$pid"
    while [[ -n "$signalled" ]]; do
        signalled=""
        status=0
        # A signal ends `wait` too.
        wait "$pid" || status=$?
    done
    trap - TERM USR1 INT
    return "$status"
}
