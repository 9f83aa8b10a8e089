#!/usr/bin/env bash
# The paper's ArmoRM experiment: train on mixtures of two objectives, evaluate on all. Rerunning it skips finished steps.
# shellcheck source=experiments/parts.sh
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
