"""What came out of a study: its record, study.json, from the run folders."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvat import __version__
from mvat.doctor import cpu_name
from mvat.files import write_text
from mvat.models import Manner, count_flops, count_parameters
from train.evaluate import HISTORY_FORMAT, SCORES_FORMAT, read_record
from train.study_config import model_name
from train.study_runs import Finished, Job, Plan, is_scored, read_finished
from train.study_statistics import paired_interval
from train.study_text import Json, page

FORMAT = "mvat-study-1"

#: (student's place, method's name) -> chosen weight, and the candidates' scores.
Choices = Mapping[tuple[int, str], tuple[float, Mapping[float, float | None]]]


def gather(plan: Plan, choices: Choices) -> Json:
    """The record of a study, finished or not.

    Keys: format, complete, date, machine, versions, config, select (the validation score that chose), files (names of
    the test set, in the order of all lists of scores), trials, runs (each with label, kind, student, method, weight,
    seed, steps, parameters, gflops, mean and scores by metric), systems (runs that differ in the seed alone: mean and
    spread, difference to the student alone with its interval) and like_quality.
    """
    config = plan.config
    weights = {key: weight for key, (weight, _) in choices.items()}
    finals = [job for jobs in plan.finals(weights) for job in jobs]
    runs = [_run("noisy", "noisy", "", "", plan.out / "noisy", None, None)]
    if config.teacher.checkpoint is not None:
        runs.append(_run("teacher", "teacher", "teacher", "", plan.out / "teacher", None, None))
    data = Path(runs[0].pop("data"))
    files = list(runs[0]["scores"])
    for job in (*plan.teachers(), *finals):
        finished = read_finished(job)
        if finished and (finished.diverged or is_scored(job.folder, data, config.metrics)):
            runs.append(_of_job(job, finished))
    done = {run["folder"] for run in runs}
    for run in runs:
        run.pop("data", None)
        # Rounded before anything is made of them, so that all can be computed again from the file.
        rows = [run["scores"].get(name, {}) for name in files]
        run["scores"] = {metric: [_rounded(row.get(metric)) for row in rows] for metric in config.metrics}
        run["mean"] = {metric: _mean(values) for metric, values in run["scores"].items()}
    systems = summarise(runs, config.metrics)
    return {
        "format": FORMAT,
        "complete": all(job.folder.name in done for job in finals),
        "date": date.today().isoformat(),
        "machine": _machine(),
        "versions": {
            "mvat": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "config": config.as_dict(),
        "select": config.run.valid.select,
        "trials": [
            {"student": model_name(config.students[student]), "method": method, "chosen": chosen}
            | {"scores": [[weight, score] for weight, score in scores.items()]}
            for (student, method), (chosen, scores) in choices.items()
            if scores
        ],
        "like_quality": like_quality(systems, config.metrics),
        "systems": systems,
        "files": files,
        "runs": runs,
    }


def write(plan: Plan, choices: Choices) -> Json:
    """Write study.json, study.md and the figures into the study's folder; returns the record."""
    from train import study_figures

    study = gather(plan, choices)
    figures = study_figures.draw(study, _validation_curves(plan, study))
    for name, svg in figures.items():
        write_text(plan.out / name, svg)
    write_text(plan.out / "study.md", page(study, {name: study_figures.CAPTIONS[name] for name in figures}))
    write_text(plan.out / "study.json", dumps(study))
    return study


