#!/usr/bin/env bash
# Step 4a: sample and score completions of a trained checkpoint, then print and write the mean of every objective.
source "$(dirname "${BASH_SOURCE[0]}")/src/env.sh"

bash "$ROOT/generate_completions.sh" "$@"
if wants_help "$@" || is_set check_only "$@"; then
    exit
fi
save_path="$(flag_value save_path "$@")"
run python "$ROOT/src/evaluate_armorm.py" --runs "$(basename "$save_path")=$save_path" --output_path="$save_path"
