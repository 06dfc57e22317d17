"""The command lines of training: a typed configuration from YAML and options, and one run from it."""

import dataclasses
import os
import random
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvat import errors
from mvat.audio import SAMPLE_RATE
from mvat.kernels import current_backend
from mvat.models import PRESETS, Manner
from train import checkpoint, manifest
from train import config as settings
from train.config import ModelConfig, RunConfig, differences
from train.data import FilePairs, Segments
from train.loading import Readable
from train.manifest import Entry
from train.mixtures import Mixer, Mixtures
from train.polarity import start_upright
from train.solver import Solver, Stopped


def parse(argv: Sequence[str] | None, description: str) -> RunConfig:
    """The configuration of a run: from --config files, the later ones winning, and options, which win over every file.

    Raises:
        ValueError: for a wrong key or value, in one line.
    """
    values = parse_values(argv, description, RunConfig, lambda parser: parser.add_class_arguments(RunConfig))
    config = RunConfig(**{field.name: values[field.name] for field in dataclasses.fields(RunConfig)})
    check_given(config)
    return config


def parse_values(argv: Sequence[str] | None, description: str, of: type, add_arguments: Callable[[Any], object]) -> Any:
    """What `parse` does, for any dataclass: `add_arguments` is called with jsonargparse's parser."""
    from jsonargparse import ArgumentError, ArgumentParser

    module = getattr(sys.modules["__main__"], "__spec__", None)
    parser = ArgumentParser(
        prog=f"python -m {module.name}" if module else None,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    files, options = _config_files(sys.argv[1:] if argv is None else argv)
    for file in files:
        _check_yaml(file, of)
    parser.add_argument("--config", action="config", help="a YAML file of the options below")
    add_arguments(parser)
    try:
        return parser.instantiate(parser.parse_args([*(f"--config={file}" for file in files), *options]))
    except ArgumentError as error:
        where = f"the options, or {', '.join(files)}: " if files else ""
        raise ValueError(where + " ".join(str(error).split())) from None


def _config_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that --config names, and the arguments beside them."""
    files, others, rest = [], [], iter(arguments)
    for argument in rest:
        if argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif argument == "--config" and (file := next(rest, None)) is not None:
            files.append(file)
        else:
            others.append(argument)
    return files, others


def check_given(config: Any, prefix: str = "") -> None:
    """ValueError naming the first key of a dataclass that is None and may not be, which the parser lets through."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if value is None and type(None) not in typing.get_args(hint):
            expected = "a section" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))
            raise ValueError(f"{prefix}{name} must be {expected}, got None")
        if dataclasses.is_dataclass(value):
            check_given(value, f"{prefix}{name}.")


def _check_yaml(file: str, of: type) -> None:
    """ValueError with the file's name unless it holds YAML with mappings for the dataclass and its sections.

    The parser's own words leave the name out, or are a traceback.
    """
    import yaml

    if not file.strip():
        raise ValueError("--config: the name of the file is empty")
    try:
        with open(file, encoding="utf-8") as text:
            content = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a configuration: expected keys and values, got {type(content).__name__}")
    _check_sections(file, content, of)


def _check_sections(file: str, content: Mapping[Any, Any], of: type, prefix: str = "") -> None:
    for name, hint in typing.get_type_hints(of).items():
        section = settings.section_of(hint)
        if section is None or typing.get_origin(hint) in (list, dict) or name not in content:
            continue
        value = content[name]
        if isinstance(value, dict):
            _check_sections(file, value, section, f"{prefix}{name}.")
        elif not (value is None and type(None) in typing.get_args(hint)):
            given = "nothing" if value is None else repr(value)
            raise ValueError(f"{file}: {prefix}{name} must be a section of keys and values, got {given}")


def main(argv: Sequence[str] | None, description: str, kind: str) -> int:
    """Parse and train.

    Returns:
        0 when the run is finished, 2 with one line for what the user must mend, 128 + the signal (143 for SIGTERM, 130
        for SIGINT) when it was asked to stop.
    """
    program = "train.teacher" if kind == "teacher" else "train.distill"
    try:
        current_backend()
        config = parse(argv, description)
        if kind == "teacher" and config.transfer.method != "none":
            raise ValueError(
                "a teacher is trained on its own, without transfer; python -m train.distill trains a student"
            )
        run(config, kind)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return failed(program, error)
    except KeyboardInterrupt as stop:
        return stopped(stop)
    return 0


def stopped(stop: KeyboardInterrupt) -> int:
    """Print where training was stopped; gives the exit status, 128 + the signal."""
    if not isinstance(stop, Stopped):  # before there was anything to save, or a second time
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    if os.environ.get("RANK", "0") == "0":  # all processes of a run stop at the same place
        print(stop, file=sys.stderr)
    return 128 + stop.signal


def failed(program: str, error: Exception) -> int:
    """`mvat.errors.failed` for what training raises."""
    # A worker that reads ahead hands its error on with the whole traceback; the reason stands last.
    text = str(error).strip()
    return errors.failed(program, text.splitlines()[-1] if text.startswith("Caught ") else error)


