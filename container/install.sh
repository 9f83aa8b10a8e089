#!/usr/bin/env bash
# What drdpo.def and Dockerfile run as root in Debian 12, with setup.sh, requirements/ and src/ in the folder above this one:
#     bash container/install.sh cpu|gpu|gpu-cu12
# The environment is made in that folder by setup.sh itself; models and prompts stay outside the image.
set -euo pipefail

lock="$1"
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet=2
# Triton and vLLM compile when a kernel runs first; manifests name the commit, of a checkout that may belong to another user.
apt-get install --quiet=2 --yes --no-install-recommends ca-certificates g++ git python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*
git config --system --add safe.directory '*'
PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 bash "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" --packages="$lock" --models=none --datasets=none
