"""Does attention transfer distil? One command that finds out: python -m train.study train/configs/study_pairs.yaml

It trains, with as many steps each and several seeds, a teacher (or takes a given one) and students of several sizes:
alone and taught by every method of the configuration. Each method's weight is chosen on the validation recordings, with
as many trials for every method; then all are scored on the test set. What comes out stands in the study's folder:
study.json, study.md, figures, and a run folder for each run, so that `python -m train.report FOLDER` shows them too.

The interval of the difference to the student alone is over seeds and files at once, see train.study_statistics.

Killed at any point, the same command goes on; a finished run is not done again. Keys of the configuration are options
too (--run.optim.epochs 20); --help lists them.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.study_config import StudyConfig


def study(config: "StudyConfig") -> dict[str, Any]:
    """Do what is left of a study; returns its record, see `train.study_results.gather`.

    Raises:
        ValueError: the data or the folder cannot be used, the teacher diverged, or no weight of a method was usable.
        OSError: a file cannot be written.
    """
    from train.study_results import write
    from train.study_runs import Plan, Runner

    plan = Plan(config)
    runner = Runner(plan)
    runner.check()
    runner.teachers()
    choices = {
        (student, name): runner.choose(student, name)
        for student in range(len(config.students))
        for name, method in config.methods.items()
        if method.method != "none"
    }
    record: dict[str, Any] = {}
    for jobs in plan.finals({key: weight for key, (weight, _) in choices.items()}):
        for job in jobs:
            if not runner.train(job).diverged:
                runner.score(job.folder, job.folder / "best.pt")
        # What is known after every seed can be read while the next one trains.
        record = write(plan, choices)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when the study is finished, 2 with one line for what the user must mend."""
    # Here, not above: the scoring processes import this module again.
    from mvat.kernels import current_backend
    from train import command, study_config, study_text

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    try:
        if not arguments:
            raise ValueError("name a configuration, such as train/configs/study_pairs.yaml")
        current_backend()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("a study runs in one process; torchrun is for train.teacher and train.distill")
        config = study_config.parse(arguments, (__doc__ or "").splitlines()[0])
        record = study(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return command.failed("train.study", error)
    except KeyboardInterrupt as stop:
        return command.stopped(stop)
    print("\n" + study_text.summary(record))
    print(f"{config.out}: study.md, study.json and figures; python -m train.report {config.out} shows the runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
