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

export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}"
export PYTHONUNBUFFERED=1
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

# visible_gpus: how many NVIDIA GPUs CUDA would see here.
visible_gpus() {
    local count=0
    if command -v nvidia-smi >/dev/null; then
        count="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
    fi
    # CUDA takes the numbers up to the first one that is negative; an empty list hides all.
    if ((count > 0)) && [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        count="$(awk -F, '{for (k = 1; k <= NF && $k !~ /^ *-/; k++); print k - 1}' <<<"$CUDA_VISIBLE_DEVICES")"
    fi
    printf '%s' "${count:-0}"
}

# has_gpu: is an NVIDIA GPU visible?
has_gpu() {
    (($(visible_gpus) > 0))
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

# check SCRIPT FLAG...: flags and inputs in one plain process, which knows how many there will be.
check() {
    WORLD_SIZE="$(process_count)" python "$@" --check_only=true
}

# launch SCRIPT FLAG...: run a script by DeepSpeed's launcher, one process per GPU, after `check`. --help and a wrong
# command never start the launcher.
launch() {
    local processes port where cores
    if wants_help "$@"; then
        python "$1" --help
        return
    fi
    if ! has_gpu; then
        # Set here as well as for the ranks: DeepSpeed would look for other accelerators and say so.
        export DS_ACCELERATOR=cpu
    fi
    check_processes
    check "$@"
    processes="$(process_count)"
    port="${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}"
    where=(--num_gpus "$processes")
    if has_gpu && [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
        # --num_gpus would count from device 0, whatever is visible.
        where=(--include "localhost:$(tr -d ' ' <<<"$CUDA_VISIBLE_DEVICES" | cut -d, -f"1-$processes")")
    elif ((processes > 1)); then
        cores="$(getconf _NPROCESSORS_ONLN)"
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
    fi
    run deepspeed "${where[@]}" --no_local_rank --master_port "$port" --log_level warning "$@"
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
