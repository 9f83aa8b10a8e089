"""Print state, progress, speed and last metrics of a folder's run; draw its training curves."""

from drdpo.cli import run_step
from drdpo.config.evaluation import ShowRunConfig

if __name__ == "__main__":
    run_step(ShowRunConfig, __doc__, "drdpo.evaluation.show_run:show_run")
