"""Step 4a without sampling: expected scores of policies on scored completions of the starting model."""

from drdpo.cli import run_step
from drdpo.config.evaluation import EvaluatePolicyConfig

if __name__ == "__main__":
    run_step(EvaluatePolicyConfig, __doc__, "drdpo.evaluation.policy_value:evaluate_policy")
