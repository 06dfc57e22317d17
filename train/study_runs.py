"""The runs of a study: which there are, in which order, and how each is done once.

The folder of a study:

    teacher_seedN/                      a teacher's run; teacher/, scores alone, where a checkpoint was given
    noisy/                              the scores of the noisy input
    student_STUDENT_METHOD_seedN/       a student's run
    trials/STUDENT_METHOD_wW_seedN/     a short run that helps to choose a weight; it is not scored on the test set
    study.json, study.md, *.svg         what came out, see train.study_results

so that `python -m train.report FOLDER` finds the runs. A run folder holds finished.json once its training has ended,
the sign that it need not be looked at again. Runs are done in this process, one after the other: a killed study leaves
no process behind that would go on writing where the next one goes on, and no run pays for starting Python and PyTorch.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvat.files import write_text
from mvat.metrics import PESQ_METRICS, score_files
from mvat.models import count_flops
from train import command, manifest
from train.config import ModelConfig, RunConfig, TransferConfig, completed, differences
from train.evaluate import SCORES_FORMAT, RecordError, evaluate, read_record
from train.solver import FREE_KEYS, DivergedError
from train.study_config import StudyConfig, model_name, transfer_config

FINISHED_FORMAT = "mvat-study-run-1"


@dataclass(frozen=True)
class Job:
    """A run of the study.

    Attributes:
        config: of the run; `config.out` is its folder.
        kind: "teacher" or "student".
        student: name of the student, or of the teacher's model.
        method: name of the method; that of the student alone for a teacher.
        trial: whether it only helps to choose a weight.
        cost: how long it takes, in units of its own.
    """

    config: RunConfig
    kind: str
    student: str
    method: str
    trial: bool
    cost: float

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.out)

    @property
    def text(self) -> str:
        """The run in words."""
        weight = "" if self.config.transfer.method == "none" else f", weight {self.config.transfer.weight:g}"
        return f"{'trial of ' if self.trial else ''}{self.config.label}{weight}, seed {self.config.seed}"


@dataclass(frozen=True)
class Finished:
    """What became of a run: finished.json.

    Attributes:
        steps: training steps made.
        seconds: that it took.
        best: the best validation score, of run.valid.select; None where there is none.
        diverged: why it came to no end, or None.
    """

    steps: int
    seconds: float
    best: float | None
    diverged: str | None


class Plan:
    """The jobs of a study and the folders they write to."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        self._teacher_cost = count_flops(config.teacher.arguments)
        if config.teacher.checkpoint is not None:
            self.teacher_checkpoints = [Path(config.teacher.checkpoint)]
        else:
            self.teacher_checkpoints = [job.folder / "best.pt" for job in self.teachers()]
        self._costs = [count_flops(student.arguments) for student in config.students]

    def teachers(self) -> list[Job]:
        """The teachers to train; none where a checkpoint was given."""
        model, seeds = self.config.teacher.model, self.config.teacher_seeds
        if model is None:
            return []
        name, jobs = model_name(model), []
        for seed in seeds:
            folder, label, epochs = self.out / f"teacher_seed{seed}", f"teacher ({name})", self.config.teacher.epochs
            run = self._run(folder, model, seed, label, TransferConfig(), epochs)
            cost = 3 * self._teacher_cost * run.optim.epochs
            jobs.append(Job(run, "teacher", name, self.config.alone, False, cost))
        return jobs

    def trials(self, student: int, method: str) -> dict[float, list[Job]]:
        """Weight -> its trials; empty where there is nothing to choose."""
        weights, trials = self.config.methods[method].weights, self.config.trials
        if len(weights) < 2:
            return {}
        return {
            weight: [self._job(student, method, weight, place, seed, True) for place, seed in enumerate(trials.seeds)]
            for weight in weights
        }

    def finals(self, weights: dict[tuple[int, str], float]) -> Iterator[list[Job]]:
        """The students' runs, seed by seed; `weights` holds the choice of every (student, method) but "none"."""
        for place, seed in enumerate(self.config.seeds):
            yield [
                self._job(student, method, weights.get((student, method), 0.0), place, seed, False)
                for student in range(len(self.config.students))
                for method in self.config.methods
            ]

    def everything(self) -> list[Job]:
        """All jobs, to count them; the weights of the students' runs are not the ones that will be chosen."""
        jobs = self.teachers()
        for student in range(len(self.config.students)):
            for method in self.config.methods:
                jobs += [job for trials in self.trials(student, method).values() for job in trials]
        return jobs + [job for jobs in self.finals({}) for job in jobs]

    def _job(self, student: int, method: str, weight: float, place: int, seed: int, trial: bool) -> Job:
        config, model = self.config, self.config.students[student]
        name, way = model_name(model), config.methods[method]
        label = f"student ({name}), {'alone' if way.method == 'none' else method}"
        teacher = self.teacher_checkpoints[place % len(self.teacher_checkpoints)]
        transfer = transfer_config(way, teacher, weight)
        if trial:
            folder = self.out / "trials" / f"{name}_{method}_w{str(weight).removesuffix('.0')}_seed{seed}"
        else:
            folder = self.out / f"student_{name}_{method}_seed{seed}"
        run = self._run(folder, model, seed, label, transfer, config.trials.epochs if trial else None)
        # A backward pass costs twice its forward pass; the teacher has none.
        a_step = 3 * self._costs[student] + (0 if way.method == "none" else self._teacher_cost)
        return Job(run, "student", name, method, trial, a_step * run.optim.epochs)

    def _run(
        self, folder: Path, model: ModelConfig, seed: int, label: str, transfer: TransferConfig, epochs: int | None
    ) -> RunConfig:
        """A run of the study, of as many epochs as all or of others."""
        run = self.config.run
        optim = replace(run.optim, epochs=epochs or run.optim.epochs)
        return replace(run, out=str(folder), model=model, optim=optim, transfer=transfer, seed=seed, label=label)


