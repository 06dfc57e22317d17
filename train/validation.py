"""Validation over whole recordings, each by one of the processes, with the results on all of them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from mvat.audio import SAMPLE_RATE
from mvat.losses import ENHANCEMENT_LOSSES
from mvat.metrics import PESQ_METRICS, Failure, Scores, score_files
from train import processes
from train.config import RunConfig
from train.data import Pairs

#: Seconds of a recording that the curves keep.
SAMPLE_SECONDS = 5


class Sample(NamedTuple):
    """The beginning of a recording for people to listen to, [T] each."""

    name: str
    clean: np.ndarray
    noisy: np.ndarray
    estimate: np.ndarray


class _Share(NamedTuple):
    """What one process found out; None in place of it where it was asked to stop."""

    losses: dict[int, float]
    rows: dict[str, dict[str, float | None]]
    failures: list[Failure]
    samples: dict[int, Sample]


@torch.no_grad()
def validate(
    model: nn.Module, pairs: Pairs, config: RunConfig, accelerator: Accelerator, stopped: Callable[[], int]
) -> tuple[dict[str, float], list[Sample]] | None:
    """Mean loss and scores, and samples, the same on all processes; None where any was asked to stop meanwhile.

    Args:
        model: the model on its device, in evaluation mode; the first process's running statistics are used.
        pairs: the recordings.
        config: loss, metrics and number of samples.
        accelerator: the processes.
        stopped: not 0 when this process was asked to stop; asked before every recording and after the scores.

    Returns:
        "loss", a mean for every metric that had one, and "unscored", the number of recordings that a metric could not
        score, which are in no mean; the samples, spread evenly over the recordings.
    """
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    valid = config.valid
    share = _share(model, pairs, config, accelerator, stopped)
    shares = [share for share in processes.gather(accelerator, share) if share is not None]
    if len(shares) < accelerator.num_processes:
        return None
    losses = {i: loss for share in shares for i, loss in share.losses.items()}
    result = {"loss": float(np.mean([losses[i] for i in sorted(losses)]))}
    if valid.metrics:
        rows = {name: row for share in shares for name, row in share.rows.items()}
        scores = Scores(
            tuple(valid.metrics),
            {name: rows[name] for name in pairs.names},
            [failure for share in shares for failure in share.failures],
        )
        result |= {name: value for name, value in scores.mean().items() if value is not None}
        if scores.failures:
            result["unscored"] = len(scores.unscored())
    samples = {i: sample for share in shares for i, sample in share.samples.items()}
    return result, [samples[i] for i in sorted(samples)]


def _share(
    model: nn.Module, pairs: Pairs, config: RunConfig, accelerator: Accelerator, stopped: Callable[[], int]
) -> _Share | None:
    valid, loss = config.valid, ENHANCEMENT_LOSSES[config.optim.loss]
    count = len(pairs.names)
    heard = {i * count // valid.samples for i in range(valid.samples)} if valid.samples else set()
    losses, scored, samples = {}, [], {}
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    for i in tqdm(mine, desc="validate", disable=None if accelerator.is_main_process else True, leave=False):
        if stopped():
            return None
        pair = pairs.read(i)
        clean, noisy = (
            torch.from_numpy(np.ascontiguousarray(x))[None, None].to(accelerator.device)
            for x in (pair.clean, pair.noisy)
        )
        estimate = model(noisy)
        losses[i] = loss(estimate, clean, noisy).item()
        array = estimate[0, 0].cpu().numpy()
        if valid.metrics:
            scored.append((pairs.names[i], pair.clean, array))
        if i in heard:
            tracks = (track[: SAMPLE_SECONDS * SAMPLE_RATE] for track in (pair.clean, pair.noisy, array))
            samples[i] = Sample(pairs.names[i], *tracks)
    if not valid.metrics:
        return _Share(losses, {}, [], samples)
    # PESQ is slow and can crash, so it has processes of its own, which cost more than they save for the others.
    workers = processes.own_cores() if set(PESQ_METRICS) & set(valid.metrics) else 0
    scores = score_files(scored, valid.metrics, workers, progress=False)
    if stopped():  # the signal may have reached the scoring processes too
        return None
    return _Share(losses, scores.rows, scores.failures, samples)