def _validation_curves(plan: Plan, study: Json) -> dict[str, list[tuple[float, float]]]:
    """Label -> (epoch, mean over seeds of the validation score that chooses)."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in study["runs"]:
        path = plan.out / run["folder"] / "history.json"
        if run["kind"] != "noisy" and path.is_file():
            for row in read_record(path, HISTORY_FORMAT)["epochs"]:
                value = row.get("valid", {}).get(study["select"])
                if value is not None:
                    found.setdefault(run["label"], {}).setdefault(row["epoch"], []).append(value)
    return {
        label: [(epoch, statistics.fmean(values)) for epoch, values in sorted(by_epoch.items())]
        for label, by_epoch in found.items()
    }


def _of_job(job: Job, finished: Finished) -> Json:
    method = "" if job.kind == "teacher" else job.method
    return _run(job.config.label, job.kind, job.student, method, job.folder, job, finished)


def _run(
    label: str, kind: str, student: str, method: str, folder: Path, job: Job | None, finished: Finished | None
) -> Json:
    """A run as it stands in study.json, but for its scores, which are name -> metric -> score here."""
    diverged = finished.diverged if finished else None
    record = {} if diverged else read_record(folder / "scores.json", SCORES_FORMAT)
    # One that diverged has no scores.
    described = record or (_cost(job.config.model.arguments) if job else {})
    transfer = job.config.transfer if job else None
    return {
        "label": label,
        "kind": kind,
        "student": student,
        "method": method,
        "transfer": transfer.method if transfer else "none",
        "weight": transfer.weight if transfer and transfer.method != "none" else None,
        "seed": job.config.seed if job else record.get("seed"),
        "steps": finished.steps if finished else None,
        "seconds": finished.seconds if finished else None,
        "diverged": diverged,
        "parameters": described.get("parameters"),
        "gflops": described.get("gflops"),
        "folder": folder.name,
        "data": record.get("data"),
        "unscored": len({failure["name"] for failure in record.get("failed", ())}),
        "scores": record.get("files", {}),
    }


def _cost(arguments: Mapping[str, Any]) -> Json:
    with torch.device("meta"):
        parameters = count_parameters(Manner(**arguments))
    return {"parameters": parameters, "gflops": round(count_flops(arguments) / 1e9, 4)}


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 6)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {gpu}"


# What the scores say


def summarise(runs: Sequence[Json], metrics: Sequence[str]) -> list[Json]:
    """The runs of each label together: mean, lowest, highest and standard deviation over seeds, and the difference to
    the student alone."""
    groups: dict[str, list[Json]] = {}
    for run in runs:
        groups.setdefault(run["label"], []).append(run)
    systems = []
    for label, group in groups.items():
        first, scored = group[0], [run for run in group if not run["diverged"]]
        system = {key: first[key] for key in ("kind", "student", "method", "transfer", "parameters", "gflops")}
        system |= {"label": label, "weight": first["weight"], "seeds": [run["seed"] for run in scored]}
        system["diverged"] = [run["seed"] for run in group if run["diverged"]]
        system["scores"] = {metric: _spread([run["mean"][metric] for run in scored]) for metric in metrics}
        if first["kind"] == "student" and first["transfer"] != "none":
            alone = [
                run
                for run in runs
                if (run["kind"], run["student"], run["transfer"]) == ("student", first["student"], "none")
            ]
            system["difference"] = {metric: difference(scored, alone, metric) for metric in metrics}
        systems.append(system)
    return systems


def _spread(means: Sequence[float | None]) -> Json | None:
    known = [mean for mean in means if mean is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "low": min(known), "high": max(known), "deviation": deviation}


def difference(runs: Sequence[Json], alone: Sequence[Json], metric: str) -> Json | None:
    """The interval of runs minus those of the student alone, over the seeds that both have and the recordings that all
    of these runs have scored; None where there are none."""
    pairs = [(a, b) for a in alone for b in runs if a["seed"] == b["seed"] and not a["diverged"] and not b["diverged"]]
    if not pairs:
        return None
    d = np.array([[run["scores"][metric] for run in pair] for pair in pairs], np.float64)  # [S, 2, F], None is NaN
    d = d[:, 1] - d[:, 0]
    d = d[:, np.isfinite(d).all(0)]
    if not d.size:
        return None
    interval = paired_interval(d)
    return {**interval._asdict(), "verdict": interval.verdict}


def like_quality(systems: Sequence[Json], metrics: Sequence[str]) -> Json:
    """How much smaller than the teacher a student of like quality is: our definition.

    Metric -> method -> the smallest student of this method whose mean over seeds is not below the teacher's lowest
    seed, as {"student", "parameters", "gflops"}, the last two being the teacher's over the student's; None where no
    student reaches it. Without a teacher's score, or with one that is not above the noisy input's, there is nothing to
    reach, and the metric is left out.
    """
    found: Json = {}
    kinds = {system["kind"]: system for system in reversed(systems)}
    teacher, noisy = kinds.get("teacher"), kinds.get("noisy")
    students = sorted((s for s in systems if s["kind"] == "student"), key=lambda s: s["parameters"])
    for metric in metrics:
        goal = teacher and teacher["scores"][metric]
        if not teacher or not goal:
            continue
        floor = noisy and noisy["scores"][metric]
        if floor and goal["mean"] <= floor["mean"]:
            continue
        for method in dict.fromkeys(system["method"] for system in systems if system["kind"] == "student"):
            reached = None
            for student in students:
                score = student["scores"][metric]
                if student["method"] == method and score and score["mean"] >= goal["low"]:
                    ratios = {key: teacher[key] / student[key] for key in ("parameters", "gflops")}
                    reached = {"student": student["student"], **ratios}
                    break
            found.setdefault(metric, {})[method] = reached
    return found


def dumps(study: Json) -> str:
    """The record as JSON with one line an item of its lists, which stays readable and can be compared line by line."""
    parts = []
    for key, value in study.items():
        if isinstance(value, list) and key != "files":
            items = ",\n".join("  " + json.dumps(item, allow_nan=False) for item in value)
            parts.append(f" {json.dumps(key)}: [\n{items}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
