#!/usr/bin/env bash
# train_alignment.sh with a method of your own: own_method.py, described in docs/own.md.
# shellcheck source=src/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../src/env.sh"

launch_training "$ROOT/experiments/own_method.py" "$@"
