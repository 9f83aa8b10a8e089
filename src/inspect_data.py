"""Print counts, quantiles and sample rows of prompts, completions, preference pairs or rejected rows."""

from drdpo.cli import run_step
from drdpo.config.evaluation import InspectConfig

if __name__ == "__main__":
    run_step(InspectConfig, __doc__, "drdpo.evaluation.inspection:inspect_data")
