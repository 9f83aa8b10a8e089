"""Step 0: put models into models/ and prompts into datasets/, skipping what is there."""

from drdpo.cli import run_step
from drdpo.config.data import AssetsConfig

if __name__ == "__main__":
    run_step(AssetsConfig, __doc__, "drdpo.assets.download:download_assets")
