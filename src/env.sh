# shellcheck shell=bash
# Sourced by every wrapper: strict mode, repository root, the environment made by setup.sh, `run` and `launch`.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export ROOT

# refuse_command MESSAGE: end with a usage error.
refuse_command() {
    echo "error: $1" >&2
    exit 2
}

# CONTAINER=drdpo.sif (container/drdpo.def) brings the environment: a wrapper starts again inside that image. One that has work
# outside, such as scontrol's, sets `outside` and puts "${inside[@]}" before what belongs into the image.
inside=()
if [[ -n "${CONTAINER:-}" && "${0##*/}" != setup.sh ]]; then
    command -v apptainer >/dev/null || refuse_command "CONTAINER=$CONTAINER, but there is no apptainer on this machine's PATH"
    [[ -e "$CONTAINER" ]] ||
        refuse_command "CONTAINER=$CONTAINER does not exist in $PWD; make it: apptainer build drdpo.sif container/drdpo.def"
    inside=(env CONTAINER= apptainer exec --nv --bind "$ROOT")
    [[ "$PWD/" == "$ROOT/"* ]] || inside+=(--bind "$PWD") # Apptainer warns of what is bound twice.
    inside+=("$CONTAINER")
    [[ "${outside:-}" == true ]] || exec "${inside[@]}" bash "$0" "$@"
fi

# setup.sh records the prefix of the environment, whether conda's or a venv, in .environment. Its bin comes first on PATH.
if [[ -z "${inside[*]-}" && (-n "${DRDPO_ENV:-}" || -f "$ROOT/.environment") ]]; then
    prefix="${DRDPO_ENV:-$(<"$ROOT/.environment")}"
    if [[ ! -x "$prefix/bin/python" ]]; then
        echo "error: the environment $prefix is gone; run: bash setup.sh" >&2
        exit 1
    fi
    export PATH="$prefix/bin:$PATH"
    unset prefix
fi

# Scripts outside src/ import this clone's drdpo, even if another clone is installed in the environment.
export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 # The second prints the stack of a crash outside Python, e.g. in a kernel.
# In a log file each update of a progress bar would be a line.
[[ -t 2 ]] || export HF_HUB_DISABLE_PROGRESS_BARS="${HF_HUB_DISABLE_PROGRESS_BARS:-1}"
# Waiting threads sleep instead of spinning, which made vLLM ten times slower on shared cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
gpu_count="" # See count_gpus.

# run COMMAND...: print a command, then run it.
run() {
    printf '+ ' >&2
    printf '%q ' "$@" >&2
    printf '\n' >&2
    "$@"
}

# wants_help FLAG...: is --help among the flags?
wants_help() {
    local word
    for word in "$@"; do
        case "$word" in -h | --help) return 0 ;; esac
    done
    return 1
}

# flag_value NAME FLAG...: the value of --NAME=value or --NAME value, or of NAME in the file of --config.
flag_value() {
    local name="$1" value="" file=""
    shift
    while (($#)); do
        # drdpo.cli accepts dashes for underscores.
        case "$1" in
            "--$name="* | "--${name//_/-}="*) value="${1#*=}" ;;
            "--$name" | "--${name//_/-}") value="${2:-true}" ;;
            --config=*) file="${1#*=}" ;;
            --config) file="${2:-}" ;;
        esac
        shift
    done
    if [[ -z "$value" && -n "$file" ]]; then
        # An unreadable file is reported by the step itself.
        value="$(python -c 'import sys; from drdpo.cli import flag_in_file; print(flag_in_file(*sys.argv[1:]))' "$file" "$name" 2>/dev/null || true)"
    fi
    printf '%s' "$value"
}

# is_set NAME FLAG...: is the flag --NAME set, alone or to a value that means true?
is_set() {
    local value
    value="$(flag_value "$@")"
    [[ ! "${value,,}" =~ ^(|n|no|f|false|0)$ ]]
}

# ask_cuda: print how many GPUs CUDA sees and the driver's CUDA version, e.g. "8 12040" for 12.4; nothing without a driver. It
# needs neither nvidia-smi, which containers may lack, nor torch, which setup.sh has yet to install.
ask_cuda() {
    [[ -e /dev/nvidiactl || -e /dev/dxg ]] || return 0
    python -c 'import ctypes
cuda, count, version = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
cuda.cuDriverGetVersion(ctypes.byref(version))
seen = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value if seen else 0, version.value)' 2>/dev/null || true
}

