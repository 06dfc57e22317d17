"""Scores of enhanced speech against the clean recording: PESQ, STOI, ESTOI and SI-SDR.

A recording that cannot be scored (silence, too short, lengths that differ, NaN, an unreadable file) is counted and
listed with its reason; it never enters a mean. PESQ and (E)STOI are what the packages ``pesq`` and ``pystoi`` give on
the signals as they are, SI-SDR is our own:

    s = clean - mean(clean), y = estimate - mean(estimate), t = <y, s> / <s, s> s
    SI-SDR = 10 log10(||t||^2 / ||y - t||^2)   in dB
"""

import csv
import importlib.util
import io
import json
import math
import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mvat import audio
from mvat.files import write_text

METRICS = ("pesq_wb", "pesq_nb", "stoi", "estoi", "si_sdr")
ALL = "all"  # the metric named by a failure that concerns the whole recording

_PACKAGE = {"pesq_wb": "pesq", "pesq_nb": "pesq", "stoi": "pystoi", "estoi": "pystoi"}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_DIED = (
    "the scoring process died on it (PESQ's C code is known to crash on recordings with more than 50 utterances; "
    "otherwise look for a lack of memory)"
)

Signal = str | os.PathLike | np.ndarray


class ScoreError(ValueError):
    """A recording that a metric cannot score.

    Attributes:
        metric: Name of the metric, or "all" where no metric can score the recording.
        reason: Why, in a few words.
    """

    def __init__(self, metric: str, reason: str):
        super().__init__(reason if metric == ALL else f"{metric}: {reason}")
        self.metric = metric
        self.reason = reason


class Failure(NamedTuple):
    """One recording that one metric (or "all" of them) could not score."""

    name: str
    metric: str
    reason: str


@dataclass(frozen=True)
class Scores:
    """Scores of many recordings.

    Attributes:
        metrics: Names of the metrics, in the order asked for.
        rows: Recording name -> metric -> score, None where it could not be had; in the order of the recordings.
        failures: What could not be scored, and why.
    """

    metrics: tuple[str, ...]
    rows: dict[str, dict[str, float | None]]
    failures: list[Failure]

    def count(self) -> dict[str, int]:
        """Number of recordings scored, for each metric."""
        return {metric: len(self._values(metric)) for metric in self.metrics}

    def mean(self) -> dict[str, float | None]:
        """Mean over the recordings scored, for each metric; None where there is none."""
        values = {metric: self._values(metric) for metric in self.metrics}
        return {metric: math.fsum(v) / len(v) if v else None for metric, v in values.items()}

    def unscored(self) -> list[str]:
        """Names of the recordings that at least one metric could not score."""
        return list(dict.fromkeys(failure.name for failure in self.failures))

    def to_dict(self) -> dict[str, Any]:
        """Means, counts, failures and all scores, ready for JSON."""
        return {
            "mean": self.mean(),
            "scored": self.count(),
            "failed": [failure._asdict() for failure in self.failures],
            "files": self.rows,
        }

    def to_json(self, path: str | os.PathLike, header: Mapping[str, Any] | None = None) -> None:
        """Writes `header` and the scores to a JSON file, whole or not at all."""
        write_text(path, json.dumps({**(header or {}), **self.to_dict()}, indent=1, allow_nan=False) + "\n")

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one line a recording to a CSV file, whole or not at all; an empty field is a score not had."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("name", *self.metrics))
        table.writerows((name, *(row[metric] for metric in self.metrics)) for name, row in self.rows.items())
        write_text(path, text.getvalue())

    def _values(self, metric: str) -> list[float]:
        return [value for row in self.rows.values() if (value := row[metric]) is not None]


