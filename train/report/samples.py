"""Recordings to listen to and look at, and the attention maps on them."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mvat import audio
from train import manifest
from train.report import attention, figures, pieces
from train.report.runs import SHOWN, Run, System
from train.report.words import find

SECONDS = 5  # of a recording that are shown and can be heard
MOST = 5  # systems beside the noisy input


class Sample(NamedTuple):
    """A recording to look at and listen to."""

    entry: manifest.Entry
    why: str


def samples(systems: Sequence[System], progress: bool) -> str:
    """Spectrograms and players of a few recordings, and the attention maps on them."""
    best = _best(systems)
    if best is None:
        reason = "No run has enhanced recordings (python -m train.evaluate writes them)."
        return pieces.section("Listen and look", pieces.missing(reason))
    chosen, reason = _choose(systems, best)
    if not chosen:
        return pieces.section("Listen and look", pieces.missing(reason))
    shown, left_out = shown_systems(systems, best)
    models, notes = attention.models(shown)
    blocks, maps = [], []
    for sample in tqdm(chosen, desc="report", unit="recording", disable=None if progress else True):
        blocks.append(_sample(sample, systems, shown))
        noisy = _excerpt(sample.entry.noisy)
        by_model = {place: attention.maps_of(model, noisy) for place, model in models.items()}
        maps.append(attention.Maps(sample.entry.name, len(noisy) / audio.SAMPLE_RATE, by_model))
    explained = pieces.note(
        f"At most the first {SECONDS} seconds of each recording. All spectrograms share one scale, 0 dB being the "
        f"loudest point of the recording's signals.{left_out}"
    )
    scale = f'<div class="bar">{figures.colour_bar()}</div>\n'
    return "\n".join(
        (
            pieces.section("Listen and look", explained, scale, "\n".join(blocks)),
            pieces.section("Attention maps", *map(pieces.missing, notes), attention.attention(shown, maps)),
        )
    )


def _best(systems: Sequence[System]) -> System | None:
    """The student, or else the teacher, of the best SI-SDR that has enhanced recordings."""
    found = [s for s in find(systems, "student") or find(systems, "teacher") if (s.first.folder / "enhanced").is_dir()]
    return max(found, key=_quality, default=None)


def _quality(system: System) -> float:
    mean = system.mean("si_sdr")
    return -np.inf if mean is None else mean


def shown_systems(systems: Sequence[System], best: System) -> tuple[list[System], str]:
    """What is shown beside the noisy input, in order: a teacher and the best students; and a sentence on the rest."""
    same_set = [s for s in systems if s.first.kind != "noisy" and s.scored_on <= best.scored_on]
    teachers = [s for s in same_set if s.first.kind == "teacher"]
    students = sorted((s for s in same_set if s.first.kind == "student"), key=_quality, reverse=True)
    chosen = teachers[: 1 if students else MOST] + students[: MOST - 1]
    shown = [s for s in same_set if s in chosen]
    every = sum(s.first.kind != "noisy" for s in systems)
    more = f" Of {every} systems, {len(shown)} are shown, the best in SI-SDR on this set." if len(shown) < every else ""
    return shown, more


def _choose(systems: Sequence[System], best: System) -> tuple[list[Sample], str]:
    """The recordings that the best system changes least favourably, at the median and most; or why there are none."""
    scores = best.first.scores or next(run.scores for run in best.runs if run.scores)
    try:
        entries = {entry.name: entry for entry in manifest.load(scores["data"]).split(scores["set"])}
    except ValueError as error:
        return [], f"The recordings cannot be read: {error}"
    noisy = [system for system in find(systems, "noisy") if system.scored_on == best.scored_on]
    before, after = noisy[0].rows("si_sdr") if noisy else {}, best.first.rows("si_sdr")
    gains = {name: value - before.get(name, 0) for name, value in after.items() if name in entries}
    ranked = sorted(gains, key=lambda name: gains[name])
    if not ranked:
        return [], "No recording of the set has an SI-SDR."
    what = f"change in SI-SDR by “{best.label}”" if noisy else f"SI-SDR of “{best.label}”"
    places = {"lowest": 0, "median": len(ranked) // 2, "highest": len(ranked) - 1}
    names: dict[str, str] = {}
    for word, place in places.items():
        names.setdefault(ranked[place], word)
    return [Sample(entries[n], f"the {word} {what}, {gains[n]:+.1f} dB") for n, word in names.items()], ""


def _sample(sample: Sample, systems: Sequence[System], shown: Sequence[System]) -> str:
    entry = sample.entry
    noisy = find(systems, "noisy")
    signals: list[tuple[str, str, Path, Run | None]] = [
        ("noisy", "noisy", entry.noisy, noisy[0].first if noisy else None)
    ]
    for system in shown:
        first = system.first
        seed = f", seed {first.seed}" if len(system.runs) > 1 else ""
        path = first.folder / "enhanced" / f"{entry.name}.wav"
        signals.append((system.style, f"{system.label}{seed}", path, first))
    signals.append(("clean", "clean", entry.clean, None))

    heard: list[tuple[str, str, np.ndarray | None, str]] = []
    for key, label, path, run in signals:
        try:
            heard.append((key, label, _excerpt(path), _one_line(run, entry.name)))
        except audio.AudioError:
            heard.append((key, label, None, ""))
    spectra = [None if samples is None else figures.decibels(samples) for _, _, samples, _ in heard]
    top = max(float(spectrum.max()) for spectrum in spectra if spectrum is not None)
    cells = []
    for (key, label, samples, numbers), spectrum in zip(heard, spectra, strict=True):
        title = f'<span class="key {key}"></span><b>{escape(label)}</b>'
        if samples is None or spectrum is None:
            cells.append(f'<div>{title}</div><div class="note">no enhanced file</div>')
            continue
        picture = figures.spectrogram(spectrum, top, f"{label}, {entry.name}", time_axis=key == "clean")
        cells.append(f"<div>{title}<small>{numbers}</small>{_player(samples, label)}</div><div>{picture}</div>")
    about = ", ".join(filter(None, (entry.noise, None if entry.snr is None else f"{entry.snr:g} dB SNR", sample.why)))
    return (
        f'<h3>{escape(entry.name)}</h3><p class="note">{escape(about)}</p>\n<div class="sample">\n'
        + "\n".join(cells)
        + "\n</div>"
    )


def _excerpt(path: Path) -> np.ndarray:
    return audio.read(path)[0][0][: SECONDS * audio.SAMPLE_RATE]


def _one_line(run: Run | None, name: str) -> str:
    parts = []
    for metric in ("pesq_wb", "si_sdr"):
        value = run.rows(metric).get(name) if run else None
        if value is not None:
            parts.append(f"{SHOWN[metric].title} {value:.{SHOWN[metric].digits}f}{SHOWN[metric].unit}")
    return " · ".join(parts)


def _player(samples: np.ndarray, label: str) -> str:
    target = io.BytesIO()
    audio.require("soundfile").write(target, np.clip(samples, -1, 1), audio.SAMPLE_RATE, "PCM_16", format="FLAC")
    data = base64.b64encode(target.getvalue()).decode()
    return (
        f'<audio controls preload="metadata" aria-label="{escape(label)}" src="data:audio/flac;base64,{data}"></audio>'
    )
