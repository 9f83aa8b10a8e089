"""Print what a file or folder holds, with samples and dropped rows."""

from drdpo.cli import run_step
from drdpo.config import InspectConfig

if __name__ == "__main__":
    run_step(InspectConfig, __doc__, "drdpo.evaluation.inspection:inspect_data")