def run(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    """Train as configured, "teacher" or "student"; returns the history.

    Raises:
        ValueError: for a key that cannot work, before anything is read or written, and whatever `Solver.fit` raises.
    """
    settings.check(config)
    config = dataclasses.replace(config, model=resolved(config.model))
    data = manifest.load(config.data.path)
    train, valid = split(data, config.data.valid_speakers, config.data.valid_limit)
    drawn = examples(config, data, train)
    teacher = None
    if config.transfer.method != "none":
        if config.transfer.teacher is None:
            raise ValueError(f'transfer.method "{config.transfer.method}" needs transfer.teacher')
        teacher = Manner.from_pretrained(config.transfer.teacher)
        tell_unfinished(Path(config.transfer.teacher))
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    model = Manner(**config.model.arguments)
    weights = initial_weights(config.model)
    if weights is None:
        start_upright(model, *_sample(drawn))
    else:
        model.load_state_dict(weights)
    return Solver(config, model, teacher, drawn, _file_pairs(valid), kind).fit()


def tell_unfinished(teacher: Path) -> None:
    """Say so where the teacher's own run, whose last checkpoint lies beside its best, has not come to its end."""
    last = (teacher if teacher.is_dir() else teacher.parent) / "last.pt"
    try:
        content = checkpoint.load(last, ("progress", "config"))
    except ValueError:  # none there, or not of a run
        return
    progress, epochs = content["progress"], content["config"]["optim"]["epochs"]
    if not progress["finished"] and os.environ.get("RANK", "0") == "0":
        print(
            f"{teacher}: its training stands at epoch {progress['epoch']} of {epochs}; the student learns from what it "
            "knows so far",
            file=sys.stderr,
        )


def initial_weights(model: ModelConfig) -> dict[str, Tensor] | None:
    """The weights to begin with, None for random ones.

    Args:
        model: with all arguments spelt out.

    Raises:
        ValueError, OSError: they cannot be read, or are another model's.
    """
    if model.weights is None:
        return None
    found = Manner.from_pretrained(model.weights)
    unlike = differences(model.arguments, found.config)
    if unlike:
        raise ValueError(f"model.weights: {model.weights} is of another model than the run's ({'; '.join(unlike)})")
    return found.state_dict()


def _sample(drawn: Segments | Mixtures, size: int = 4) -> tuple[Tensor, Tensor]:
    """Some training examples, clean and noisy [B, 1, T], spread over the set and the same in every process."""
    readable = Readable(drawn)
    items = [readable[0, i * len(drawn) // size] for i in range(min(size, len(drawn)))]
    return torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])


def examples(config: RunConfig, data: manifest.Manifest, train: Sequence[Entry]) -> Segments | Mixtures:
    """The training examples: segments of the pairs, or mixtures where the manifest lists what to mix.

    Raises:
        ValueError: data.mix is missing or superfluous, or a setting cannot be used.
    """
    mix, tempo, share = config.data.mix, config.data.tempo, config.data.tempo_share
    others = {name: getattr(config.data, name) for name in settings.OF_PAIRS}
    length = round(config.data.segment_seconds * SAMPLE_RATE)
    if data.recordings is None:
        if mix is not None:
            raise ValueError(f"{data.path}: has training pairs, nothing to mix; leave data.mix out")
        stride = round(config.data.stride_seconds * SAMPLE_RATE)
        return Segments(_file_pairs(train), length, stride, tempo, share, **others, seed=config.seed)
    if mix is None:
        raise ValueError(f"{data.path}: its speech and noise are to be mixed; give data.mix.examples")
    for name, value in others.items():
        if value:
            raise ValueError(
                f"{data.path}: data.{name} is for pairs, and here speech and noise are mixed; leave it out"
            )
    found = manifest.recordings(data)
    try:
        mixer = Mixer(
            *(found[role] for role in manifest.ROLES),
            snr=mix.snr,
            level=mix.level,
            reverb_share=mix.reverb_share,
            tempo=tempo,
            tempo_share=share,
        )
        return Mixtures(mixer, length, mix.examples, config.seed)
    except ValueError as error:
        raise ValueError(f"{data.path}, data.mix: {error}") from None


def split(data: manifest.Manifest, valid_speakers: Sequence[str], limit: int) -> tuple[list[Entry], list[Entry]]:
    """Training and validation entries: the manifest's own, or the named speakers taken out of training.

    Raises:
        ValueError: if there is no validation set and no speaker is named, a named speaker does not exist or cannot be
            taken out of what is mixed, or a set comes out empty.
    """
    train, valid = list(data.train), list(data.valid)
    if valid_speakers and data.recordings is not None:
        raise ValueError(f"{data.path}: data.valid_speakers is for pairs; train.prepare has held speakers out already")
    if valid_speakers:
        unknown = set(valid_speakers) - {entry.speaker for entry in train}
        if unknown:
            there = ", ".join(sorted({entry.speaker for entry in train}))
            named = ", ".join(sorted(unknown))
            raise ValueError(f"{data.path}: data.valid_speakers not in the training set: {named}; there are {there}")
        valid += [entry for entry in train if entry.speaker in valid_speakers]
        train = [entry for entry in train if entry.speaker not in valid_speakers]
    if not valid:
        raise ValueError(f"{data.path}: has no validation set; name data.valid_speakers")
    if not train and data.recordings is None:
        raise ValueError(f"{data.path}: data.valid_speakers leaves nothing to train on")
    if 0 < limit < len(valid):
        valid = [valid[i * len(valid) // limit] for i in range(limit)]
    return train, valid


def resolved(model: ModelConfig) -> ModelConfig:
    """All arguments spelt out, so that a run's configuration does not change with a preset."""
    if model.preset is not None and model.preset not in PRESETS:
        raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {model.preset!r}")
    arguments = {**(PRESETS[model.preset] if model.preset else {}), **model.arguments}
    if not arguments:
        raise ValueError("name model.preset, or model.arguments")
    with torch.device("meta"):
        try:
            return ModelConfig(model.preset, Manner(**arguments).config, model.weights)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model.arguments: {error}") from None


def _file_pairs(entries: Sequence[Entry]) -> FilePairs:
    return FilePairs([(e.name, e.clean, e.noisy, e.frames) for e in entries])
