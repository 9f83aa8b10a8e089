#!/usr/bin/env bash
# The paper's leaderboard experiment: best against worst of ten by ArmoRM's gated score. Rerunning it skips finished steps.
# shellcheck source=experiments/parts.sh
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
