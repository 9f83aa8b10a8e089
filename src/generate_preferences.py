"""Step 2: mix scored objectives into preference pairs."""

from drdpo.cli import run_step
from drdpo.config.data import PreferencesConfig

if __name__ == "__main__":
    run_step(PreferencesConfig, __doc__, "drdpo.pairing:generate_preferences")
