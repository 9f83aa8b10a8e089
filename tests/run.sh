#!/usr/bin/env bash
# The one test command: bash tests/run.sh [words for pytest]. Stops at the first part that fails, and names it.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# part NAME COMMAND...: run one part.
part() {
    local name="$1" status
    shift
    echo "== $name"
    "$@" || {
        status=$?
        echo "FAILED: $name" >&2
        exit "$status"
    }
}

part setup bash setup.sh --models=embedded --datasets=embedded --dev
source src/env.sh

python_folders=(src tests)
for folder in benchmarks experiments; do
    [[ ! -d "$folder" ]] || python_folders+=("$folder")
done
mapfile -t bash_files < <(find . \( -name .venv -o -path ./models -o -path ./datasets -o -path ./outputs -o -name .git \) -prune \
    -o -type f \( -name '*.sh' -o -name '*.slurm' -o -path ./.ci/run -o -path './tests/harness/bin/*' \) -print | sort)

part "ruff check" ruff check "${python_folders[@]}"
part "ruff format" ruff format --check "${python_folders[@]}"
part shellcheck shellcheck --external-sources "${bash_files[@]}"
part mypy mypy
# Two workers, a file at a time, as its fixtures cost most of it, in the order of tests/conftest.py; -n 0 after it is one process.
part pytest python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
