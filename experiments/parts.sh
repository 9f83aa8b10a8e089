# shellcheck shell=bash
# Sourced by the wrappers: NAME.sh runs NAME.py in the environment, a part of it as a SLURM job.
# shellcheck source=src/slurm.sh
source "$(dirname "${BASH_SOURCE[0]}")/../src/slurm.sh"

experiment=(python "$ROOT/experiments/$(basename "$0" .sh).py" "$@")
if [[ -n "${SLURM_JOB_ID:-}" && -n "$(flag_value part "$@")" ]]; then
    DRDPO_NODES=1 job_step "${experiment[@]}" # openllm_eval.slurm is not to queue the job too.
else
    exec "${experiment[@]}"
fi
