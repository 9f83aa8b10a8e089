"""Step 2: preference pairs."""

from drdpo.cli import parse
from drdpo.config import PreferencesConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(PreferencesConfig, "Mix scored objectives into preference pairs.")
    from drdpo.pairing import generate_preferences

    generate_preferences(config)


if __name__ == "__main__":
    with one_line_errors():
        main()
