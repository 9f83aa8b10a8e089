#!/usr/bin/env bash
# Step 3: align a policy; --kldpo_tau, --wdpo_rho, --drdpo_beta or --method=NAME:STRENGTH choose the method, none of them is DPO.
# SIGTERM or SIGUSR1: saves after the current step and ends with status 75; rerun the same command to resume. docs/reliability.md
source "$(dirname "${BASH_SOURCE[0]}")/src/env.sh"

launch_training "$ROOT/src/train_alignment.py" "$@"
