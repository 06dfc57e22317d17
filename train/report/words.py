"""What the scores say in words, and the comparisons that it rests on."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from train.report.runs import SHOWN, System

MOST_COMPARISONS = 3  # in words and pictures; of more, the table of differences must do
_MOST_NAMED = 4  # students in one sentence


class Difference(NamedTuple):
    """A system's mean score less a baseline's, over the recordings that both have scored."""

    mean: float
    half: float | None  # of the 95 % confidence interval of the mean; None for a single recording
    recordings: int


def difference(baseline: System, system: System, metric: str) -> Difference | None:
    """The paired difference with Student's confidence interval, recordings taken as independent; None without pairs."""
    from scipy.special import stdtrit

    if len(baseline.scored_on) != 1 or baseline.scored_on != system.scored_on:
        return None
    a, b = baseline.rows(metric), system.rows(metric)
    values = [b[name] - a[name] for name in a if name in b]
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Difference(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Difference(mean, float(stdtrit(count - 1, 0.975)) * math.sqrt(variance / count), count)


def find_baseline(systems: Sequence[System], label: str | None = None) -> System | None:
    """The system of that label or folder; by default the noisy input, else the first that is scored, else None.

    Raises:
        ValueError: There is no system of that label.
    """
    if label is None:
        scored = [system for system in systems if system.scored_on]
        return next(iter(find(systems, "noisy") or scored), None)
    for system in systems:
        if label == system.label or label in (run.folder.name for run in system.runs):
            return system
    known = ", ".join(system.label for system in systems)
    raise ValueError(f"no run is called {label!r}; there are: {known}")


def find(systems: Sequence[System], kind: str, method: str | None = None) -> list[System]:
    """The systems of a kind, and of a method where one is given, that have been scored."""
    return [
        system
        for system in systems
        if system.first.kind == kind
        and method in (None, system.first.method)
        and any(run.scores for run in system.runs)
    ]


def comparisons(systems: Sequence[System]) -> Iterator[tuple[System, System]]:
    """(student alone, student with MV-AT), of the same size and experiment."""
    for mvat in find(systems, "student", "mvat"):
        for alone in find(systems, "student", "none"):
            beside = alone.first.folder.resolve().parent == mvat.first.folder.resolve().parent
            if beside and alone.first.parameters == mvat.first.parameters:
                yield alone, mvat


def lead(systems: Sequence[System]) -> str:
    """One sentence: do the students raise SI-SDR over the noisy input?"""
    noisy, students = find(systems, "noisy"), find(systems, "student")
    if not students:
        return "No student has been scored yet."
    if not noisy:
        return "The noisy input has not been scored yet, so there is nothing to compare the students with."
    gains: list[tuple[float, str]] = []
    for student in students:
        before, after = shared_means(noisy[0], student, "si_sdr")
        if before is None or after is None:
            continue
        gain = round(after - before, 2)
        verb = "does not change" if gain == 0 else "raises" if gain > 0 else "lowers"
        change = "" if gain == 0 else f" by {abs(gain):.2f} dB, from {before:.2f} to {after:.2f} dB"
        common, every = len(student.rows("si_sdr")), len(noisy[0].rows("si_sdr"))
        change += f" on the {common} of {every} recordings scored" if common < every else ""
        gains.append((gain, f"“{student.label}” {verb} the SI-SDR of the noisy input{change}"))
    if len(gains) <= _MOST_NAMED:
        return "; ".join(text for _, text in gains) + "." if gains else "SI-SDR has not been scored."
    raised = sum(gain > 0 for gain, _ in gains)
    return f"{raised} of {len(gains)} students raise the SI-SDR of the noisy input. {max(gains)[1]}."


def verdict(alone: System, mvat: System) -> str:
    """Whether MV-AT is ahead of the student alone, with the numbers, the recordings and the seeds."""
    ahead: list[str] = []
    behind: list[str] = []
    numbers: list[str] = []
    for name, metric in SHOWN.items():
        a, b = shared_means(alone, mvat, name)
        if a is None or b is None:
            continue
        difference = round(b - a, metric.digits)
        if difference:
            (ahead if difference > 0 else behind).append(metric.title)
        numbers.append(f"{metric.title} {b:.{metric.digits}f} against {a:.{metric.digits}f}{metric.unit}")
    if not numbers:
        return "MV-AT and the student alone have no scores in common."
    if ahead and behind:
        claim = f"MV-AT is ahead of the student alone in {_list(ahead)} and behind in {_list(behind)}"
    elif ahead:
        claim = f"MV-AT is ahead of the student alone in {_scores(ahead, len(numbers))}"
    elif behind:
        claim = f"MV-AT is behind the student alone in {_scores(behind, len(numbers))}"
    else:
        claim = "MV-AT and the student alone do not differ"
    return f"{claim}: {', '.join(numbers)}. {_recordings(alone, mvat)}{_chance(alone, mvat)}"


def shared_means(a: System, b: System, metric: str) -> tuple[float | None, float | None]:
    """The means of two systems over the recordings that both have scored."""
    rows = a.rows(metric), b.rows(metric)
    names = [name for name in rows[0] if name in rows[1]]
    if not names:
        return None, None
    first, second = (sum(row[name] for name in names) / len(names) for row in rows)
    return first, second


def _recordings(alone: System, mvat: System) -> str:
    a, b = alone.rows("si_sdr"), mvat.rows("si_sdr")
    common = [name for name in a if name in b]
    higher = sum(b[name] > a[name] for name in common)
    return f"SI-SDR is higher with MV-AT on {higher} of {len(common)} recordings. " if common else ""


def _chance(alone: System, mvat: System) -> str:
    means = alone.means("si_sdr"), mvat.means("si_sdr")
    if not all(means):
        return ""
    a, b = (len(values) for values in means)
    seeds = f"{a} and {b} seeds" if a != b else "one seed each" if a == 1 else f"{a} seeds each"
    if min(a, b) == 1:
        return f"With {seeds} a small difference may be chance."
    ranges = " and ".join(f"{min(values):.2f} to {max(values):.2f} dB" for values in means)
    apart = max(min(values) for values in means) > min(max(values) for values in means)
    overlap = "do not overlap" if apart else "overlap: the difference may be chance"
    return f"Over {seeds} the SI-SDR ranges, {ranges}, {overlap}."


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _scores(names: Sequence[str], every: int) -> str:
    return "every score" if len(names) == every else _list(names)
