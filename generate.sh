#!/usr/bin/env bash
# Step 4a: sample and score completions of a trained checkpoint, then print and write the mean of every objective.
source "$(dirname "${BASH_SOURCE[0]}")/src/env.sh"

if wants_help "$@"; then
    python "$ROOT/src/generate_completions.py" --help
    exit
fi

# checks_only FLAG...: is --check_only set, alone or to a value that means true?
checks_only() {
    local value=false
    while (($#)); do
        case "$1" in
            --check[_-]only=*) value="${1#*=}" ;;
            --check[_-]only) value="${2:-true}" ;;
        esac
        shift
    done
    case "${value,,}" in n | no | f | false | 0) return 1 ;; esac
}

bash "$ROOT/generate_completions.sh" "$@"
if checks_only "$@"; then
    exit
fi
save_path="$(flag_value save_path "$@")"
run python "$ROOT/src/evaluate_armorm.py" --runs "$(basename "$save_path")=$save_path" --output_path="$save_path"
