#!/usr/bin/env bash
# Step 1: sample completions of every prompt, then score them.
source "$(dirname "${BASH_SOURCE[0]}")/src/env.sh"

! wants_help "$@" || exec python "$ROOT/src/generate_completions.py" --help
# A wrong reward model is refused before the sampling. A check with WORLD_SIZE alone leaves it to the run to print --dtype.
WORLD_SIZE=1 python "$ROOT/src/score_completions.py" "$@" --check_only=true
run python "$ROOT/src/generate_completions.py" "$@"
launch /dev/null "$ROOT/src/score_completions.py" "$@"
