"""Enhance and score a set of recordings: python -m train.evaluate --data DATA --checkpoint RUN/best.pt --out RUN

Writes ``enhanced/*.wav`` (16 bit; they are what is scored), ``scores.json`` and ``scores.csv`` into the run folder, and
prints the means beside those of the noisy input. ``--noisy`` scores that input itself; the others find it where
``--out`` is ``<experiment>/noisy``. Exit status: 0 all scored, 1 some recordings could not be, 2 nothing could.

Under ``torchrun --nproc_per_node N -m train.evaluate ...`` each process takes every N-th recording.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import mvat
from mvat import audio
from mvat.errors import Parser, failed, interrupted, named
from mvat.kernels import current_backend
from mvat.metrics import ALL, METRICS, Failure, Scores, score_files
from mvat.models import Manner, count_flops, count_parameters
from train import manifest
from train.shares import Group

SCORES_FORMAT = "mvat-scores-1"
HISTORY_FORMAT = "mvat-history-1"
DESCRIPTION = ("label", "kind", "method", "seed", "parameters", "gflops")


class RecordError(ValueError):
    """A JSON file of a run that cannot be used; the message names the file and the reason."""


def read_record(path: Path, format: str) -> dict[str, Any]:
    """Reads a JSON file of a run.

    Args:
        path: history.json or scores.json.
        format: What its key "format" must say.

    Raises:
        RecordError: It is no JSON, or of another format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != format:
        raise RecordError(f"{path}: is no file of format {format!r}")
    return record


