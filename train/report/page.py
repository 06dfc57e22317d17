"""The whole page: what stands on it and in which order."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mvat import __version__
from mvat.files import write_text
from train.report import pieces, samples, scores, training
from train.report.runs import System, collect
from train.report.words import MOST_COMPARISONS, comparisons, find_baseline, lead, verdict


def report(*folders: Path, baseline: str | None = None, out: Path | None = None, progress: bool = True) -> Path:
    """Writes one page on all runs in some folders.

    Args:
        folders: Experiments (a folder with one folder a run) or single runs.
        baseline: Label or folder of the system that the others are compared with; by default the noisy input.
        out: The file to write; by default report.html in the folder, which must then be one.
        progress: Whether to show a progress bar.

    Returns:
        The file written.

    Raises:
        ValueError: There is no run, a JSON file is malformed (names it), or nothing is called as the baseline is.
        OSError: The file cannot be written.
    """
    if out is None:
        if len(folders) != 1:
            raise ValueError(f"{len(folders)} folders are given: name the file to write as well")
        out = folders[0] / "report.html"
    systems = collect(*folders)
    against = find_baseline(systems, baseline)
    title = ", ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    write_text(out, page(title, systems, against, progress))
    return out


def page(title: str, systems: Sequence[System], baseline: System | None, progress: bool = True) -> str:
    """The whole document."""
    sections = (
        _header(title, systems),
        scores.scores(systems),
        scores.differences(systems, baseline),
        scores.pairs(systems),
        training.curves(systems),
        training.progress(systems),
        samples.samples(systems, progress),
        _configurations(systems),
    )
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: mvat report</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def _header(title: str, systems: Sequence[System]) -> str:
    pairs = list(comparisons(systems))
    named = len(pairs) > 1
    verdicts = "".join(
        f"<p>{escape(f'“{mvat.label}”: ' if named else '')}{escape(verdict(alone, mvat))}</p>"
        for alone, mvat in (pairs if len(pairs) <= MOST_COMPARISONS else ())
    )
    scored = [run.scores for system in systems for run in system.runs if run.scores]
    sets = sorted({(scores["set"], scores["data"]) for scores in scored})
    facts = ""
    for kind, data in sets:
        count = max(len(scores["files"]) for scores in scored if (scores["set"], scores["data"]) == (kind, data))
        facts += f"{count} recordings of the {kind} set of {Path(data).parent.name}. "
    warning = pieces.missing("The runs were scored on different sets; compare with care.") if len(sets) > 1 else ""
    return (
        f"<header>\n<h1>Speech enhancement: {escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead(systems))}</p>\n{verdicts}\n'
        f'<p class="facts">{escape(facts)}MV-AT is multi-view attention transfer from teacher to student. '
        f"mvat {__version__}.</p>\n{warning}</header>"
    )


def _configurations(systems: Sequence[System]) -> str:
    runs = [run for system in systems for run in system.runs if run.config is not None]
    details = "\n".join(
        f"<details><summary>{escape(run.folder.name)}: {escape(run.label)}</summary>"
        f"<pre>{escape(run.config or '')}</pre></details>"
        for run in runs
    )
    return pieces.section("Configuration", details or pieces.missing("No run has a config.yaml."))
