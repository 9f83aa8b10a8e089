#!/usr/bin/env bash
# Step 3: align a policy; --kldpo_tau, --wdpo_rho or --drdpo_beta choose the method, none of them is DPO.
source "$(dirname "${BASH_SOURCE[0]}")/src/env.sh"

launch "$ROOT/src/train_alignment.py" "$@"
