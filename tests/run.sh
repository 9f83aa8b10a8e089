#!/usr/bin/env bash
# The one test command: bash tests/run.sh [words for pytest]. Stops at the first part that fails.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

# part NAME COMMAND...: run one part; say which one failed.
part() {
    local name="$1"
    shift
    echo "== $name"
    "$@" || {
        local status=$?
        echo "FAILED: $name" >&2
        exit "$status"
    }
}

part setup bash setup.sh --models=embedded --datasets=embedded --dev
source src/env.sh

mapfile -t scripts < <(find . -name .venv -prune -o \( -name '*.sh' -o -name '*.slurm' -o -path './.ci/run' \) -type f -print | sort)
part "ruff check" ruff check src tests benchmarks
part "ruff format" ruff format --check src tests benchmarks
part shellcheck shellcheck --external-sources "${scripts[@]}"
part mypy mypy
part pytest python -m pytest "$@"
