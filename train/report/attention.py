"""Attention maps of teacher and students on the same recordings."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import torch

from mvat.models import Manner
from train.report import figures, pieces
from train.report.runs import System

_VIEWS = ("channel", "global", "local")


class Maps(NamedTuple):
    """The attention maps on one recording: place of the system -> block -> view -> map [T_l] of norm 1."""

    recording: str
    seconds: float
    by_model: dict[int, dict[str, dict[str, np.ndarray]]]


def models(shown: Sequence[System]) -> tuple[dict[int, Manner], list[str]]:
    """Place in `shown` -> model of the system's first run; and what could not be loaded."""
    models, notes = {}, []
    for place, system in enumerate(shown):
        checkpoint = system.first.folder / "best.pt"
        try:
            models[place] = Manner.from_pretrained(checkpoint)
        except (ValueError, OSError) as error:
            notes.append(f"“{system.label}” is left out: {error}")
    return models, notes


@torch.inference_mode()
def maps_of(model: Manner, noisy: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Block name -> view -> map [T_l] of norm 1 (0 where all is silent), float64."""
    blocks = model(torch.from_numpy(noisy)[None, None], return_maps=True)
    depth = model.config["depth"]
    levels = range(depth) if model.config["attention_layers"] == "all" else range(depth - 1, depth)
    names = [f"encoder {level + 1}" for level in levels] + [f"decoder {level + 1}" for level in reversed(levels)]
    result = {}
    for name, views in zip(names, blocks, strict=True):
        arrays = [view[0].double().numpy() for view in views]
        result[name] = {
            view: array / (np.linalg.norm(array) or 1.0) for view, array in zip(_VIEWS, arrays, strict=True)
        }
    return result


def attention(shown: Sequence[System], maps: Sequence[Maps]) -> str:
    """The table of distances from the teacher's maps, and one recording's maps block by block.

    Args:
        shown: The systems that `maps` counts; those of the teacher's experiment are compared with it.
        maps: One a recording.
    """
    loaded = maps[0].by_model
    teacher = next((place for place in loaded if shown[place].first.kind == "teacher"), None)
    students = [
        place
        for place in loaded
        if teacher is not None and shown[place].first.kind == "student" and _beside(shown[place], shown[teacher])
    ]
    if teacher is None or not students:
        return pieces.missing("Maps are compared where a teacher's and a student's checkpoint (best.pt) are there.")
    rows = [_map_rows(shown, recording.by_model, teacher, students) for recording in maps]
    drawn = maps[len(maps) // 2], rows[len(maps) // 2]
    if not drawn[1]:
        return pieces.missing("Teacher and students have no block in common whose maps are equally long.")
    return (
        pieces.note(
            "What each view of each block attends to over time: the sum over channels of squared features (p = 2), "
            "normalised to length 1. The distance between a student's map and the teacher's is 0 where they are equal "
            f"and at most 1.41. The table averages over blocks and the recordings above ({len(maps)}). Encoder 1 and "
            "decoder 1 are the outermost."
        )
        + _distances(shown, students, [row for recording in rows for row in recording])
        + f"<h3>{escape(drawn[0].recording)}</h3>"
        + pieces.note("The numbers are the distances from the teacher in that panel.")
        + pieces.keys([shown[place] for place in (teacher, *students)])
        + f'<div class="wide"><div class="maps">{figures.attention_maps(drawn[1], drawn[0].seconds)}</div></div>'
    )


def _beside(a: System, b: System) -> bool:
    return a.first.folder.resolve().parent == b.first.folder.resolve().parent


def _map_rows(
    shown: Sequence[System], by_model: Mapping[int, Any], teacher: int, students: Sequence[int]
) -> list[dict[str, Any]]:
    """For each block that the students share with the teacher, what `figures.attention_maps` draws."""
    rows = []
    for block, views in by_model[teacher].items():
        row: dict[str, Any] = {"block": block}
        for view, map_ in views.items():
            row[view] = [(shown[teacher].style, map_, None)]
            for place in students:
                own = by_model[place].get(block, {}).get(view)
                if own is not None and own.shape == map_.shape:
                    distance = float(np.linalg.norm(own - map_))
                    row[view].append((shown[place].style, own, distance))
        if all(len(row[view]) == 1 + len(students) for view in _VIEWS):
            rows.append(row)
    return rows


def _distances(shown: Sequence[System], students: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the mean distances from the teacher."""
    means = np.array(
        [[np.mean([row[view][1 + i][2] for row in rows]) for view in _VIEWS] for i in range(len(students))]
    )
    means = np.concatenate([means, means.mean(1, keepdims=True)], 1)
    lines = []
    for place, values in zip(students, means, strict=True):
        texts = [f"{value:.3f}" for value in values]
        closest = [f"{value:.3f}" for value in means.min(0)]
        cells = [f"<b>{text}</b>" if text == least else text for text, least in zip(texts, closest, strict=True)]
        lines.append(pieces.row("", (pieces.label(shown[place]), *cells)))
    return pieces.table(("Mean distance from the teacher's maps", *_VIEWS, "all views"), lines)