def si_sdr(clean: np.ndarray, estimate: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of zero-mean signals.

    Args:
        clean: [T], floating point.
        estimate: [T], floating point.

    Returns:
        dB. +inf where the estimate is the clean signal up to a factor and rounding (above 280 dB, in float64), -inf
        where it has nothing of it.

    Raises:
        ScoreError: The signals differ in length, are empty, constant, or not finite.
        TypeError: A signal is not floating point.
    """
    clean, estimate = _checked(clean, estimate)
    s, y = clean - clean.mean(), estimate - estimate.mean()
    # Sums rather than products of vectors, whose rounding would depend on the number of threads.
    target = np.sum(y * s) / np.sum(s * s) * s
    signal_energy, noise_energy = np.sum(target**2), np.sum((y - target) ** 2)
    if noise_energy <= 1e-28 * signal_energy:
        return math.inf
    return 10 * math.log10(signal_energy / noise_energy) if signal_energy > 0 else -math.inf


def score(clean: np.ndarray, estimate: np.ndarray, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Scores one estimate, in this process.

    An infinite SI-SDR (a perfect estimate, see `si_sdr`) is no number a mean can hold: it is a ScoreError like any
    other. PESQ's C code can take the process down with it on recordings with more than 50 utterances; `score_files`
    survives that.

    Args:
        clean: [T], floating point, 16 kHz.
        estimate: [T], floating point, 16 kHz.
        metrics: Names out of METRICS.

    Returns:
        Metric -> score.

    Raises:
        ScoreError: The pair cannot be scored; names the metric and the reason.
        TypeError: A signal is not floating point.
        ValueError: An unknown metric.
        ModuleNotFoundError: A metric needs a package that is not installed.
    """
    metrics = _known(metrics)
    pair = _checked(clean, estimate)
    return {metric: _measure(metric, *pair) for metric in metrics}


def score_files(
    pairs: Sequence[tuple[str, Signal, Signal]],
    metrics: Sequence[str] = METRICS,
    workers: int | None = None,
    progress: bool = True,
) -> Scores:
    """Scores many estimates in a pool of single-threaded processes.

    The processes are spawned, so a script that calls this needs the usual ``if __name__ == "__main__":``. One that dies
    costs only the recording it died on, which is listed among the failures.

    Args:
        pairs: (name, clean, estimate), names all different; a signal is the path of a 16 kHz mono file or an array [T]
            of floating point.
        metrics: Names out of METRICS.
        workers: Number of processes, by default one a CPU; 0 scores in this process, which is quicker for a few short
            recordings and has no protection from a crash.
        progress: Whether to show a progress bar.

    Returns:
        The scores, in the order of `pairs` whatever the workers.

    Raises:
        TypeError: A signal is neither path nor floating-point array.
        ValueError: An unknown metric, a name given twice, a negative number of workers.
        ModuleNotFoundError: A metric needs a package that is not installed.
        RuntimeError: The processes cannot be started.
    """
    metrics = _known(metrics)
    names: set[str] = set()
    for name, *signals in pairs:
        if name in names:
            raise ValueError(f"every recording needs a name of its own, given twice: {name!r}")
        names.add(name)
        for signal in signals:
            if not isinstance(signal, (str, os.PathLike)):
                _floating(signal, name)
    if workers is None:
        workers = os.cpu_count() or 1
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")

    jobs = [(place, metrics, pair) for place, pair in enumerate(pairs)]
    finished = _in_processes(jobs, workers) if workers and jobs else map(_score_job, jobs)
    results = sorted(_bar(finished, len(jobs), progress))
    return Scores(
        metrics,
        {result.name: result.row for result in results},
        [failure for result in results for failure in result.failures],
    )


# One metric of one pair


def _measure(metric: str, clean: np.ndarray, estimate: np.ndarray) -> float:
    try:
        if metric == "si_sdr":
            value = si_sdr(clean, estimate)
        elif metric in ("pesq_wb", "pesq_nb"):
            value = _pesq(clean, estimate, metric.removeprefix("pesq_"))
        else:
            value = _stoi(clean, estimate, extended=metric == "estoi")
    except Exception as error:  # the packages raise errors of many kinds, plain Exception among them
        reason = error.args[0] if error.args else type(error).__name__
        raise ScoreError(metric, reason.decode() if isinstance(reason, bytes) else str(reason)) from error
    if value == math.inf:
        raise ScoreError(metric, "infinite: the estimate is the clean signal up to a factor")
    if not math.isfinite(value):
        raise ScoreError(metric, f"the score is {value}")
    return value


def _pesq(clean: np.ndarray, estimate: np.ndarray, mode: str) -> float:
    from pesq import pesq

    return float(pesq(audio.SAMPLE_RATE, clean, estimate, mode))


def _stoi(clean: np.ndarray, estimate: np.ndarray, extended: bool) -> float:
    from pystoi import stoi

    with warnings.catch_warnings():
        # pystoi warns about a signal too short for one segment and returns 1e-5 as if that were its score.
        warnings.filterwarnings("error", message="Not enough STFT frames")
        try:
            return float(stoi(clean, estimate, audio.SAMPLE_RATE, extended=extended))
        except RuntimeWarning as warning:
            raise ValueError("too short: fewer than 30 frames (0.4 s) of speech") from warning


def _floating(signal: Any, name: str) -> np.ndarray:
    array = np.asarray(signal)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: expected a floating-point array, got {type(signal).__name__} of {array.dtype}")
    return array


def _checked(clean: np.ndarray, estimate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pair = [_floating(clean, "clean"), _floating(estimate, "estimate")]
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape:
        shapes = " and ".join(str(list(array.shape)) for array in pair)
        raise ScoreError(ALL, f"expected two signals [T] of one length, got clean and estimate {shapes}")
    for name, array in zip(("clean", "estimate"), pair, strict=True):
        if not array.size:
            raise ScoreError(ALL, "the signals are empty")
        if not np.isfinite(array).all():
            raise ScoreError(ALL, f"the {name} signal has NaN or infinite samples")
        if array.min() == array.max():
            raise ScoreError(ALL, f"the {name} signal is silent")
    return pair[0].astype(np.float64), pair[1].astype(np.float64)


def _known(metrics: Sequence[str]) -> tuple[str, ...]:
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}, expected some of {', '.join(METRICS)}")
        package = _PACKAGE.get(metric)
        if package and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{metric} needs the package {package}: pip install {package}", name=package)
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"expected one or more different metrics, got {', '.join(metrics) or 'none'}")
    return metrics


