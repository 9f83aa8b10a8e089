"""Step 4: set the gains of several training mixtures beside the published ones."""

from drdpo.cli import run_step
from drdpo.config.evaluation import CompareMixturesConfig

if __name__ == "__main__":
    run_step(CompareMixturesConfig, __doc__, "drdpo.evaluation.mixtures:compare_mixtures")
