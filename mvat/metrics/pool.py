"""Many pairs of recordings, scored in processes that may die without taking the others along."""

import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from mvat import audio
from mvat.metrics.checks import floating
from mvat.metrics.measures import METRICS, Pair, known
from mvat.metrics.scores import ALL, Failure, ScoreError, Scores

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_DIED = (
    "the scoring process died on it (PESQ's C code is known to crash on recordings with more than 50 utterances; "
    "otherwise look for a lack of memory)"
)

Signal = str | os.PathLike | np.ndarray


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
    metrics = known(metrics)
    names: set[str] = set()
    for name, *signals in pairs:
        if name in names:
            raise ValueError(f"every recording needs a name of its own, given twice: {name!r}")
        names.add(name)
        for signal in signals:
            if not isinstance(signal, (str, os.PathLike)):
                floating(signal, name)
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
        pair = Pair(_load(clean), _load(estimate))
    except ValueError as error:  # ScoreError and AudioError
        return _Result(place, name, row, [Failure(name, ALL, str(error))])
    failures = []
    for metric in metrics:
        try:
            row[metric] = pair.measure(metric)
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
