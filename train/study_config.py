"""The configuration of a study: what is compared, and the run it is compared on."""

import dataclasses
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mvat.losses import VIEW_NAMES
from mvat.metrics import METRICS
from mvat.models import PRESETS, Manner
from train import command
from train import config as settings
from train.config import Form, Method, ModelConfig, RunConfig, TransferConfig
from train.transfer import Transfer

#: Keys of a run that the study sets itself.
_SET = ("out", "model", "transfer", "seed", "label")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass
class TeacherConfig:
    """Who teaches: a network that the study trains first, or one that is there.

    Args:
        model: what is trained.
        seeds: of the teachers to train; by default those of the study. The student of a study's n-th seed learns from
            the n-th teacher, over again where there are fewer.
        epochs: of its training, in place of run.optim.epochs.
        checkpoint: in place of `model`, a teacher's weights, whatever Manner.from_pretrained takes.
    """

    model: ModelConfig | None = None
    seeds: list[int] | None = None
    epochs: int | None = None
    checkpoint: str | None = None

    @cached_property  # a checkpoint is read whole
    def arguments(self) -> dict[str, Any]:
        """Those of its Manner, once all are spelt out; ValueError for a checkpoint that cannot be read."""
        if self.model is not None:
            return self.model.arguments
        return Manner.from_pretrained(str(self.checkpoint)).config


@dataclass
class MethodConfig:
    """One way to teach; see TransferConfig.

    Args:
        method: "none" (the student alone), "output", "attention" or "mvat".
        weights: candidates for the transfer's weight, as many for every method; none for "none".
        views: which views are transferred.
        form: "paper" or "code".
        p: the power of the maps.
        pairs: [student block, teacher block] indices; None pairs all in order.
    """

    method: Method
    weights: list[float] = field(default_factory=list)
    views: list[str] = field(default_factory=lambda: list(VIEW_NAMES))
    form: Form = "paper"
    p: float = 2.0
    pairs: list[tuple[int, int]] | None = None


