"""The configuration of a training run: typed, filled from YAML and the command line by `train.command`."""

import dataclasses
import math
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mvat.audio import SAMPLE_RATE
from mvat.losses import SHORTEST, VIEW_NAMES
from mvat.metrics import METRICS

#: The ways to teach, and the forms of attention transfer.
Method = Literal["none", "output", "attention", "mvat"]
Form = Literal["paper", "code"]
#: What NumPy's generator can start from.
SEEDS = range(2**32)


@dataclass
class ModelConfig:
    """What is trained.

    Args:
        preset: a name of mvat.models.PRESETS, or None.
        arguments: arguments of mvat.models.Manner, over those of the preset.
        weights: whatever Manner.from_pretrained takes, to start from instead of random weights; None starts from those.
    """

    preset: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass
class MixConfig:
    """How training examples are mixed, for data whose speech and noise are apart (`python -m train.prepare dns`).

    Args:
        examples: how many make an epoch.
        snr: lowest and highest signal-to-noise ratio in dB.
        level: lowest and highest level of the noisy track in dB of full scale.
        reverb_share: share of the examples with reverberation; None is a half where there are impulse responses.
    """

    examples: int = 10000
    snr: tuple[float, float] = (-5.0, 20.0)
    level: tuple[float, float] = (-35.0, -15.0)
    reverb_share: float | None = None


@dataclass
class DataConfig:
    """What it is trained on.

    Args:
        path: a folder made by `python -m train.prepare`, with its manifest.json.
        mix: how examples are mixed, where the data is speech and noise apart; None where it is pairs.
        valid_speakers: speakers taken out of the training set for validation, where the manifest has no validation set.
        segment_seconds: length of a training example.
        stride_seconds: hop between the examples of one recording; of pairs alone.
        tempo: lowest and highest tempo of the clean track; [1, 1] leaves it as it is.
        tempo_share: share of the examples whose tempo is changed.
        pitch_share: share, of those, whose pitch changes with it, as a tape's would; of pairs alone.
        remix_share: share of the examples that take another one's noise; of pairs alone.
        hiss_share: share of the examples with a hiss in both tracks, that is not to be removed; of pairs alone.
        filter_share: share of the examples that are filtered, as if by another microphone; of pairs alone.
        valid_limit: validate on this many recordings, spread evenly over the set; 0 takes all.
        workers: processes that read ahead.
    """

    path: str
    mix: MixConfig | None = None
    valid_speakers: list[str] = field(default_factory=list)
    segment_seconds: float = 4.0
    stride_seconds: float = 1.0
    tempo: tuple[float, float] = (0.9, 1.1)
    tempo_share: float = 0.5
    pitch_share: float = 0.0
    remix_share: float = 0.0
    hiss_share: float = 0.0
    filter_share: float = 0.0
    valid_limit: int = 0
    workers: int = 2


#: The shares in DataConfig that change pairs alone.
OF_PAIRS = ("pitch_share", "remix_share", "hiss_share", "filter_share")


@dataclass
class OptimConfig:
    """How it is trained: Adam under a one-cycle schedule stepped by batch.

    Args:
        epochs: passes over the data.
        batch_size: examples a step and process.
        loss: of the estimate, a name of mvat.losses.ENHANCEMENT_LOSSES.
        lr: the schedule's highest learning rate.
        accumulate: batches over whose mean gradient the optimiser moves once; an epoch's last ones may be fewer.
        precision: "no" for float32, "bf16" or "fp16" (on a GPU only) for mixed precision.
        clip: largest norm of the gradient; a longer one is shortened to it. None leaves it.
        ema: decay of an exponential moving average of the weights, such as 0.999, which is then what is validated,
            saved and loaded; None does without.
        compile: train through torch.compile.
    """

    epochs: int = 350
    batch_size: int = 4
    loss: Literal["weighted_mrstft", "perceptual"] = "weighted_mrstft"
    lr: float = 1e-3
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    clip: float | None = None
    ema: float | None = None
    compile: bool = False


@dataclass
class ValidConfig:
    """When and how it is validated.

    Args:
        every: epochs between validations; the last epoch is always validated.
        metrics: names of mvat.metrics.METRICS to compute.
        select: the score whose best value marks the best checkpoint, or "loss".
        patience: validations without a better value of `select` after which the run ends early; None never does.
        samples: recordings whose beginnings can be listened to beside the curves, anew after every validation.
    """

    every: int = 1
    metrics: list[str] = field(default_factory=lambda: ["pesq_wb", "stoi", "si_sdr"])
    select: str = "pesq_wb"
    patience: int | None = None
    samples: int = 3


