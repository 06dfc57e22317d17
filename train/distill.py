"""Train a student with a teacher: `python -m train.distill --config train/configs/voicebank_mvat.yaml`.

transfer.method "none" trains the student alone, to compare with.
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help` for the options."""
    from train import command  # here, not above: the scoring processes import this module again

    return command.main(argv, "Train a student: with a teacher's attention maps, its output, or alone.", "student")


if __name__ == "__main__":
    sys.exit(main())
