"""Train a network on its own: `python -m train.teacher --config train/configs/voicebank_teacher.yaml`."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help` for the options."""
    from train import command  # here, not above: the scoring processes import this module again

    return command.main(argv, "Train a teacher: a network on its own.", "teacher")


if __name__ == "__main__":
    sys.exit(main())
