# shellcheck shell=bash
# Sourced by every wrapper: strict mode, repository root, the environment made by setup.sh, `run` and `launch`.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export ROOT

# refuse_command MESSAGE [STATUS]: end, as after a usage error.
refuse_command() {
    echo "error: $1" >&2
    exit "${2:-2}"
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
    [[ -x "$prefix/bin/python" ]] || refuse_command "the environment $prefix is gone; run: bash setup.sh" 1
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
gpu_count="" # See ask_driver.

# run COMMAND...: print a command, then run it.
run() {
    printf '+ %s\n' "$(printf '%q ' "$@")" >&2
    "$@"
}

# wants_help FLAG...: is --help among the flags?
wants_help() {
    grep -qxE -e '-h|--help' < <(printf '%s\n' "$@")
}

# flag_value NAME FLAG...: the value of --NAME=value or --NAME value, or of NAME in the file of --config.
flag_value() {
    local name="$1" value="" file=""
    while shift && (($#)); do
        # drdpo.cli accepts dashes for underscores.
        case "$1" in
            "--$name="* | "--${name//_/-}="*) value="${1#*=}" ;;
            "--$name" | "--${name//_/-}") value="${2:-true}" ;;
            --config=*) file="${1#*=}" ;;
            --config) file="${2:-}" ;;
        esac
    done
    # An unreadable file is reported by the step itself.
    [[ -n "$value" || -z "$file" ]] ||
        value="$(python -c 'import sys; from drdpo.cli import flag_in_file; print(flag_in_file(*sys.argv[1:]))' "$file" "$name" 2>/dev/null || true)"
    printf '%s' "$value"
}

# is_set NAME FLAG...: is the flag --NAME set, alone or to a value that means true?
is_set() {
    local value
    value="$(flag_value "$@")"
    [[ ! "${value,,}" =~ ^(|n|no|f|false|0)$ ]]
}

# ask_driver: set gpu_count, once, to the number of GPUs to start a process for, and cuda_version to what the driver runs, e.g.
# 12040 for CUDA 12.4. Why torch cannot use GPUs that are there is for the steps to say.
ask_driver() {
    # shellcheck disable=SC2034 # setup.sh reads cuda_version.
    [[ -n "$gpu_count" ]] ||
        read -r gpu_count cuda_version < <(python -c 'from drdpo.machine import ask_driver; print(*ask_driver())')
}

# has_gpu: is a GPU visible?
has_gpu() {
    ask_driver && ((gpu_count > 0))
}

# launch LOGS SCRIPT FLAG...: replace this shell, so that signals arrive, by a script with one process per GPU, or with
# $DRDPO_PROCESSES: python for a single one, torchrun for several, after checking flags and inputs. LOGS: the folder for the
# processes' output, or /dev/null. With launch_nodes=1 the other machines of DRDPO_NODES have launchers of their own.
launch() {
    local logs="$1" nodes="${launch_nodes:-${DRDPO_NODES:-1}}" node="${DRDPO_NODE_RANK:-${SLURM_NODEID:-}}" processes cores where
    shift
    ! wants_help "$@" || exec python "$1" --help
    # torchrun, or another launcher that sets its variables, started this shell as one of its processes.
    if [[ -n "${RANK:-}" && -n "${LOCAL_RANK:-}" && -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" && "${WORLD_SIZE:-1}" != 1 ]]; then
        run exec python "$@"
    fi
    # With these left over from a cluster's template, a single process would wait for others forever.
    unset RANK LOCAL_RANK WORLD_SIZE
    ask_driver
    processes="${DRDPO_PROCESSES:-$((gpu_count > 0 ? gpu_count : 1))}"
    [[ "$processes" =~ ^[1-9][0-9]*$ ]] || refuse_command "DRDPO_PROCESSES=$processes is not a positive number"
    ((gpu_count == 0 || processes <= gpu_count)) ||
        refuse_command "DRDPO_PROCESSES=$processes, but $gpu_count GPUs are visible; one process needs one GPU"
    [[ -z "${DRDPO_HOSTFILE:-}" ]] || refuse_command "DRDPO_HOSTFILE is not supported; set DRDPO_NODES on every machine"
    [[ "$nodes" =~ ^[1-9][0-9]*$ ]] || refuse_command "DRDPO_NODES=$nodes is not a positive number"
    where=(--standalone --local-addr=127.0.0.1)
    if ((nodes > 1)); then
        [[ "$node" =~ ^[0-9]+$ && "$node" -lt "$nodes" ]] ||
            refuse_command "DRDPO_NODES=$nodes, but DRDPO_NODE_RANK=$node is not this machine's number, from 0"
        [[ -n "${MASTER_ADDR:-}" && -n "${MASTER_PORT:-}" ]] ||
            refuse_command "DRDPO_NODES=$nodes needs MASTER_ADDR, the first machine, and MASTER_PORT, a free port there"
        where=(--nnodes="$nodes" --node-rank="$node" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
    fi
    ((processes * nodes > 1)) || run exec python "$@"
    WORLD_SIZE="$((processes * nodes))" python "$@" --check_only=true
    cores="$(getconf _NPROCESSORS_ONLN)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    run exec python -P "$ROOT/src/drdpo/launch.py" "${where[@]}" --nproc-per-node="$processes" --log-dir="$logs" "$@"
}

# launch_training SCRIPT FLAG...: the same; several processes also write to a new folder in <save_path>/logs, if they write at all.
launch_training() {
    local logs
    logs="$(flag_value save_path "$@")/logs/$(date +%Y-%m-%dT%H.%M.%S).$HOSTNAME"
    if is_set dry_run "$@" || is_set check_only "$@"; then logs=/dev/null; fi
    launch "$logs" "$@"
}

# Without an environment of its own a wrapper runs in the shell's, if that has the packages. setup.sh is about to make one.
if [[ -z "${DRDPO_ENV:-}${inside[*]-}" && ! -f "$ROOT/.environment" && "${0##*/}" != setup.sh ]] && ! wants_help "$@" &&
    ! python -c 'import sys, importlib.util as found; sys.exit(not (found.find_spec("torch") and found.find_spec("msgspec")))'; then
    refuse_command "there is no environment yet, and the python of this shell has no torch or msgspec; run: bash setup.sh" 1
fi
