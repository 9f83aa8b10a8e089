"""Step 3: align a policy."""

import signal
import sys
from collections.abc import Callable
from typing import Any

from drdpo.cli import parse
from drdpo.config.training import TrainConfig
from drdpo.errors import one_line_errors


def main(config_class: type[TrainConfig] = TrainConfig, own_method: Callable[[Any], Any] | None = None) -> None:
    """Train; own_method makes the Method of a config (docs/own.md), by default the one that the flags choose."""
    # They wait until drdpo.training.loop handles them: a run that is still starting ends with status 75 too.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    # DeepSpeed's launcher adds a flag, which only repeats the variable LOCAL_RANK.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    config = parse(config_class, "Align a policy by DPO, KLDPO, WDPO and other robust methods under DeepSpeed.", words)
    from drdpo.training.losses import method_of
    from drdpo.training.run import check_inputs

    method = (own_method or method_of)(config)
    check_inputs(config, method)
    if not config.check_only:
        from drdpo.training.loop import train_alignment

        train_alignment(config, method)


if __name__ == "__main__":
    with one_line_errors():
        main()
