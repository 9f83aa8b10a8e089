"""Step 0: models and prompts."""

from drdpo.cli import parse
from drdpo.config import AssetsConfig
from drdpo.errors import one_line_errors


def main() -> None:
    config = parse(AssetsConfig, "Put models into models/ and prompts into datasets/, skipping what is there.")
    from drdpo.assets.download import download_assets

    download_assets(config)


if __name__ == "__main__":
    with one_line_errors():
        main()