@dataclass
class TrialsConfig:
    """How a weight is chosen: short runs, judged on the validation recordings by run.valid.select.

    Args:
        epochs: of a trial, in place of run.optim.epochs; the learning rate's cycle is as short.
        seeds: of the trials of a weight, whose mean score counts.
    """

    epochs: int
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class StudyConfig:
    """A study.

    Args:
        out: the study's folder; the same command goes on where a former one stopped.
        teacher: who teaches.
        students: what is taught.
        methods: name in tables and folders -> how it is taught; one of them is "none".
        trials: how the methods' weights are chosen.
        run: what all runs have in common, the keys of RunConfig without out, model, transfer, seed and label.
        seeds: every method is trained once with each.
        metrics: names of mvat.metrics.METRICS, the scores on the test set.
    """

    out: str
    teacher: TeacherConfig
    students: list[ModelConfig]
    methods: dict[str, MethodConfig]
    trials: TrialsConfig
    run: RunConfig
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metrics: list[str] = field(default_factory=lambda: ["pesq_wb", "stoi", "estoi", "si_sdr"])

    @property
    def alone(self) -> str:
        """The name of the method "none"."""
        return next(name for name, method in self.methods.items() if method.method == "none")

    @property
    def teacher_seeds(self) -> list[int]:
        """The seeds of the teachers that are trained."""
        return list(self.seeds if self.teacher.seeds is None else self.teacher.seeds)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and values; of `run` the keys that the study takes."""
        plain = dataclasses.asdict(self)
        plain["run"] = {key: value for key, value in self.run.as_dict().items() if key not in _SET}
        return plain


def parse(argv: Sequence[str] | None, description: str) -> StudyConfig:
    """The configuration of a study, from a YAML file and options, checked and with all models' arguments spelt out.

    Raises:
        ValueError: for a wrong key or value, in one line.
    """

    def add_arguments(parser: Any) -> None:
        parser.add_class_arguments(StudyConfig, skip={"run"})
        parser.add_class_arguments(RunConfig, "run", skip=set(_SET), instantiate=False)

    values = command.parse_values(argv, description, StudyConfig, add_arguments)
    run = RunConfig(out="", model=ModelConfig(), **vars(values.run))
    own = {item.name: values[item.name] for item in dataclasses.fields(StudyConfig) if item.name != "run"}
    config = StudyConfig(**own, run=run)
    command.check_given(config)
    return checked(config)


def checked(config: StudyConfig) -> StudyConfig:
    """The configuration with all models' arguments spelt out.

    Raises:
        ValueError: naming the key that is wrong, before anything is trained.
    """
    teacher, methods = config.teacher, config.methods
    if not config.out.strip():
        raise ValueError(f"out must be the name of a folder, got {config.out!r}")
    try:
        settings.check(dataclasses.replace(config.run, out=config.out))
    except ValueError as error:
        raise ValueError(f"run.{error}") from None
    _check_seeds("seeds", config.seeds)
    _check_seeds("trials.seeds", config.trials.seeds)
    if config.trials.epochs < 1:
        raise ValueError(f"trials.epochs must be at least 1, got {config.trials.epochs}")
    unknown = set(config.metrics) - set(METRICS)
    if unknown or not config.metrics or len(set(config.metrics)) < len(config.metrics):
        raise ValueError(f"metrics must be different ones of {', '.join(METRICS)}, got {', '.join(config.metrics)}")

    if config.run.valid.patience is not None:
        raise ValueError("run.valid.patience: the methods are compared after equal numbers of steps, none ends early")
    if not config.students:
        raise ValueError("students: name at least one")
    students = [_resolved(f"students[{i}]", student) for i, student in enumerate(config.students)]
    names = [model_name(student) for student in students]
    if len(set(names)) < len(names):
        raise ValueError(f"students: every one must be another, got {', '.join(names)}")

    for name, method in methods.items():
        _check_method(name, method)
    if [method.method for method in methods.values()].count("none") != 1:
        raise ValueError("methods: exactly one must be {method: none}, the student alone, to compare the others with")
    counts = {name: len(method.weights) for name, method in methods.items() if method.method != "none"}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(f"methods: every method needs as many weights, so that all get as many trials; got {found}")

    if (teacher.model is None) == (teacher.checkpoint is None):
        raise ValueError("teacher: name either teacher.model (and the study trains it) or teacher.checkpoint")
    if teacher.model is not None:
        teacher = dataclasses.replace(teacher, model=_resolved("teacher.model", teacher.model))
        if teacher.seeds is not None:
            _check_seeds("teacher.seeds", teacher.seeds)
        if teacher.epochs is not None and teacher.epochs < 1:
            raise ValueError(f"teacher.epochs must be at least 1, got {teacher.epochs}")
    else:
        for key in ("seeds", "epochs"):
            if getattr(teacher, key) is not None:
                raise ValueError(f"teacher.{key}: a teacher.checkpoint is not trained")
    config = dataclasses.replace(config, teacher=teacher, students=students)
    _check_transfers(config)
    return config


def model_name(model: ModelConfig) -> str:
    """What a model is called in tables and folders: its preset, with the arguments that differ from it."""
    known = {name: parameter.default for name, parameter in inspect.signature(Manner).parameters.items()}
    known |= PRESETS[model.preset] if model.preset else {}
    changed = [f"{key}{value}" for key, value in model.arguments.items() if known.get(key) != value]
    return "-".join(([model.preset] if model.preset else []) + changed) or "manner"


def _check_seeds(key: str, seeds: Sequence[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or not all(seed in settings.SEEDS for seed in seeds):
        raise ValueError(
            f"{key} must be one or more different numbers from 0 to {settings.SEEDS[-1]}, got {list(seeds)}"
        )


def _resolved(key: str, model: ModelConfig) -> ModelConfig:
    try:
        full = command.resolved(model)
        command.initial_weights(full)
        return full
    except (ValueError, OSError) as error:
        raise ValueError(f"{key}: {error}") from None


def _check_method(name: str, method: MethodConfig) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"methods: a name is made of letters, digits, '.', '_', '+' and '-', got {name!r}")
    weights = method.weights
    if method.method == "none":
        if weights:
            raise ValueError(f"methods.{name}: the student alone has no weights, got {weights}")
        return
    if name == "alone":
        raise ValueError("methods.alone: so tables call the student of the method none; choose another name")
    if not weights or len(set(weights)) < len(weights) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"methods.{name}.weights must be one or more different positive numbers, got {weights}")


def _check_transfers(config: StudyConfig) -> None:
    """ValueError unless every method can teach every student: blocks, views, powers."""
    arguments = config.teacher.arguments
    with torch.device("meta"):
        teacher, students = Manner(**arguments), [Manner(**student.arguments) for student in config.students]
    for student, model in zip(students, config.students, strict=True):
        for name, method in config.methods.items():
            try:
                Transfer(transfer_config(method, "", 1.0), student, None if method.method == "none" else teacher)
            except ValueError as error:
                raise ValueError(f"methods.{name}, student {model_name(model)}: {error}") from None


def transfer_config(method: MethodConfig, teacher: str | Path, weight: float) -> TransferConfig:
    """The transfer of a run."""
    if method.method == "none":
        return TransferConfig()
    return TransferConfig(method.method, str(teacher), weight, method.pairs, method.views, method.p, method.form)