# count_gpus: set gpu_count, once, to the number of GPUs that CUDA sees. If it sees none, count those that nvidia-smi lists; the
# steps then report why CUDA cannot use them. An empty CUDA_VISIBLE_DEVICES, or DS_ACCELERATOR=cpu, hides all.
count_gpus() {
    local listed
    [[ -z "$gpu_count" ]] || return 0
    gpu_count=0
    [[ "${DS_ACCELERATOR:-}" != cpu && -n "${CUDA_VISIBLE_DEVICES-unset}" ]] || return 0
    gpu_count="$(ask_cuda)"
    gpu_count="$((${gpu_count% *}))"
    ((gpu_count == 0)) && command -v nvidia-smi >/dev/null || return 0
    listed="$(timeout 10 nvidia-smi --list-gpus 2>&1)" || echo "note: nvidia-smi fails: ${listed%%$'\n'*}" >&2
    gpu_count="$(grep -c '^GPU' <<<"$listed" || true)"
    [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]] || return 0
    # CUDA stops at the first number that is negative or that no GPU has. SLURM writes NoDevFiles for none.
    gpu_count="$(awk -v RS=, -v count="$gpu_count" '
        count == 0 || NF == 0 || $1 ~ /^(-|NoDevFiles)/ || ($1 ~ /^[0-9]+$/ && $1 >= count) { exit }
        { visible++ }
        END { print visible + 0 }' <<<"$CUDA_VISIBLE_DEVICES")"
}

# has_gpu: is a GPU visible?
has_gpu() {
    count_gpus
    ((gpu_count > 0))
}

# check_launch PROCESSES NODES NODE: refuse to start so many processes on each of NODES machines, of which this is number NODE.
check_launch() {
    [[ "$1" =~ ^[1-9][0-9]*$ ]] || refuse_command "DRDPO_PROCESSES=$1 is not a positive number"
    [[ -z "${DRDPO_HOSTFILE:-}" ]] || refuse_command "DRDPO_HOSTFILE is not supported; set DRDPO_NODES on every machine"
    ((gpu_count == 0 || $1 <= gpu_count)) ||
        refuse_command "DRDPO_PROCESSES=$1, but $gpu_count GPUs are visible; one process needs one GPU"
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || refuse_command "DRDPO_NODES=$2 is not a positive number"
    (($2 > 1)) || return 0
    if [[ ! "$3" =~ ^[0-9]+$ ]] || (($3 >= $2)); then
        refuse_command "DRDPO_NODES=$2, but DRDPO_NODE_RANK=$3 is not this machine's number, from 0"
    fi
    [[ -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" ]] ||
        refuse_command "DRDPO_NODES=$2 needs MASTER_ADDR, the first machine, and MASTER_PORT, a free port there"
}

# prepare_launch LOGS SCRIPT FLAG...: set the array `launched` to the command that runs a script with one process per GPU, or
# with $DRDPO_PROCESSES: python for a single one, torchrun for several, after checking flags and inputs. LOGS: the folder for
# the processes' output, or /dev/null. With launch_nodes=1 the other machines of DRDPO_NODES have launchers of their own.
prepare_launch() {
    local logs="$1" nodes="${launch_nodes:-${DRDPO_NODES:-1}}" node="${DRDPO_NODE_RANK:-${SLURM_NODEID:-}}" processes cores where
    shift
    launched=(python "$@")
    if wants_help "$@"; then
        launched=(python "$1" --help)
        return
    fi
    # torchrun, or another launcher that sets its variables, started this shell as one of its processes.
    if [[ -n "${RANK:-}" && -n "${LOCAL_RANK:-}" && -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" && "${WORLD_SIZE:-1}" != 1 ]]; then
        return
    fi
    # With these left over from a cluster's template, a single process would wait for others forever.
    unset RANK LOCAL_RANK WORLD_SIZE
    has_gpu || export DS_ACCELERATOR=cpu # Otherwise DeepSpeed looks for other accelerators, and prints so.
    processes="${DRDPO_PROCESSES:-$((gpu_count > 0 ? gpu_count : 1))}"
    check_launch "$processes" "$nodes" "$node"
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

# exec_launch SCRIPT FLAG...: the same, replacing this shell, so that signals reach the processes. Several processes also write to
# a folder in <save_path>/logs, a new one for each start.
exec_launch() {
    local launched logs
    logs="$(flag_value save_path "$@")/logs/$(date +%Y-%m-%dT%H.%M.%S).$HOSTNAME"
    # These write nothing.
    if is_set dry_run "$@" || is_set check_only "$@"; then
        logs=/dev/null
    fi
    prepare_launch "$logs" "$@"
    run exec "${launched[@]}"
}

# run_noting COMMAND...: run a command, pass SIGTERM and SIGUSR1 on to it, set last_signal to the last of them, return its status.
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

# Without an environment of its own a wrapper runs in the shell's, if that has the packages. setup.sh is about to make one.
if [[ -z "${DRDPO_ENV:-}${inside[*]-}" && ! -f "$ROOT/.environment" && "${0##*/}" != setup.sh ]] && ! wants_help "$@" &&
    ! python -c 'import sys, importlib.util as found; sys.exit(not (found.find_spec("torch") and found.find_spec("msgspec")))'; then
    echo "error: there is no environment yet, and the python of this shell has no torch or msgspec; run: bash setup.sh" >&2
    exit 1
fi