class Runner:
    """Does what is left of a plan, and tells where it is."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config = plan, plan.config
        jobs = plan.everything()
        self._total, self._number = len(jobs), 0
        self._left = sum(job.cost for job in jobs)
        self._known: list[tuple[float, float]] = []  # cost and seconds of the runs that have ended
        self._started = time.perf_counter()

    def check(self) -> None:
        """What would otherwise end the study late.

        Raises:
            ValueError: the data set, or the folder, cannot be used.
            ModuleNotFoundError: a metric needs a package that is not installed.
        """
        for path in (self.plan.out, *self.plan.out.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"{path}: is a file; choose another out")
        score_files([], self.config.metrics, workers=0, progress=False)
        data = manifest.load(self.config.run.data.path)
        if not data.split("test"):
            raise ValueError(f"{data.path}: the test set is empty")
        command.split(data, self.config.run.data.valid_speakers, self.config.run.data.valid_limit)

    def teachers(self) -> None:
        """Train and score the teachers, and score the noisy input."""
        self.score(self.plan.out / "noisy", None)
        for job in self.plan.teachers():
            if self.train(job).diverged:
                raise ValueError(f"{job.folder}: the teacher's training diverged; a lower run.optim.lr may help")
            self.score(job.folder, job.folder / "best.pt")
        if self.config.teacher.checkpoint is not None:
            self.score(self.plan.out / "teacher", Path(self.config.teacher.checkpoint), given=True)

    def choose(self, student: int, method: str) -> tuple[float, dict[float, float | None]]:
        """The weight of a method for a student, and the mean validation score of every candidate.

        A weight of which a trial diverged has None and is not chosen; of equal ones the smallest is.

        Raises:
            ValueError: if no weight is left.
        """
        trials = self.plan.trials(student, method)
        if not trials:
            return self.config.methods[method].weights[0], {}
        scores: dict[float, float | None] = {}
        for weight, jobs in trials.items():
            found = [self.train(job).best for job in jobs]
            known = [value for value in found if value is not None]
            scores[weight] = math.fsum(known) / len(known) if len(known) == len(found) else None
        sign = -1 if self.config.run.valid.select == "loss" else 1
        usable = {weight: sign * score for weight, score in sorted(scores.items()) if score is not None}
        if not usable:
            name = model_name(self.config.students[student])
            raise ValueError(
                f"methods.{method}, student {name}: no trial gave a {self.config.run.valid.select} on the validation "
                "recordings; try other weights or longer trials"
            )
        return max(usable, key=lambda weight: usable[weight]), scores

    def train(self, job: Job) -> Finished:
        """Do a run, or what is left of it."""
        self._number += 1
        finished = read_finished(job)
        if finished is None:
            print(f"run {self._number} of {self._total}: {job.text}; {self._times()}", flush=True)
            finished = self._train(job)
        self._left -= job.cost
        self._known.append((job.cost, finished.seconds))
        return finished

    def _train(self, job: Job) -> Finished:
        started = time.perf_counter()
        history: list[dict[str, Any]] = []
        diverged = None
        try:
            history = command.run(job.config, job.kind)
        except DivergedError as error:
            diverged = str(error)
            print(f"diverged: {error}", flush=True)
        # A run that was taken up again has taken longer than this call.
        seconds = max(time.perf_counter() - started, math.fsum(row["seconds"] for row in history))
        steps = history[-1]["step"] if history else 0
        finished = Finished(steps, round(seconds, 1), best_score(history, job.config.valid.select), diverged)
        record = {"format": FINISHED_FORMAT, **vars(finished), "config": job.config.as_dict()}
        write_text(job.folder / "finished.json", json.dumps(record, indent=1) + "\n")
        return finished

    def score(self, folder: Path, checkpoint: Path | None, given: bool = False) -> None:
        """Score a run, or the noisy input, on the test set, unless that is done; a checkpoint that was given, and not
        trained here, may have changed since."""
        data, metrics = self.config.run.data.path, self.config.metrics
        if is_scored(folder, manifest.load(data).path, metrics, checkpoint if given else None):
            return
        # PESQ can crash, so it has processes of its own, which cost more than they save for the others.
        workers = None if set(PESQ_METRICS) & set(metrics) else 0
        print(f"scores of {folder}", flush=True)
        evaluate(data, folder, checkpoint, metrics=metrics, workers=workers)

    def _times(self) -> str:
        gone = f"{duration(time.perf_counter() - self._started)} gone"
        cost, seconds = (math.fsum(values) for values in zip(*self._known, strict=True)) if self._known else (0, 0)
        return gone + (f", about {duration(self._left * seconds / cost)} left" if cost else "")


def read_finished(job: Job) -> Finished | None:
    """What became of a run, or None where it has not ended or is one of another configuration."""
    try:
        record = read_record(job.folder / "finished.json", FINISHED_FORMAT)
        if differences(completed(record["config"]), job.config.as_dict(), ignore=FREE_KEYS):
            return None
        return Finished(record["steps"], record["seconds"], record["best"], record["diverged"])
    except (RecordError, KeyError):
        return None


def is_scored(folder: Path, data: Path, metrics: list[str], checkpoint: Path | None = None) -> bool:
    """Whether a folder holds these scores of the data's test set and, where one is named, of a checkpoint as it is."""
    scores = folder / "scores.json"
    try:
        record = read_record(scores, SCORES_FORMAT)
        same = record["set"] == "test" and record["data"] == str(data.resolve())
        if checkpoint is not None:
            files = checkpoint.iterdir() if checkpoint.is_dir() else [checkpoint] if checkpoint.is_file() else []
            changed = any(file.stat().st_mtime > scores.stat().st_mtime for file in files)
            same = same and record["checkpoint"] == str(checkpoint) and not changed
        return same and set(metrics) <= record["mean"].keys()
    except (RecordError, KeyError):
        return False


def best_score(history: list[dict[str, Any]], select: str) -> float | None:
    """The best of a history's validation scores, the one that best.pt was kept for; None where there is none."""
    values = [row["valid"][select] for row in history if select in row.get("valid", {})]
    values = [value for value in values if math.isfinite(value)]
    return (min if select == "loss" else max)(values) if values else None


def duration(seconds: float) -> str:
    """Seconds in words for people, "1 h 05 min", "12 min" or "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
