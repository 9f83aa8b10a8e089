"""Put fitted reward heads on their backbone."""

from drdpo.config import AssembleConfig
from drdpo.errors import one_line_errors
from drdpo.flags import parse


def main() -> None:
    config = parse(AssembleConfig, "Put the heads that src/fit_reward_heads.py wrote on their backbone.")
    from drdpo.assets.reward_model import assemble_reward_model

    assemble_reward_model(config)


if __name__ == "__main__":
    with one_line_errors():
        main()