# Many pairs in many processes


class _Result(NamedTuple):
    place: int  # among the pairs, so that results sort into their order
    name: str
    row: dict[str, float | None]
    failures: list[Failure]


_Job = tuple[int, tuple[str, ...], tuple[str, Signal, Signal]]


def _load(signal: Signal) -> np.ndarray:
    if not isinstance(signal, (str, os.PathLike)):
        return np.asarray(signal)
    samples, rate = audio.read(signal)
    if rate != audio.SAMPLE_RATE or len(samples) != 1:
        raise ScoreError(ALL, f"{signal}: expected 16000 Hz mono, got {rate} Hz and {len(samples)} channel(s)")
    return samples[0]


def _score_job(job: _Job) -> _Result:
    place, metrics, (name, clean, estimate) = job
    row: dict[str, float | None] = dict.fromkeys(metrics)
    try:
        pair = _checked(_load(clean), _load(estimate))
    except ValueError as error:  # ScoreError and AudioError
        return _Result(place, name, row, [Failure(name, ALL, str(error))])
    failures = []
    for metric in metrics:
        try:
            row[metric] = _measure(metric, *pair)
        except ScoreError as error:
            failures.append(Failure(name, metric, error.reason))
    return _Result(place, name, row, failures)


def _in_processes(jobs: Sequence[_Job], workers: int) -> Iterator[_Result]:
    """Results in the order they are ready. The jobs under way when a process dies are tried again, each alone."""
    todo = deque(jobs)
    while todo:
        for suspect in (yield from _drain(todo, min(workers, len(todo)))):
            if (yield from _drain(deque([suspect]), 1)):
                place, metrics, (name, _, _) = suspect
                yield _Result(place, name, dict.fromkeys(metrics), [Failure(name, ALL, _DIED)])


def _drain(todo: deque[_Job], workers: int) -> Generator[_Result, None, list[_Job]]:
    """Works `todo` off until it is empty (returns []) or a process dies (returns the jobs then under way)."""
    running: dict[Future[_Result], _Job] = {}
    with _pool(workers) as pool:
        try:
            while todo or running:
                while todo and len(running) < workers:
                    running[pool.submit(_score_job, todo[0])] = todo[0]
                    todo.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    del running[future]
                    yield result
        except BrokenProcessPool:
            for future in wait(running).done:
                if future.exception() is None:
                    del running[future]
                    yield future.result()
    return list(running.values())


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # Spawned, since a fork of a process with PyTorch's threads can hang. A process reads the thread variables as it
    # starts, and all of them start at the first submit.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        saved = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
        try:
            pool.submit(os.getpid).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "the scoring processes died as they started; a script that scores files must do so under "
                'if __name__ == "__main__":'
            ) from error
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield pool


def _bar(results: Iterator[_Result], total: int, progress: bool) -> Iterator[_Result]:
    if not progress:
        return results
    from tqdm import tqdm

    return iter(tqdm(results, desc="scoring", total=total, unit="file", disable=None))
