"""Step 3: align a policy."""

import signal

from drdpo.config import TrainConfig
from drdpo.errors import one_line_errors
from drdpo.flags import parse


def main(config_class: type[TrainConfig] = TrainConfig) -> None:
    # Until drdpo.training.stop handles them, they wait: the run is not ended without a word during its long start.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    config = parse(config_class, "Align a policy by DPO, KLDPO, WDPO or Dr. DPO under DeepSpeed.")
    from drdpo.training.run import check_inputs

    check_inputs(config)
    if config.check_only:
        return
    from drdpo.training.loop import train_alignment

    train_alignment(config)


if __name__ == "__main__":
    with one_line_errors():
        main()
