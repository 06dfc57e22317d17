import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from train import checkpoint, results, study, study_config, study_results, study_text
from train.report import runs as report_runs
from train.solver import DivergedError
from train.study_runs import Plan, Runner, best_score, duration
from train.study_statistics import paired_interval
from train.synthetic import prepare_synthetic

CONFIGS = Path(study.__file__).parent / "configs"
TINY = {"arguments": {"hidden": 6, "depth": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "data"
    prepare_synthetic(folder, train_minutes=0.1, valid_minutes=0.05, test_minutes=0.1, progress=False)
    return folder


def settings(data, out):
    return {
        "out": str(out),
        "teacher": {"model": {"arguments": {"hidden": 7, "depth": 1}}, "seeds": [0], "epochs": 3},
        "students": [TINY],
        "methods": {"none": {"method": "none"}, "mvat": {"method": "mvat", "weights": [0.01, 0.1]}},
        "trials": {"epochs": 1},
        "seeds": [0, 1],
        "metrics": ["si_sdr"],
        "run": {
            "data": {
                "path": str(data),
                "segment_seconds": 0.25,
                "stride_seconds": 1.0,
                "tempo_share": 0.0,
                "valid_limit": 1,
                "workers": 0,
            },
            "optim": {"epochs": 2},
            "valid": {"metrics": ["si_sdr"], "select": "si_sdr"},
        },
    }


def written(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Killed(BaseException):
    pass


def test_a_killed_study_goes_on_and_does_nothing_twice(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = [str(written(tmp_path, settings(data, out)))]
    save, epochs = checkpoint.save, []

    def killed(path, content):
        save(path, content)
        if path.name == "last.pt":
            epochs.append((path.parent.name, content["epoch"]))
            if len(epochs) in (1, 8):  # inside a run, and after its last epoch
                raise Killed

    monkeypatch.setattr(checkpoint, "save", killed)
    for module in ("train.solver", "train.study_runs"):  # a third of the time, and tested on its own
        monkeypatch.setattr(f"{module}.count_flops", lambda config: 1e9 * config["hidden"])
    for _ in range(2):
        with pytest.raises(Killed):
            study.main(command)
    assert study.main(command) == 0
    shown = capsys.readouterr().out
    # A teacher, two trials, two methods of two seeds.
    assert "run 1 of 7: teacher (hidden7-depth1), seed 0" in shown
    assert "run 3 of 7: trial of student (hidden6-depth1), mvat, weight 0.1, seed 0" in shown and " left" in shown
    assert "run 7 of 7" in shown and "student (hidden6-depth1), mvat: " in shown
    assert len(epochs) == len(set(epochs)) == 13
    content = json.loads((out / "study.json").read_text())
    an_epoch = content["runs"][1]["steps"] // 3  # of the teacher, that learns for longer
    assert content["complete"] and an_epoch
    assert [run["steps"] for run in content["runs"]] == [None, 3 * an_epoch] + [2 * an_epoch] * 4
    before = (out / "study.json").read_text()
    assert study.main(command) == 0
    assert "run " not in capsys.readouterr().out and len(epochs) == 13
    assert (out / "study.json").read_text() == before
    for name in ("study.md", "intervals.svg", "curves.svg", "quality.svg"):
        assert (out / name).stat().st_size > 500

    # With a teacher that is there, one seed and one candidate there is nothing to choose.
    again = settings(data, tmp_path / "again") | {"teacher": {"checkpoint": str(out / "teacher_seed0" / "best.pt")}}
    again |= {"seeds": [3], "methods": {"none": {"method": "none"}, "at": {"method": "attention", "weights": [0.1]}}}
    again["run"]["optim"]["epochs"] = 1
    assert study.main([str(written(tmp_path / "again", again))]) == 0
    assert "run 2 of 2: student (hidden6-depth1), at, weight 0.1, seed 3" in capsys.readouterr().out
    assert "says nothing of other seeds" in (tmp_path / "again" / "study.md").read_text()
    found = json.loads((tmp_path / "again" / "study.json").read_text())
    assert [(s["kind"], s["seeds"]) for s in found["systems"][1:]] == [
        ("teacher", [0]),
        ("student", [3]),
        ("student", [3]),
    ]
    assert found["systems"][3]["difference"]["si_sdr"]["over"] == "files" and not found["trials"]
    assert found["systems"][1]["scores"] == content["systems"][1]["scores"]

    # Its scores are renewed when it has learnt on; a student that diverged at once is left out, but not its size.
    teacher = Path(again["teacher"]["checkpoint"])
    os.utime(teacher, (later := time.time() + 9, later))
    diverged = tmp_path / "again" / "student_hidden6-depth1_at_seed3"
    for name in ("history.json", "scores.json"):
        (diverged / name).unlink()
    finished = json.loads((diverged / "finished.json").read_text()) | {"steps": 0, "diverged": "not finite"}
    (diverged / "finished.json").write_text(json.dumps(finished))
    assert study.main([str(written(tmp_path / "again", again))]) == 0
    assert capsys.readouterr().out.count("scores of") == 1
    at = json.loads((tmp_path / "again" / "study.json").read_text())["systems"][3]
    assert at["diverged"] == [3] and not at["seeds"] and at["scores"]["si_sdr"] is None
    assert at["parameters"] == found["systems"][3]["parameters"]

    # The report and the results find the runs, the trials not among them.
    systems = report_runs.collect(out)
    assert [(s.first.kind, s.first.method, len(s.runs)) for s in systems] == [
        ("noisy", "none", 1),
        ("teacher", "none", 1),
        ("student", "none", 2),
        ("student", "mvat", 2),
    ]
    saved = tmp_path / "saved.json"
    assert results.main(["save", str(out), str(saved)]) == 0
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: saved.json -->\n<!-- end -->\n<!-- whole results: saved.json -->\n<!-- end -->\n")
    assert results.main(["readme", str(readme)]) == 0 and results.main(["check", str(readme)]) == 0
    short, whole = readme.read_text().split("<!-- end -->")[:2]
    assert study_text.readme(content) in short and study_text.whole(content) in whole


def test_a_weight_is_chosen_by_validation_and_one_that_diverged_is_not(data, tmp_path, monkeypatch, capsys):
    config = settings(data, tmp_path / "out")
    config["methods"]["mvat"]["weights"] = [0.1, 1, 10]
    runner = Runner(Plan(study_config.parse(["--config", str(written(tmp_path, config))], "")))
    found = {0.1: 2.0, 1.0: 5.0, 10.0: 9.0}
    calls = []

    def train(run, kind):
        calls.append(run.transfer.weight)
        Path(run.out).mkdir(parents=True)
        if run.transfer.weight == 10:
            raise DivergedError("the loss is not finite")
        return [{"seconds": 1.0, "step": 3, "valid": {"si_sdr": found[run.transfer.weight]}}]

    monkeypatch.setattr("train.study_runs.command.run", train)
    for _ in range(2):
        assert runner.choose(0, "mvat") == (1.0, {0.1: 2.0, 1.0: 5.0, 10.0: None})
    assert calls == [0.1, 1.0, 10.0]  # one that diverged is not tried again


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": {"seed": 1}}, "does not accept option 'seed'"),
        ({"methods": {"none": {"method": "none"}, "x": {"method": "nvat"}}}, "nvat"),
        ({"methods": {"x": {"method": "output", "weights": [1]}}}, "exactly one must be {method: none}"),
        ({"methods": {"none": {"method": "none", "weights": [1]}}}, "methods.none: the student alone has no weights"),
        ({"methods": {"none": {"method": "none"}, "a b": {"method": "mvat", "weights": [1]}}}, "got 'a b'"),
        ({"methods": {"none": {"method": "none"}, "x": {"method": "mvat", "weights": [1, -1]}}}, "methods.x.weights"),
        (
            {
                "methods": {
                    "none": {"method": "none"},
                    "x": {"method": "mvat", "weights": [1]},
                    "y": {"method": "output", "weights": [1, 2]},
                }
            },
            "as many trials; got x 1, y 2",
        ),
        (
            {"methods": {"none": {"method": "none"}, "x": {"method": "mvat", "views": ["globe"], "weights": [1]}}},
            "methods.x, student hidden6-depth1",
        ),
        ({"teacher": {"model": {"arguments": {"hidden": 6, "depth": 2}}}}, "methods.mvat, student hidden6-depth1"),
        (
            {"methods": {"none": {"method": "none"}, "alone": {"method": "mvat", "weights": [1]}}},
            "methods.alone: so tables call",
        ),
        ({"students": [TINY | {"weights": "nowhere.pt"}]}, "students[0]: nowhere.pt does not exist"),
        ({"teacher": {}}, "name either teacher.model"),
        ({"teacher": {"checkpoint": "nowhere.pt"}}, "nowhere.pt"),
        ({"students": [{"preset": "tiny"}]}, "students[0]: model.preset must be one of"),
        ({"students": [TINY, TINY]}, "every one must be another"),
        ({"students": []}, "students"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"trials": {"epochs": 0}}, "trials.epochs must be at least 1"),
        ({"metrics": ["pesk"]}, "metrics must be"),
        ({"run": {"data": {"path": "nowhere"}}}, "nowhere"),
        ({"run": {"data": {"path": "nowhere"}, "valid": {"patience": 2}}}, "run.valid.patience"),
    ],
)
def test_mistakes_end_with_2_and_one_line_before_anything_is_trained(tmp_path, capsys, changes, reason):
    config = settings("data", tmp_path / "out") | changes
    assert study.main([str(written(tmp_path, config))]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_interval_is_what_its_formula_says():
    # Seeds' means 1 and 3, files' means 1, 2, 3: v_s/S = 2/2, v_f/F = 1/3; df = (4/3)^2 / (1/1 + (1/9)/2) = 32/19,
    # and the 97.5th percentile of Student's distribution there, integrated numerically, is 5.176232.
    d = np.array([[0.0, 1.0, 2.0], [2.0, 3.0, 4.0]])
    interval = paired_interval(d)
    assert interval.mean == 2 and interval.over == "seeds and files" and interval.verdict == "undecided"
    assert interval.high - 2 == pytest.approx(2 - interval.low) == pytest.approx(5.176232 * np.sqrt(4 / 3), rel=1e-6)
    # One seed is the paired t-test over files, one file that over seeds: t(2) = 4.302653, t(1) = 12.706205.
    files = paired_interval(d[:1])
    assert (files.over, files.high) == ("files", pytest.approx(1 + 4.302653 / np.sqrt(3), rel=1e-6))
    seeds = paired_interval(d[:, :1])
    assert (seeds.over, seeds.high) == ("seeds", pytest.approx(1 + 12.706205, rel=1e-6))
    assert paired_interval(d[:1, :1])[1:4] == (None, None, "nothing")
    assert paired_interval(np.ones((2, 3)))[:3] == (1, 1, 1) and paired_interval(np.ones((2, 3))).verdict == "higher"
    for wrong in (np.zeros(3), np.zeros((0, 3)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="finite differences"):
            paired_interval(wrong)


@pytest.mark.parametrize("spreads", [(1, 0, 1), (0, 1, 1), (0.3, 1, 1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(spreads):
    rng = np.random.default_rng(0)
    a, b, e = spreads

    def covers():
        d = a * rng.normal(size=(3, 1)) + b * rng.normal(size=(1, 40)) + e * rng.normal(size=(3, 40))
        interval = paired_interval(d)
        return interval.low <= 0 <= interval.high

    # 95 % with the error of 1,000 drawings, and the approximation's own: about 93 % where seeds are all that differs.
    assert 0.91 < np.mean([covers() for _ in range(1000)]) < 0.98


def test_resampling_three_seeds_would_be_too_narrow():
    rng = np.random.default_rng(0)

    def covers():
        d = rng.normal(size=(3, 1)) + rng.normal(size=(3, 40))
        files = rng.multinomial(40, [1 / 40] * 40, 200) / 40
        low, high = np.quantile((d[rng.integers(3, size=(200, 3))].mean(1) * files).sum(1), (0.025, 0.975))
        return low <= 0 <= high

    assert np.mean([covers() for _ in range(300)]) < 0.82


def run(kind, student, method, seed, scores, parameters=100, diverged=None):
    transfer = {"alone": "none", "": "none"}.get(method, "mvat")
    known = [score for score in scores if score is not None]
    return {
        "label": f"{kind} {student} {method}", "kind": kind, "student": student, "method": method, "transfer": transfer,
        "weight": None, "seed": seed, "diverged": diverged, "parameters": parameters, "gflops": parameters / 10,
        "scores": {"si_sdr": scores}, "mean": {"si_sdr": np.mean(known) if known else None},
    }  # fmt: skip


def test_differences_pair_seeds_and_recordings_and_leave_out_what_is_missing():
    runs = [
        run("student", "s", "alone", 0, [1.0, 2.0, 3.0]),
        run("student", "s", "alone", 1, [1.0, 2.0, None]),
        run("student", "s", "mvat", 1, [2.0, 5.0, 9.0]),
        run("student", "s", "mvat", 2, [100.0, 100.0, 100.0]),
        run("student", "s", "mvat", 0, [None, None, None], diverged="not finite"),
    ]
    _, mvat = study_results.summarise(runs, ["si_sdr"])
    found = mvat["difference"]["si_sdr"]
    assert (found["mean"], found["seeds"], found["files"], found["over"]) == (2.0, 1, 2, "files")
    assert mvat["seeds"] == [1, 2] and mvat["diverged"] == [0]


def test_the_short_table_has_a_row_a_method_and_marks_what_is_decided():
    def system(kind, student, method, score, **more):
        scores = {"si_sdr": {"mean": score}}
        return {"kind": kind, "student": student, "transfer": method, "method": method, "scores": scores} | more

    def gain(mean, half, verdict):
        return {"difference": {"si_sdr": {"mean": mean, "low": mean - half, "high": mean + half, "verdict": verdict}}}

    study = {
        "config": {"metrics": ["si_sdr"]},
        "files": ["a", "b"],
        "like_quality": {},
        "trials": [{"scores": [[w, None] for w in (0.1, 1, 10)], "chosen": chosen} for chosen in (1, 10)],
        "systems": [
            system("noisy", None, "none", 5.0, label="noisy", seeds=[]),
            system("student", "large", "none", 7.0, seeds=[0, 1]),
            system("student", "large", "mvat", 8.0, seeds=[0, 1], **gain(1.0, 0.5, "higher")),
            system("student", "small", "none", 6.0, seeds=[0, 1]),
            system("student", "small", "output", 6.0, seeds=[0, 1], **gain(-0.001, 0.5, "undecided")),
        ],
    }
    assert study_text.readme(study).splitlines()[:6] == [
        "| | large: SI-SDR, dB | small: SI-SDR, dB |",
        "|---|---:|---:|",
        "| noisy | 5.00 | 5.00 |",
        "| alone | 7.00 | 6.00 |",
        "| mvat | **+1.00 ± 0.50** |  |",
        "| output |  | +0.00 ± 0.50 |",
    ]
    assert "2 recordings and up to 2 seeds" in study_text.readme(study)
    assert "1 of 2 weights were chosen at an end of their candidates" in study_text.readme(study)
    assert "no quality for a student to reach" in study_text.readme(study)


def test_like_quality_takes_the_smallest_student_that_reaches_the_teachers_spread():
    runs = [
        run("teacher", "t", "", 0, [10.0], 1000),
        run("teacher", "t", "", 1, [12.0], 1000),
        run("student", "s", "alone", 0, [9.0], 100),
        run("student", "m", "alone", 0, [10.5], 250),
        run("student", "l", "alone", 0, [15.0], 500),
        run("student", "s", "mvat", 0, [9.9], 100),
    ]
    found = study_results.like_quality(study_results.summarise(runs, ["si_sdr"]), ["si_sdr"])
    assert found == {"si_sdr": {"alone": {"student": "m", "parameters": 4.0, "gflops": 4.0}, "mvat": None}}
    runs.append(run("noisy", "", "", None, [11.0]))  # the teachers' mean: they have not made it better
    assert study_results.like_quality(study_results.summarise(runs, ["si_sdr"]), ["si_sdr"]) == {}


def test_small_things():
    assert [duration(s) for s in (40, 720, 3900)] == ["40 s", "12 min", "1 h 05 min"]
    history = [{"valid": {"loss": 2.0}}, {}, {"valid": {"loss": 1.0}}, {"valid": {"loss": float("nan")}}]
    assert best_score(history, "loss") == 1.0 and best_score(history, "stoi") is None


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("study_*.yaml")))
def test_the_configurations_are_right(name):
    config = study_config.parse(["--config", str(CONFIGS / name)], "")
    assert Path(config.out).name == Path(name).stem and len(config.methods) > 2
