#!/usr/bin/env bash
# Step 1: sample completions of every prompt, then score them.
source "$(dirname "${BASH_SOURCE[0]}")/src/env.sh"

if wants_help "$@"; then
    python "$ROOT/src/generate_completions.py" --help
    exit
fi
run python "$ROOT/src/generate_completions.py" "$@"
launch "$ROOT/src/score_completions.py" "$@"
