#!/usr/bin/env bash
# Methods under a shift of people's preferences: HelpSteer2's human ratings, docs/label_shift.md. Rerunning it continues.
# shellcheck source=experiments/parts.sh
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
