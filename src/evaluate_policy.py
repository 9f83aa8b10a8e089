"""Step 4a without sampling: expected scores of policies on scored completions of the starting model."""

from drdpo.cli import parse
from drdpo.config import EvaluatePolicyConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(EvaluatePolicyConfig, "Expected scores of policies on scored completions of their starting model.")
    from drdpo.evaluation.policy_value import evaluate_policy

    evaluate_policy(config)


if __name__ == "__main__":
    with one_line_errors():
        main()
