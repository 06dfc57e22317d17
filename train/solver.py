"""The training loop: epochs of steps, validation, curves, checkpoints; the same run folder goes on where it stopped."""

import contextlib
import json
import math
import time
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mvat.errors import one_line
from mvat.files import write_text
from mvat.losses import SHORTEST
from mvat.models import Manner, count_flops, count_parameters
from train import checkpoint, processes
from train import config as settings
from train.config import RunConfig, completed, differences
from train.curves import NAME, Curves
from train.data import Pairs, Segments
from train.evaluate import HISTORY_FORMAT
from train.loading import Loader
from train.mixtures import Mixtures
from train.processes import DivergedError, RunError, Stopped
from train.progress import Progress, Running, row
from train.step import Report, Step
from train.transfer import Transfer
from train.validation import Sample, validate

__all__ = ["DivergedError", "RunError", "Solver", "Stopped"]

#: What may change when a run goes on.
FREE_KEYS = ("out", "label", "data.workers", "save_minutes")
#: Moves skipped in a row, since something was not finite, after which the run ends.
SKIPPED = 20
#: Batches between points of the curves.
CURVE_STEPS = 10


class Solver:
    """Trains one model into one run folder.

    Args:
        config: the resolved configuration.
        model: the model to train, freshly initialised.
        teacher: the frozen teacher, or None.
        examples: what it is trained on: its items are asked for as (epoch, index) and are (clean, noisy) [1, length].
        valid_pairs: the recordings to validate on, whole.
        kind: "teacher" or "student", for tables.

    Raises:
        RunError: if the folder holds another run, or the configuration does not fit the data.
        ValueError: for a value of the configuration that cannot work.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Manner,
        teacher: Manner | None,
        examples: Segments | Mixtures,
        valid_pairs: Pairs,
        kind: str,
    ) -> None:
        optim, data = config.optim, config.data
        self.config, self.kind = config, kind
        self.folder = Path(config.out)
        settings.check(config)
        _check_valid(data.path, valid_pairs)
        self.accelerator = processes.start(optim)
        self.examples, self.valid_pairs = examples, valid_pairs
        self.loader = Loader(examples, config.seed, optim.batch_size, data.workers, self.accelerator, data.path)
        if not len(self.loader):
            count = self.accelerator.num_processes
            raise RunError(
                f"{data.path}: {len(self.loader.order)} training examples do not fill one batch of {optim.batch_size}"
                + (f" on {count} processes" if count > 1 else "")
            )
        self.model = model
        transfer = Transfer(config.transfer, model, teacher).to(self.accelerator.device)
        self.updates = math.ceil(len(self.loader) / optim.accumulate) * optim.epochs
        with processes.clear_errors(self.folder, data.path):
            self.step = Step(config, self.accelerator, model, transfer, self.updates)
        self.progress, self.running = Progress(), Running()
        self.signals = processes.Signals()
        self.curves: Curves | None = None
        self._made: list[Path] = []  # files and folders that this call made, each before the folder that it is in
        self._saved = time.perf_counter()

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    @cached_property
    def gflops(self) -> float:
        """Of the model, as tables give them; counting takes a while, so only once there is a table to fill."""
        return round(count_flops(self.model.config) / 1e9, 4)

    def fit(self) -> list[dict[str, Any]]:
        """Train to the last epoch and return the history; a finished run returns at once.

        A new run that ends before its first step, as bad data may let it, leaves no trace.

        Raises:
            RunError: the run cannot go on; the same command goes on from the last checkpoint once the reason is gone.
            DivergedError: the run can never go on, since the loss is not finite any more.
            Stopped: SIGTERM or SIGINT asked to stop; the run is saved where it stood.
        """
        try:
            with processes.clear_errors(self.folder, self.config.data.path), self.signals.watched():
                return self._fit()
        finally:
            if self.curves is not None:
                self.curves.close()
            for path in self._made if not self.progress.step else ():
                with contextlib.suppress(OSError):  # a folder that holds something else by now
                    path.rmdir() if path.is_dir() else path.unlink()

    def _fit(self) -> list[dict[str, Any]]:
        length = self._resume()
        progress, epochs = self.progress, self.config.optim.epochs
        if progress.finished:
            if self.main:
                self._describe()
                print(f"{self.folder}: is complete, {progress.epoch} epochs", flush=True)
            processes.leave(self.accelerator)
            return progress.history
        if self.main:
            self._open_folder(length)
            if progress.step:
                place = f" and {progress.position} of {len(self.loader)} steps" if progress.position else ""
                print(f"{self.folder}: goes on after epoch {progress.epoch} of {epochs}{place}", flush=True)
        self._saved = time.perf_counter()
        while not progress.finished:
            self._train_epoch(progress.epoch + 1)
            self._end_epoch(progress.epoch + 1)
        if self.main and progress.epoch < epochs:
            print(f"{self.folder}: ends early, {progress.unimproved} validations were no better", flush=True)
        processes.leave(self.accelerator)
        return progress.history

    def _train_epoch(self, epoch: int) -> None:
        """All steps of an epoch, or what is left of them."""
        progress, running, steps = self.progress, self.running, len(self.loader)
        self.loader.waited, self.loader.unreadable = running.waited, running.unreadable
        self.model.train()
        processes.reset_peak_memory()
        running.start()
        bar = tqdm(
            desc=f"{self.folder.name} {epoch}/{self.config.optim.epochs}",
            total=steps,
            initial=progress.position,
            disable=None if self.main else True,  # None: on a terminal only
            leave=False,
        )
        batches = self.loader.epoch(epoch, progress.position)
        while progress.position < steps:
            group = list(islice(batches, min(self.config.optim.accumulate, steps - progress.position)))
            progress.position += len(group)
            progress.step += len(group)
            reports = self.step(group, progress.step, self.signals.asked, self._save_is_due())
            if progress.position == steps or any(report.stop or report.save for report in reports):
                reports += self.step.finish()
            for report in reports:
                self._note(report)
            bar.update(len(group))
            if reports:
                shown = {name: f"{value:.3f}" for name, value in reports[-1].parts.items()}
                bar.set_postfix(shown, refresh=False)
            stop = max((report.stop for report in reports), default=0)
            if stop or any(report.save for report in reports):
                self._tally()
                self._save()
            if stop:
                raise self._stopped(stop)
        bar.close()
        self._tally()

    def _tally(self) -> None:
        """Bring the epoch's counts up to here."""
        self.running.stop()
        self.running.waited, self.running.unreadable = self.loader.waited, self.loader.unreadable

    def _note(self, report: Report) -> None:
        """Count a move and draw its points."""
        progress, running = self.progress, self.running
        running.add(report)
        progress.streak = 0 if report.finite else progress.streak + 1
        if self.curves is not None and report.step // CURVE_STEPS > (report.step - report.batches) // CURVE_STEPS:
            self.curves.scalars("train", report.parts | {"lr": report.rate, "skipped": running.skipped}, report.step)
            self.curves.show()
        if progress.streak == SKIPPED:
            raise DivergedError(
                f"{self.folder}: loss or gradient were not finite in {SKIPPED} steps in a row, up to step "
                f"{report.step}, and changed nothing; a lower optim.lr or optim.clip may help; the last checkpoint is "
                "kept"
            )

    def _end_epoch(self, epoch: int) -> None:
        """Validate, then write what the epoch gave."""
        optim, valid = self.config.optim, self.config.valid
        running = [Running(**values) for values in processes.gather(self.accelerator, self.running.as_dict())]
        if not running[0].batches:
            raise DivergedError(f"{self.folder}: loss or gradient were not finite in any step of epoch {epoch}")
        audio = len(self.loader) * optim.batch_size * len(running) * self.config.data.segment_seconds
        entry = row(running, epoch, self.progress.step, self.step.rate, audio, processes.peak_memory())
        samples: list[Sample] = []
        # An early end is known only after the validation that brings it about.
        if epoch % valid.every == 0 or epoch == optim.epochs:
            entry["valid"], samples = self._validate()
        if self.curves is not None:
            self._draw(self.curves, entry, samples)
        better = self.progress.end_epoch(entry, optim, valid)
        self.running = Running()
        self._save(better, epoch_ended=True)
        if self.main:
            print(self._line(entry, better), flush=True)

    def _validate(self) -> tuple[dict[str, float], list[Sample]]:
        model = (self.model if self.step.average is None else self.step.average.model).eval()
        found = validate(model, self.valid_pairs, self.config, self.accelerator, lambda: self.signals.asked)
        if found is None:
            self._save()
            raise self._stopped(max(processes.gather(self.accelerator, self.signals.asked)))
        return found

    def _draw(self, curves: Curves, entry: dict[str, Any], samples: list[Sample]) -> None:
        step = self.progress.step
        first = not any("valid" in former for former in self.progress.history)
        curves.scalars("valid", entry.get("valid", {}), step)
        shown = ("audio_seconds_per_second", "waiting")
        curves.scalars("speed", {name: entry[name] for name in shown}, step)
        for sample in samples:
            if first:
                curves.recording(f"{sample.name}/noisy", sample.noisy, step)
                curves.recording(f"{sample.name}/clean", sample.clean, step)
            curves.recording(f"{sample.name}/estimate", sample.estimate, step)

    def _line(self, entry: dict[str, Any], better: bool) -> str:
        parts = [f"{name} {value:.4f}" for name, value in entry["train"].items()]
        parts += [f"valid {name} {value:.3f}" for name, value in entry.get("valid", {}).items()]
        parts += [f"{entry['audio_seconds_per_second']:.0f}x real time", f"{entry['waiting']:.0%} waiting for data"]
        parts += [f"{entry[name]} {name}" for name in ("skipped", "unreadable") if entry[name]]
        epochs = self.config.optim.epochs
        return f"{self.folder.name} epoch {entry['epoch']}/{epochs}: {', '.join(parts)}" + ("  best" if better else "")

    def _stopped(self, number: int) -> Stopped:
        """For all processes to end with, after they have saved."""
        processes.leave(self.accelerator)
        return Stopped(number, f"at step {self.progress.position} of epoch {self.progress.epoch + 1}")

    def _save_is_due(self) -> bool:
        """By the first process's clock; all save at the step at which all have heard of it."""
        return self.main and time.perf_counter() - self._saved >= 60 * self.config.save_minutes

    def _save(self, best: bool = False, epoch_ended: bool = False) -> None:
        """Write curves, history and checkpoints. All processes call it at the same step."""
        running = processes.gather(self.accelerator, self.running.as_dict())
        if self.curves is not None:
            try:
                length = self.curves.flush()
                content = self._content()
                # last.pt comes last: a run that stops in between does the epoch again and writes the same.
                if best:
                    checkpoint.save(self.folder / "best.pt", content)
                if epoch_ended:
                    self._write_history()
                checkpoint.save(self.folder / "last.pt", content | self._state(running, length))
            except OSError as error:
                raise RunError(f"{self.folder}: cannot write the checkpoint: {error.strerror or error}") from error
        self._saved = time.perf_counter()

    def _content(self) -> dict[str, Any]:
        """What both checkpoints hold."""
        model = self.model if self.step.average is None else self.step.average.model
        return {
            "model_config": self.model.config,
            "state_dict": model.state_dict(),
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "history": self.progress.history,
            "config": self.config.as_dict(),
        }

    def _state(self, running: list[dict[str, Any]], length: int) -> dict[str, Any]:
        """What a run goes on with."""
        average, scaler = self.step.average, self.accelerator.scaler
        progress = {name: value for name, value in vars(self.progress).items() if name != "history"}
        return {
            "raw_state_dict": None if average is None else self.model.state_dict(),
            "moves": None if average is None else average.moves,
            "optimizer": self.step.optimizer.state_dict(),
            "scheduler": _plain_scheduler(self.step.scheduler.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "progress": progress,
            "running": running,
            "updates": self.updates,
            "curves": length,
            "random": checkpoint.random_states(),
        }

    def _write_history(self) -> None:
        history = {
            "format": HISTORY_FORMAT,
            "label": self.config.label or self.folder.name,
            "kind": self.kind,
            "method": self.config.transfer.method,
            "seed": self.config.seed,
            "model": self.model.config,
            "parameters": count_parameters(self.model),
            "gflops": self.gflops,
            "epochs": self.progress.history,
        }
        write_text(self.folder / "history.json", json.dumps(history, indent=1) + "\n")

    def _open_folder(self, length: int) -> None:
        """Make the run's folder, or take hold of the one that is there."""
        curves = self.folder / "tensorboard"
        paths = (self.folder / "config.yaml", curves / NAME, curves, self.folder, *self.folder.parents)
        self._made = [path for path in paths if not path.exists()]
        try:
            self.curves = Curves(curves, length)
        except BlockingIOError:
            self._made = []
            raise RunError(f"{self.folder}: another process is training into it") from None
        for part in self.folder.glob(".*.part.*"):  # of a process that was killed while it wrote
            part.unlink()
        self._describe()

    def _describe(self) -> None:
        """Write the configuration, whose free keys may have changed."""
        import yaml

        write_text(self.folder / "config.yaml", yaml.safe_dump(self.config.as_dict(), sort_keys=False))

    def _resume(self) -> int:
        """Take up the run that the folder holds, if any; the length of its curves' file."""
        last = self.folder / "last.pt"
        if not last.is_file():
            if (self.folder / "best.pt").is_file() and not (self.folder / "config.yaml").is_file():
                raise RunError(
                    f"{self.folder}: holds a best.pt that is no run's and would be overwritten; choose another out"
                )
            return 0
        content = checkpoint.load(last, checkpoint.KEYS)
        try:
            return self._restore(content)
        except (RunError, torch.OutOfMemoryError):
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{last}: damaged: {one_line(error)}") from error

    def _restore(self, content: dict[str, Any]) -> int:
        changed = differences(completed(content["config"]), self.config.as_dict(), ignore=FREE_KEYS)
        if changed:
            raise RunError(
                f"{self.folder}: holds a run of another configuration ({'; '.join(changed)}); choose another out"
            )
        if content["updates"] != self.updates:
            raise RunError(
                f"{self.folder}: holds a run of {content['updates']} updates, now there would be {self.updates}: the "
                "data or the number of processes has changed; choose another out"
            )
        if len(content["running"]) != self.accelerator.num_processes:
            raise RunError(
                f"{self.folder}: holds a run of {len(content['running'])} processes, now there would be "
                f"{self.accelerator.num_processes}; choose another out"
            )
        average = self.step.average
        if average is not None:
            average.model.load_state_dict(content["state_dict"])
            average.moves = content["moves"]
        self.model.load_state_dict(content["state_dict"] if average is None else content["raw_state_dict"])
        self.step.optimizer.load_state_dict(content["optimizer"])
        self.step.scheduler.load_state_dict(content["scheduler"])
        if content["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"], history=content["history"])
        self.running = Running(**content["running"][self.accelerator.process_index])
        checkpoint.restore_random_states(content["random"])
        return content["curves"]


def _check_valid(path: str, pairs: Pairs) -> None:
    if not pairs.names:
        raise RunError(f"{path}: there are no recordings to validate on; name data.valid_speakers")
    for name, frames in zip(pairs.names, pairs.frames, strict=True):
        if frames < SHORTEST:
            raise RunError(f"{path}: {name} is too short to validate on, {frames} samples")


def _plain_scheduler(state: dict[str, Any]) -> dict[str, Any]:
    """Without the annealing function, which the schedule has at construction and a safe checkpoint cannot hold."""
    return {key: value for key, value in state.items() if not callable(value)}
