"""Step 4a: average the objectives of runs; write scores.csv, report.md and a spider plot."""

from drdpo.cli import run_step
from drdpo.config.evaluation import EvaluateConfig

if __name__ == "__main__":
    run_step(EvaluateConfig, __doc__, "drdpo.evaluation.compare:evaluate_armorm")