def evaluate(
    data: str | os.PathLike,
    out: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    *,
    subset: str = "test",
    metrics: Sequence[str] = METRICS,
    workers: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Scores:
    """Scores a model, or the noisy input itself, on one set of a manifest.

    The test set's scores go to ``scores.json``, ``scores.csv`` and ``enhanced/``; the validation set's names end in
    ``_valid``. A run folder's ``history.json`` beside the checkpoint tells label, seed and cost of the model.

    Args:
        data: The manifest, or the folder that holds it.
        out: The run folder to write into; made where missing.
        checkpoint: What `mvat.models.Manner.from_pretrained` loads; None scores the noisy input.
        subset: "test" or "valid".
        metrics: Names out of mvat.metrics.METRICS.
        workers: Scoring processes, by default one a CPU; 0 scores in this process.
        device: Where the model runs; by default a GPU where there is one.
        progress: Whether to show progress bars.

    Returns:
        The scores. A recording that could not be read, enhanced or scored is among their failures. Of several processes
        (see `train.shares`) each does its share, the main one writes, and all return the scores of the whole set.

    Raises:
        ValueError: The manifest, checkpoint or history cannot be used, the set is empty, or `out` holds another model.
        OSError: The folder cannot be written.
        RuntimeError: Another process failed.
    """
    out = Path(out)
    # The checkpoint's folder, not where a link of its name leads.
    if checkpoint is not None and (out / "best.pt").is_file() and not _inside(Path(checkpoint).parent, out):
        raise ValueError(
            f"{out}: holds another model than {checkpoint}, whose scores would be replaced; choose another out"
        )
    group = Group.here()
    score_files([], metrics, workers or 0, progress=False)  # refuses both before anything is written
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // group.on_this_machine())

    def share() -> _Share:
        data_set = manifest.load(data)
        entries = data_set.split(subset)
        if not entries:
            raise ValueError(f"{data_set.path}: the {subset} set is empty")
        own = entries[group.rank :: group.size]
        failures: list[Failure] = []
        estimates = {entry.name: entry.noisy for entry in own}
        description = _description(label="noisy", kind="noisy")
        if checkpoint is None:
            out.mkdir(parents=True, exist_ok=True)
        else:
            model = Manner.from_pretrained(Path(checkpoint)).to(device or group.device())
            description = describe(Path(checkpoint), model, out.name)
            estimates, failures = enhance_set(model, own, out / f"enhanced{_suffix(subset)}", shown)
        pairs = [(entry.name, entry.clean, estimates[entry.name]) for entry in own if entry.name in estimates]
        scored = score_files(pairs, metrics, workers, shown)
        header = {"format": SCORES_FORMAT, **description, "set": subset, "data": str(data_set.path.resolve())}
        header["checkpoint"] = None if checkpoint is None else str(checkpoint)
        return _Share(header, [entry.name for entry in entries], scored, failures + scored.failures)

    shown = progress and group.main
    shares = group.gather(share)
    header, names = shares[0].header, shares[0].names
    rows = {name: row for part in shares for name, row in part.scored.rows.items()}
    order = {name: place for place, name in enumerate(names)}
    measured = shares[0].scored.metrics
    scores = Scores(
        measured,
        {name: rows.get(name, dict.fromkeys(measured)) for name in names},
        sorted((f for part in shares for f in part.failures), key=lambda failure: order[failure.name]),
    )
    if group.main:
        scores.to_json(out / f"scores{_suffix(subset)}.json", header)
        scores.to_csv(out / f"scores{_suffix(subset)}.csv")
    return scores


class _Share(NamedTuple):
    """What one process found out."""

    header: dict[str, Any]
    names: list[str]  # of the whole set, in its order
    scored: Scores
    failures: list[Failure]  # in enhancing and in scoring


def describe(checkpoint: Path, model: Manner, label: str) -> dict[str, Any]:
    """What a model is and costs: from the history beside its checkpoint, else what can be counted."""
    history = checkpoint.parent / "history.json"
    if history.exists():
        record = read_record(history, HISTORY_FORMAT)
        return {key: record.get(key) for key in DESCRIPTION}
    gflops = count_flops(model.config) / 1e9
    return _description(label=label, kind="student", parameters=count_parameters(model), gflops=gflops)


def _description(**known: Any) -> dict[str, Any]:
    return dict.fromkeys(DESCRIPTION) | {"method": "none"} | known


def enhance_set(
    model: Manner, entries: Sequence[manifest.Entry], folder: Path, progress: bool = True
) -> tuple[dict[str, Path], list[Failure]]:
    """Enhances whole recordings, one at a time, into <folder>/<name>.wav.

    Args:
        model: In evaluation mode.
        entries: Pairs of a manifest.
        folder: Made where missing.
        progress: Whether to show a progress bar.

    Returns:
        Name -> file written, and the recordings for which there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    failures: list[Failure] = []
    for entry in tqdm(entries, desc="enhancing", unit="file", disable=None if progress else True):
        path = folder / f"{entry.name}.wav"
        try:
            samples, rate = audio.read(entry.noisy)
            audio.write(path, mvat.enhance(samples, model, rate), rate)
            written[entry.name] = path
        except (ValueError, RuntimeError) as error:  # unreadable, an output of NaN, out of memory
            failures.append(Failure(entry.name, ALL, str(error)))
    return written, failures


def table(scores: Scores, label: str, noisy: Mapping[str, Mapping[str, float | None]] | None = None) -> str:
    """Means for people to read.

    Args:
        scores: Scores of a run.
        label: What the run is called.
        noisy: Name -> metric -> score of the noisy input on the same set, for comparison.

    Returns:
        Lines of text: the noisy input, the run, the mean gain over recordings scored in both, what could not be scored.
    """
    width = max(len(label), 5)
    lines = [f"{'':{width}}  {'files':>5}" + "".join(f"{metric:>9}" for metric in scores.metrics)]

    def line(name: str, rows: Mapping[str, Mapping[str, float | None]], sign: str = "") -> None:
        cells, most = "", 0
        for metric in scores.metrics:
            values = [value for row in rows.values() if (value := row.get(metric)) is not None]
            most = max(most, len(values))
            cells += f"{sum(values) / len(values):{sign}9.3f}" if values else f"{'-':>9}"
        lines.append(f"{name:{width}}  {most:5}{cells}")

    if noisy is not None:
        line("noisy", noisy)
    line(label, scores.rows)
    if noisy is not None:
        line("gain", {name: _differences(row, noisy[name]) for name, row in scores.rows.items() if name in noisy}, "+")
    if scores.failures:
        lines.append(f"not scored, not in the means ({len(scores.unscored())} of {len(scores.rows)} recordings):")
        lines += [f"  {name}: {metric}: {reason}" for name, metric, reason in scores.failures]
    return "\n".join(lines)


def _differences(row: Mapping[str, float | None], other: Mapping[str, float | None]) -> dict[str, float | None]:
    pairs = {metric: (value, other.get(metric)) for metric, value in row.items()}
    return {metric: a - b if a is not None and b is not None else None for metric, (a, b) in pairs.items()}


def noisy_rows(run: Path, subset: str) -> dict[str, dict[str, float | None]] | None:
    """The scores of the noisy input where the folder "noisy" beside the run holds them for the same set, else None."""
    name = f"scores{_suffix(subset)}.json"
    path = run.parent / "noisy" / name
    if run.name == "noisy" or not path.exists():
        return None
    own, noisy = (read_record(file, SCORES_FORMAT) for file in (run / name, path))
    return noisy["files"] if all(own.get(key) == noisy.get(key) for key in ("set", "data")) else None


def _suffix(subset: str) -> str:
    return "" if subset == "test" else f"_{subset}"


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu, cuda or cuda:1, got {text!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"PyTorch finds {torch.cuda.device_count()} GPUs here, got {text!r}")
    return device


def _inside(folder: Path, other: Path) -> bool:
    return folder.resolve().is_relative_to(other.resolve())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    description = (__doc__ or "").split(":")[0] + "."
    parser = Parser(prog="python -m train.evaluate", description=description, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="data folder made by train.prepare, or its manifest")
    parser.add_argument("--out", type=named, required=True, help="run folder to write into, such as runs/demo/student")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="model to enhance with, such as runs/demo/student/best.pt")
    what.add_argument("--noisy", action="store_true", help="score the noisy input itself")
    parser.add_argument("--set", choices=("test", "valid"), default="test", dest="subset")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS)
    parser.add_argument("--workers", type=int, help="scoring processes (default: one a CPU, shared by torchrun's)")
    parser.add_argument("--device", type=_device, help="where the model runs (default: a GPU where there is one)")
    main_process = Group.here().main
    try:
        current_backend()
        options = parser.parse_args(arguments)
        scores = evaluate(
            options.data,
            options.out,
            options.checkpoint,
            subset=options.subset,
            metrics=options.metrics,
            workers=options.workers,
            device=options.device,
        )
        noisy = noisy_rows(options.out, options.subset) if main_process else None
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return failed("train.evaluate", error) if main_process else 2
    except KeyboardInterrupt:
        return interrupted("train.evaluate") if main_process else 130
    if main_process:
        print(table(scores, options.out.name, noisy))
    if not any(scores.count().values()):
        return 2
    return 1 if scores.failures else 0


if __name__ == "__main__":
    sys.exit(main())