@dataclass
class TransferConfig:
    """What the student learns from the teacher.

    Args:
        method: "mvat" (maps of the three views), "attention" (maps of the blocks' outputs), "output" (the teacher's
            estimate) or "none" (the student alone).
        teacher: the teacher's weights, whatever Manner.from_pretrained takes; not needed for "none".
        weight: beta, the factor of the transfer loss.
        pairs: [student block, teacher block] indices in execution order; None pairs all in order.
        views: which of "channel", "global_", "local" are transferred.
        p: the power of the maps.
        form: "paper" or "code", see mvat.kernels.attention_transfer_loss.
    """

    method: Method = "none"
    teacher: str | None = None
    weight: float = 0.1
    pairs: list[tuple[int, int]] | None = None
    views: list[str] = field(default_factory=lambda: list(VIEW_NAMES))
    p: float = 2.0
    form: Form = "paper"


@dataclass
class RunConfig:
    """A training run.

    Args:
        out: the run's folder; the same command goes on where a former one stopped.
        model: what is trained.
        data: what it is trained on.
        optim: how it is trained.
        valid: how it is validated.
        transfer: what it learns from a teacher.
        seed: of the initial weights, the order of the data and its augmentation.
        label: the run's name in tables and reports; by default the folder's name.
        save_minutes: between checkpoints within an epoch; there is always one after it. 0 saves after every step.
    """

    out: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    valid: ValidConfig = field(default_factory=ValidConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    seed: int = 0
    label: str = ""
    save_minutes: float = 15.0

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and values, as config.yaml and the checkpoints hold them."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def completed(stored: dict[str, Any], of: type = RunConfig) -> dict[str, Any]:
    """A stored configuration with the defaults of those keys that there were not yet when it was written."""
    full = dict(stored)
    for key in dataclasses.fields(of):
        section = section_of(key.type)
        if key.name not in full:
            if key.default is not dataclasses.MISSING:
                full[key.name] = _plain(key.default)
        elif section is not None and isinstance(full[key.name], dict):
            full[key.name] = completed(full[key.name], section)
    return full


def section_of(hint: Any) -> type | None:
    """The dataclass that a key's annotation is, or may be; None where it is a plain value."""
    kinds = (kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind))
    return typing.cast("type | None", next(kinds, None))


def check(config: RunConfig) -> None:
    """Whatever would otherwise end a run late, or in other words: ValueError names the key and what it holds."""
    optim, valid, data = config.optim, config.valid, config.data
    _require(config.seed in SEEDS, "seed", f"between 0 and {SEEDS[-1]}", config.seed)
    _require(bool(config.out.strip()), "out", "the name of a folder", repr(config.out))
    for name in ("epochs", "batch_size", "accumulate"):
        count = getattr(optim, name)
        _require(count >= 1, f"optim.{name}", "at least 1", count)
    if optim.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError('optim.precision "fp16" needs a GPU; without one there is "bf16" or "no"')
    _require(0 < optim.lr < math.inf, "optim.lr", "positive", optim.lr)
    _require(optim.clip is None or 0 < optim.clip < math.inf, "optim.clip", "positive", optim.clip)
    _require(optim.ema is None or 0 <= optim.ema < 1, "optim.ema", "at least 0 and less than 1", optim.ema)
    _require(valid.every >= 1, "valid.every", "at least 1", valid.every)
    _require(valid.patience is None or valid.patience >= 1, "valid.patience", "at least 1", valid.patience)
    _require(valid.samples >= 0, "valid.samples", "0 or more", valid.samples)
    unknown = ", ".join(sorted(set(valid.metrics) - set(METRICS)))
    _require(not unknown, "valid.metrics", f"some of {', '.join(METRICS)}", unknown)
    scored = valid.select == "loss" or valid.select in valid.metrics
    _require(scored, "valid.select", '"loss" or one of valid.metrics', repr(valid.select))
    shortest, seconds = SHORTEST / SAMPLE_RATE, data.segment_seconds
    long = math.isfinite(seconds) and round(seconds * SAMPLE_RATE) >= SHORTEST
    _require(long, "data.segment_seconds", f"at least {shortest:.4f}", seconds)
    hop = data.stride_seconds
    _require(math.isfinite(hop) and round(hop * SAMPLE_RATE) >= 1, "data.stride_seconds", "positive", hop)
    lowest, highest = data.tempo
    _require(0 < lowest <= highest < math.inf, "data.tempo", "a positive range, lowest first", list(data.tempo))
    for name in ("tempo_share", *OF_PAIRS):
        share = getattr(data, name)
        _require(0 <= share <= 1, f"data.{name}", "between 0 and 1", share)
    _require(data.valid_limit >= 0, "data.valid_limit", "0 or more", data.valid_limit)
    _require(data.workers >= 0, "data.workers", "0 or more", data.workers)
    _require(config.save_minutes >= 0, "save_minutes", "0 or more", config.save_minutes)


def _require(right: bool, name: str, expected: str, given: Any) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}, got {given}")


def differences(
    first: dict[str, Any], second: dict[str, Any], ignore: Collection[str] = (), prefix: str = ""
) -> list[str]:
    """The keys that two resolved configurations disagree in, as "optim.lr: 0.001 and 0.002", but those to ignore."""
    found = []
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, ignore, f"{prefix}{key}.")
        elif a != b and prefix + key not in ignore:
            found.append(f"{prefix}{key}: {a} and {b}")
    return found
