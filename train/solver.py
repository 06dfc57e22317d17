"""The training loop: epochs of steps, validation, curves, checkpoints; the same run folder goes on where it stopped."""

import contextlib
import json
import math
import os
import resource
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader
from tqdm import tqdm

from mvat.audio import SAMPLE_RATE
from mvat.files import write_text
from mvat.losses import SHORTEST, weighted_mrstft_loss
from mvat.metrics import METRICS, PESQ_METRICS, score_files
from mvat.models import Manner, count_flops, count_parameters
from train import checkpoint
from train.config import OptimConfig, RunConfig, differences
from train.data import EpochSampler, Pairs, Segments
from train.mixtures import Mixtures
from train.transfer import Transfer

HISTORY_FORMAT = "mvat-history-1"
#: What may change when a run goes on.
FREE_KEYS = ("out", "label", "data.workers")


class RunError(ValueError):
    """A run that cannot start or go on; the message names the folder and the reason."""


class DivergedError(RunError):
    """A run whose loss is not finite any more; the same command would end the same way."""


class Solver:
    """Trains one model into one run folder.

    Args:
        config: the resolved configuration.
        model: the model to train, freshly initialised.
        teacher: the frozen teacher, or None.
        examples: what it is trained on: its items are asked for as (epoch, index) and are (clean, noisy) [1, length].
        valid_pairs: the recordings to validate on.
        kind: "teacher" or "student", for tables.

    Raises:
        RunError: if the folder holds another run, or the configuration does not fit the data.
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
        self._check_configuration(valid_pairs)
        self.accelerator = _accelerator(optim)
        self.examples = examples
        self.valid_pairs = valid_pairs
        self.sampler = EpochSampler(len(self.examples), config.seed)
        processes = self.accelerator.num_processes
        if len(self.examples) < optim.batch_size * processes:
            raise RunError(
                f"{data.path}: {len(self.examples)} training examples do not fill one batch of {optim.batch_size}"
                + (f" on {processes} processes" if processes > 1 else "")
            )
        loader = DataLoader(
            self.examples,
            optim.batch_size,
            sampler=self.sampler,
            drop_last=True,
            num_workers=data.workers,
            persistent_workers=data.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.transfer = Transfer(config.transfer, model, teacher).to(self.accelerator.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=optim.lr, fused=True)
        # The schedule is ours, not accelerate's, which would step it once a process.
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        updates = math.ceil(len(self.loader) / optim.accumulate)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer.optimizer, max_lr=optim.lr, total_steps=updates * optim.epochs
        )
        self.gflops = round(count_flops(model.config) / 1e9, 4)
        self.epoch, self.step = 0, 0
        self.best: float | None = None
        self.history: list[dict[str, Any]] = []
        self._writer: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.accelerator.is_main_process

    def fit(self) -> list[dict[str, Any]]:
        """Train to the last epoch and return the history; a finished run returns at once."""
        self._open_folder()
        if self.epoch == self.config.optim.epochs:
            if self.main:
                print(f"{self.folder}: is complete, {self.epoch} epochs", flush=True)
            return self.history
        self._open_curves()
        if self.main and self.epoch:
            print(f"{self.folder}: goes on after epoch {self.epoch} of {self.config.optim.epochs}", flush=True)
        for epoch in range(self.epoch + 1, self.config.optim.epochs + 1):
            row = self._train_epoch(epoch)
            valid = self.config.valid
            if epoch % valid.every == 0 or epoch == self.config.optim.epochs:
                row["valid"] = self._validate()
            self.epoch = epoch
            self.history.append(row)
            if self.main:
                self._record(row)
            self.accelerator.wait_for_everyone()
        if self._writer is not None:
            self._writer.close()
        self.accelerator.end_training()
        return self.history

    def _check_configuration(self, valid_pairs: Pairs) -> None:
        """Whatever would otherwise end a run late: RunError names the key."""
        optim, valid, data = self.config.optim, self.config.valid, self.config.data
        for name, value in (
            ("epochs", optim.epochs),
            ("batch_size", optim.batch_size),
            ("accumulate", optim.accumulate),
        ):
            if value < 1:
                raise RunError(f"optim.{name} must be at least 1, got {value}")
        if not 0 < optim.lr < math.inf:
            raise RunError(f"optim.lr must be positive, got {optim.lr}")
        if valid.every < 1:
            raise RunError(f"valid.every must be at least 1, got {valid.every}")
        unknown = set(valid.metrics) - set(METRICS)
        if unknown:
            raise RunError(f"valid.metrics must be some of {', '.join(METRICS)}, got {', '.join(sorted(unknown))}")
        if valid.select != "loss" and valid.select not in valid.metrics:
            raise RunError(f'valid.select must be "loss" or one of valid.metrics, got {valid.select!r}')
        if round(data.segment_seconds * SAMPLE_RATE) < SHORTEST:
            raise RunError(
                f"data.segment_seconds must be at least {SHORTEST / SAMPLE_RATE:.4f}, got {data.segment_seconds}"
            )
        if not valid_pairs.names:
            raise RunError(f"{data.path}: there are no recordings to validate on; name data.valid_speakers")
        for name, frames in zip(valid_pairs.names, valid_pairs.frames, strict=True):
            if frames < SHORTEST:
                raise RunError(f"{data.path}: {name} is too short to validate on, {frames} samples")

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        self.sampler.epoch = epoch
        self.model.train()
        sums: dict[str, torch.Tensor] = {}
        steps = len(self.loader)
        started = time.perf_counter()
        _reset_peak_memory()
        bar = tqdm(
            self.loader,
            desc=f"{self.folder.name} {epoch}/{self.config.optim.epochs}",
            disable=None if self.main else True,  # None: on a terminal only
            leave=False,
        )
        for clean, noisy in bar:
            with self.accelerator.accumulate(self.model):
                parts = self._step(clean, noisy)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value
            self.step += 1
            if self.step % 10 == 0:
                bar.set_postfix({name: f"{value.item():.3f}" for name, value in parts.items()}, refresh=False)
                self._curves("train", {k: v.item() for k, v in parts.items()} | {"lr": self._rate()}, self.step)
        means = {name: self.accelerator.reduce(value / steps, "mean").item() for name, value in sums.items()}
        seconds = time.perf_counter() - started
        if not all(map(math.isfinite, means.values())):
            raise DivergedError(
                f"{self.folder}: the training loss of epoch {epoch} is not finite ({means}); "
                "a lower optim.lr may help; last.pt holds the epoch before"
            )
        audio = steps * self.config.optim.batch_size * self.accelerator.num_processes * self.config.data.segment_seconds
        return {
            "epoch": epoch,
            "step": self.step,
            "lr": self._rate(),
            "seconds": round(seconds, 3),
            "audio_seconds_per_second": round(audio / seconds, 2),
            "peak_memory_gb": round(_peak_memory() / 1e9, 3),
            "train": means,
        }

    def _step(self, clean: torch.Tensor, noisy: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            estimate, transfer = self.transfer.student_and_loss(self.model, noisy)
        enhancement = weighted_mrstft_loss(estimate.float(), clean, noisy)
        loss = enhancement if transfer is None else enhancement + self.config.transfer.weight * transfer
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        moved = self.accelerator.sync_gradients and not self.accelerator.optimizer_step_was_skipped
        if moved and self.scheduler.last_epoch < self.scheduler.total_steps - 1:
            self.scheduler.step()
        parts = {"total": loss, "enhancement": enhancement} | ({} if transfer is None else {"transfer": transfer})
        return {name: value.detach() for name, value in parts.items()}

    def _rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean loss and scores over whole recordings; every process waits for the one that computes them.

        "unscored" counts the recordings that a metric could not score, which are in no mean.
        """
        if not self.main:
            return {}
        model = self.accelerator.unwrap_model(self.model).eval()
        losses, scored = [], []
        every = range(len(self.valid_pairs.names))
        for i in tqdm(every, desc="validate", disable=None, leave=False):
            pair = self.valid_pairs.read(i)
            clean, noisy = (torch.from_numpy(np.ascontiguousarray(x))[None, None] for x in pair)
            noisy = noisy.to(self.accelerator.device)
            estimate = model(noisy).float()
            losses.append(weighted_mrstft_loss(estimate, clean.to(noisy.device), noisy).item())
            scored.append((self.valid_pairs.names[i], pair.clean, estimate[0, 0].cpu().numpy()))
        result = {"loss": float(np.mean(losses))}
        if self.config.valid.metrics:
            # PESQ is slow and can crash, so it has processes of its own, which cost more than they save for the others.
            workers = None if set(PESQ_METRICS) & set(self.config.valid.metrics) else 0
            scores = score_files(scored, self.config.valid.metrics, workers, progress=False)
            result |= {name: value for name, value in scores.mean().items() if value is not None}
            if scores.failures:
                result["unscored"] = len(scores.unscored())
        self._curves("valid", result, self.step)
        return result

    def _record(self, row: dict[str, Any]) -> None:
        """Write checkpoints, history and one line on the screen."""
        better = self._is_better(row)
        content = self._content()
        try:
            # last.pt comes last: a run that stops in between does the epoch again and writes the same.
            if better:
                checkpoint.save(self.folder / "best.pt", content)
            self._write_history()
            checkpoint.save(self.folder / "last.pt", content)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot write the checkpoint: {error.strerror or error}") from error
        self._curves("speed", {"audio_seconds_per_second": row["audio_seconds_per_second"]}, self.step)
        parts = [f"{name} {value:.4f}" for name, value in row["train"].items()]
        parts += [f"valid {name} {value:.3f}" for name, value in row.get("valid", {}).items()]
        mark = "  best" if better else ""
        print(
            f"{self.folder.name} epoch {row['epoch']}/{self.config.optim.epochs}: {', '.join(parts)}, "
            f"{row['audio_seconds_per_second']:.0f}x real time{mark}",
            flush=True,
        )

    def _is_better(self, row: dict[str, Any]) -> bool:
        """Whether this epoch is the best so far, which is then noted. The last one is, where none could be scored."""
        select = self.config.valid.select
        value = row.get("valid", {}).get(select)
        if value is None or not math.isfinite(value):
            return self.best is None and row["epoch"] == self.config.optim.epochs
        value = -value if select == "loss" else value
        if self.best is not None and value <= self.best:
            return False
        self.best = value
        return True

    def _content(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model)
        scaler = self.accelerator.scaler
        return {
            "model_config": model.config,
            "state_dict": model.state_dict(),
            "optimizer": self.optimizer.optimizer.state_dict(),
            "scheduler": _plain_scheduler(self.scheduler.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "updates": self.scheduler.total_steps,
            "history": self.history,
            "config": self.config.as_dict(),
            "random": checkpoint.random_states(),
        }

    def _write_history(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        history = {
            "format": HISTORY_FORMAT,
            "label": self.config.label or self.folder.name,
            "kind": self.kind,
            "method": self.config.transfer.method,
            "seed": self.config.seed,
            "model": model.config,
            "parameters": count_parameters(model),
            "gflops": self.gflops,
            "epochs": self.history,
        }
        write_text(self.folder / "history.json", json.dumps(history, indent=1) + "\n")

    def _open_folder(self) -> None:
        """Make the run's folder, or take up the run that it holds."""
        import yaml

        last = self.folder / "last.pt"
        if last.is_file():
            self._resume(checkpoint.load(last))
        if not self.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(".*.part.*"):  # of a process that was killed while it wrote
                part.unlink()
            write_text(self.folder / "config.yaml", yaml.safe_dump(self.config.as_dict(), sort_keys=False))
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written to: {error.strerror or error}") from error

    def _resume(self, content: dict[str, Any]) -> None:
        changed = differences(content["config"], self.config.as_dict(), ignore=FREE_KEYS)
        if changed:
            raise RunError(
                f"{self.folder}: holds a run of another configuration ({'; '.join(changed)}); choose another out"
            )
        updates = self.scheduler.total_steps
        if content["updates"] != updates:
            raise RunError(
                f"{self.folder}: holds a run of {content['updates']} updates, now there would be {updates}: the data "
                "or the number of processes has changed; choose another out"
            )
        self.accelerator.unwrap_model(self.model).load_state_dict(content["state_dict"])
        self.optimizer.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        if content["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.epoch, self.step, self.best = content["epoch"], content["step"], content["best"]
        self.history = content["history"]
        checkpoint.restore_random_states(content["random"])

    def _open_curves(self) -> None:
        if self.main:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)
            except OSError as error:
                raise RunError(f"{self.folder}: cannot be written to: {error.strerror or error}") from error

    def _curves(self, group: str, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def _plain_scheduler(state: dict[str, Any]) -> dict[str, Any]:
    """Without the annealing function, which the schedule has at construction and a safe checkpoint cannot hold."""
    return {key: value for key, value in state.items() if not callable(value)}


def _accelerator(optim: OptimConfig) -> Accelerator:
    """Device, precision and processes; several processes on a CPU too, which accelerate must be told."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        cpu=world > 1 and not torch.cuda.is_available(),
        mixed_precision=optim.precision,
        gradient_accumulation_steps=optim.accumulate,
        step_scheduler_with_optimizer=False,
        # The others wait while one process validates.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )
    if accelerator.num_processes != world:
        raise RunError(f"{world} processes were started, but accelerate sees {accelerator.num_processes}")
    return accelerator


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # Linux alone can reset it; elsewhere it counts from the process's start
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> float:
    """Bytes: the most memory this process has held since the reset, on the GPU where there is one."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
