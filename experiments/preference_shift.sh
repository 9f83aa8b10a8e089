#!/usr/bin/env bash
# Preference shift as in the paper's section 7.1, docs/preference_shift.md. Rerunning it skips finished runs.
# shellcheck source=experiments/parts.sh
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
