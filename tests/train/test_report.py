"""The report: what it says in words, what it shows, what it does without the things it would show."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import scipy.stats
import torch

from mvat import audio
from mvat.models import Manner
from train import manifest
from train.report import report
from train.report.__main__ import main
from train.report.figures import decibels
from train.report.runs import SHOWN, collect
from train.report.samples import shown_systems
from train.report.words import comparisons, difference, find_baseline, lead, verdict
from train.synthetic import make_pair

VOID = {"meta", "br", "image", "path", "rect", "use"}
NAMES = ("p1_001", "p1_002", "p1_003", "p1_004")


class Page(HTMLParser):
    """Checks that every tag is closed in order, and gathers ids, references, tags and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def description(kind, method="none", seed=0, label=None):
    size = {"parameters": None, "gflops": None} if kind == "noisy" else {"parameters": 14377, "gflops": 0.123}
    return {"label": label or f"{kind}, {method}", "kind": kind, "method": method, "seed": seed, **size}


def write_scores(run, about, values, data="data/manifest.json", failed=()):
    """scores.json with every metric's values a recording; None is a failure."""
    run.mkdir(parents=True, exist_ok=True)
    files = {name: dict.fromkeys(SHOWN, value) for name, value in zip(NAMES, values, strict=True)}
    known = [value for value in values if value is not None]
    record = {
        "format": "mvat-scores-1",
        **about,
        "set": "test",
        "data": str(data),
        "mean": dict.fromkeys(SHOWN, sum(known) / len(known)),
        "scored": dict.fromkeys(SHOWN, len(known)),
        "failed": [{"name": name, "metric": "all", "reason": "<silent>"} for name in failed],
        "files": files,
    }
    (run / "scores.json").write_text(json.dumps(record))


def write_history(run, about, epochs=3):
    run.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "lr": 1e-3 / epoch,
            "seconds": 1.0,
            "audio_seconds_per_second": 20.0,
            "peak_memory_gb": 0.0,
            "train": {"total": 1 / epoch, "enhancement": 1 / epoch},
            "valid": {"loss": 1 / epoch, "si_sdr": 5.0 + epoch},
        }
        for epoch in range(1, epochs + 1)
    ]
    (run / "history.json").write_text(json.dumps({"format": "mvat-history-1", **about, "model": {}, "epochs": rows}))


@pytest.fixture
def experiment(tmp_path):
    """Scores alone: noisy, a student with two seeds, MV-AT with two seeds."""
    folder = tmp_path / "demo"
    write_scores(folder / "noisy", description("noisy", seed=None, label="noisy"), [1, 2, 3, 4])
    for seed in (0, 1):
        write_scores(folder / f"student_seed{seed}", description("student", seed=seed), [2 + seed, 3, 4, 5])
        write_scores(folder / f"student_mvat_seed{seed}", description("student", "mvat", seed), [3 + seed, 4, 5, 4.5])
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of an experiment that has everything, and its folder."""
    folder = tmp_path_factory.mktemp("full")
    data, runs = folder / "data", folder / "runs"
    data.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for name in NAMES:
        files = [data / f"{name}_{side}.wav" for side in ("clean", "noisy")]
        for path, samples in zip(files, make_pair(rng, 0.5), strict=True):
            audio.write(path, samples, 16000)
        entries.append(manifest.Entry(name, "p1", *files, frames=8000, noise="a < b", snr=2.5))
    path = manifest.save(data, "synthetic", {"test": entries}).path
    write_scores(runs / "noisy", description("noisy", seed=None, label="noisy"), [1, 2, 3, 4], path)
    for kind, method, gains in (
        ("teacher", "none", (3, 3, 3, 3)),
        ("student", "none", (1, 1, 1, 1)),
        ("student", "mvat", (1, 2, 3, 1.5)),
    ):
        run = runs / (kind if method == "none" else f"{kind}_{method}")
        write_history(run, description(kind, method))
        values = [1 + gains[0], 2 + gains[1], 3 + gains[2], None if method == "mvat" else 4 + gains[3]]
        write_scores(run, description(kind, method), values, path, NAMES[3:] if method == "mvat" else ())
        (run / "config.yaml").write_text("label: <script>alert(1)</script>\n")
        (run / "enhanced").mkdir()
        for entry in entries:
            audio.write(run / "enhanced" / f"{entry.name}.wav", 0.5 * audio.read(entry.noisy)[0], 16000)
        torch.manual_seed(len(method))
        model = Manner(hidden=6, depth=2)
        torch.save({"state_dict": model.state_dict(), "model_config": model.config}, run / "best.pt")
    return runs, report(runs, progress=False).read_text()


def test_page_is_whole_and_self_contained(full):
    _, text = full
    page = Page(text)
    assert "http" not in text and "script" not in page.tags
    assert page.links and all(link.startswith(("data:", "#")) for link in page.links)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert len(text) < 8e6


def test_page_shows_everything_there_is(full):
    _, text = full
    page = Page(text)
    for heading in (
        "Scores",
        "Against “noisy”",
        "Recording by recording",
        "Training",
        "How training went",
        "Listen and look",
        "Attention maps",
        "Configuration",
    ):
        assert f"<h2>{heading}</h2>" in text
    # Three recordings of lowest, median and highest change; noisy, teacher, two students and clean each.
    assert page.tags.count("audio") == 15 and text.count("Spectrogram: ") == 15
    assert text.index("<h3>p1_001") < text.index("<h3>p1_002") < text.index("<h3>p1_003")
    assert "the lowest change" in text and "the highest change in SI-SDR by “student, mvat”, +3.0 dB" in text
    for block in ("encoder 1", "encoder 2", "decoder 2", "decoder 1"):
        assert f">{block}</text>" in text
    assert "14.4 k" in text and "0.12" in text
    assert "1 recording not scored" in page.text and "p1_004: all: <silent>" in page.text
    assert "a < b, 2.5 dB SNR" in page.text and "label: <script>alert(1)</script>" in page.text
    assert "Validation SI-SDR, dB" in page.text and "Peak memory" not in page.text


def test_best_student_is_bold(full):
    table = full[1].split("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    bold = {re.sub("<.*?>", "", row.split("</td>")[0]): row.count("<b>") for row in rows if "key" in row}
    assert bold["noisy"] == bold["teacher, none"] == bold["student, none"] == 0
    assert bold["student, mvat"] == len(SHOWN)


def test_page_is_the_same_each_time(full):
    runs, text = full
    assert report(runs, progress=False).read_text() == text


def test_seeds_are_summed_up(experiment):
    text = report(experiment, progress=False).read_text()
    Page(text)
    assert text.count('class="seed"') == 4 and text.count("2 seeds</td>") == 2
    assert "3.62<small>3.50 … 3.75</small>" in text and "<b>4.25</b><small>4.12 … 4.38</small>" in text


def test_words(experiment):
    systems = collect(experiment)
    assert "“student, none” raises the SI-SDR of the noisy input by 1.12 dB, from 2.50 to 3.62 dB" in lead(systems)
    text = verdict(*next(comparisons(systems)))
    assert text.startswith("MV-AT is ahead of the student alone in every score: PESQ wb 4.25 against 3.62")
    assert "higher with MV-AT on 3 of 4 recordings" in text
    assert text.endswith("Over 2 seeds each the SI-SDR ranges, 3.50 to 3.75 dB and 4.12 to 4.38 dB, do not overlap.")


@pytest.mark.parametrize(
    ("values", "claim"),
    [
        ([1, 2, 3, 4], "MV-AT is behind the student alone in every score"),
        ([2, 3, 4, 5], "MV-AT and the student alone do not differ"),
        ([2, 3, 4, 5.1], "MV-AT is ahead of the student alone in every score"),
    ],
)
def test_words_are_honest(tmp_path, values, claim):
    write_scores(tmp_path / "student", description("student"), [2, 3, 4, 5])
    write_scores(tmp_path / "student_mvat", description("student", "mvat"), values)
    systems = collect(tmp_path)
    text = verdict(*next(comparisons(systems)))
    assert text.startswith(claim) and text.endswith("With one seed each a small difference may be chance.")
    assert lead(systems).startswith("The noisy input has not been scored")
    write_scores(tmp_path / "noisy", description("noisy", label="noisy"), [3, 4, 5, 6])
    assert "“student, none” lowers the SI-SDR of the noisy input by 1.00 dB" in lead(collect(tmp_path))


def test_two_runs_of_one_seed_are_two_systems(tmp_path):
    for name in ("first", "second"):
        write_history(tmp_path / name, description("student", seed=0, label="student"))
    assert [system.label for system in collect(tmp_path)] == ["first: student", "second: student"]
    assert [len(system.runs) for system in collect(tmp_path)] == [1, 1]


def test_seeds_are_grouped_by_label_too(tmp_path):
    for seed in (0, 1):
        write_history(tmp_path / f"student_seed{seed}", description("student", seed=seed, label=f"student_seed{seed}"))
    (system,) = collect(tmp_path)
    assert system.label == "student" and [run.seed for run in system.runs] == [0, 1]


def test_several_experiments_on_one_page(tmp_path):
    """Noisy input once, equal names told apart, a colour for each of twelve systems."""
    values = [1, 2, 3, 4]
    for experiment in ("a", "b"):
        folder = tmp_path / "runs" / experiment
        write_scores(folder / "noisy", description("noisy", seed=None, label="noisy"), values)
        for run in range(6):
            label = "plain" if run == 0 else f"{experiment} {10 - run}"
            about = description("student", "mvat" if run > 1 else "none", label=label)
            write_history(folder / f"run{run}", about, epochs=2 + run)
            if run != 4:
                write_scores(folder / f"run{run}", about, [value + run for value in values])
    folders = [tmp_path / "runs" / name for name in "ab"]
    systems = collect(*folders)
    labels = ["noisy"]
    for experiment in "ab":
        labels += [f"{experiment} 9", f"{experiment}: plain", *(f"{experiment} {number}" for number in (5, 6, 7, 8))]
    assert [system.label for system in systems] == labels
    styles = [system.style for system in systems]
    assert len(set(styles)) == 13 and styles[:4] == ["noisy", "none", "spare1", "mvat"]
    assert "MV-AT is ahead" not in lead(systems) and lead(systems).startswith("8 of 10 students raise the SI-SDR")

    out = tmp_path / "page.html"
    assert main([*map(str, folders), "--baseline", "a: plain", "--out", str(out)]) == 0
    text = out.read_text()
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids) and "http" not in text
    assert "<h2>Against “a: plain”</h2>" in text
    assert "No recordings scored in both: a 6, b 6." in page.text
    assert text.count("<details><summary><span") == 12  # how each training went, folded
    css = text[: text.index("</style>")]
    assert all(f"--{style}:" in css and f".{style} " in css for style in styles)
    shown, rest = shown_systems(systems, systems[1])
    assert [system.label for system in shown] == ["a 5", "a 7", "b 5", "b 7"] and "12 systems, 4 are shown" in rest
    # A run by itself, beside an experiment that holds it.
    assert len(collect(folders[0], folders[0] / "run1", folders[1] / "run1")) == 8
    assert main([str(folders[0]), "--baseline", "nobody"]) == 2


def test_several_folders_want_a_name_for_the_page(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(experiment / "noisy"), str(experiment / "student_seed0")]) == 0
    assert (tmp_path / "report.html").is_file() and not (experiment / "report.html").exists()
    with pytest.raises(ValueError, match="2 folders are given: name the file"):
        report(experiment, experiment)


def test_differences_from_the_baseline(tmp_path):
    about = description("noisy", seed=None, label="noisy")
    write_scores(tmp_path / "noisy", about, [1.0, 2.0, 3.0, 4.0])
    write_scores(tmp_path / "student", description("student"), [2.0, 2.5, 5.0, None], failed=NAMES[3:])
    write_scores(tmp_path / "student_mvat", description("student", "mvat"), [1.0, 2.0, 3.0, 4.004])
    write_scores(tmp_path / "teacher", description("teacher"), [9.0] * 4, data="other/manifest.json")
    systems = collect(tmp_path)
    noisy, teacher, student, mvat = systems
    assert find_baseline(systems) is noisy and find_baseline(systems, "student_mvat") is mvat
    found = difference(noisy, student, "pesq_wb")
    interval = scipy.stats.ttest_rel([2.0, 2.5, 5.0], [1.0, 2.0, 3.0]).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(interval) and found.recordings == 3
    assert difference(noisy, teacher, "pesq_wb") is None  # of another set
    text = report(tmp_path, progress=False).read_text()
    table = text[text.index("<h2>Against") :].split("</table>")[0]
    rows = {re.sub("<.*?>", "", row.split("</td>")[0]): row for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)}
    assert "+1.17<small>± 1.90</small>" in rows["student, none"] and "<b>" not in rows["student, none"]
    assert "<td>0.00<small>± 0.00</small>" in rows["student, mvat"] and "noisy" not in rows
    assert "No recordings scored in both: teacher, none." in text


def test_how_training_went_shows_whatever_was_recorded(tmp_path):
    write_history(tmp_path / "student", description("student"), epochs=4)
    path = tmp_path / "student" / "history.json"
    record = json.loads(path.read_text())
    for row in record["epochs"]:
        row |= {
            "skipped": row["epoch"] % 2,
            "waiting": 0.1,
            "gradient_norm": float("nan"),
            "new_one": 1,
            "note": "text",
        }
        row["peak_memory_gb"] = 6.25
        row["train"]["enhancement"] = 0.5
    del record["epochs"][1]["valid"], record["epochs"][2]["lr"]
    path.write_text(json.dumps(record))
    text = report(tmp_path, progress=False).read_text()
    page = Page(text)
    summary = "4 epochs, 40 steps, 4 s, best validation SI-SDR 9.00 dB in epoch 4, 20 s of audio a second, 6.2 GB"
    assert f"{summary}, skipped steps: 2" in page.text
    part = text[text.index("<h2>How training went") :].split("</section>")[0]
    titles = (
        "Training loss",
        "Training loss: enhancement",
        "Validation loss",
        "Validation SI-SDR, dB",
        "Learning rate",
    )
    for title in (
        *titles,
        "Seconds of audio a second",
        "Peak memory, GB",
        "Skipped steps",
        "Share of time waiting for data",
        "New one",
        "steps",
    ):
        assert f">{title}</text>" in part
    assert "Gradient norm" not in part and "note" not in part


def test_history_of_an_older_version(tmp_path):
    """Rows that lack everything but the epoch and a loss."""
    (tmp_path / "student").mkdir()
    rows = [{"epoch": epoch, "train": {"total": 1.0}} for epoch in (1, 2)]
    record = {"format": "mvat-history-1", **description("student"), "epochs": rows}
    (tmp_path / "student" / "history.json").write_text(json.dumps(record))
    text = report(tmp_path, progress=False).read_text()
    Page(text)
    assert "2 epochs</summary>" in text and ">epochs</text>" in text


@pytest.mark.parametrize("present", ["config", "history", "scores"])
def test_run_with_one_file_alone(tmp_path, present):
    run = tmp_path / "student"
    run.mkdir()
    if present == "config":
        (run / "config.yaml").write_text("seed: 1\n")
    elif present == "history":
        write_history(run, description("student"), epochs=1)
    else:
        write_scores(run, description("student"), [1, 2, 3, 4])
    page = Page(report(tmp_path, progress=False).read_text())
    assert ("No run has a history.json" in page.text) == (present != "history")
    assert ("Not scored yet" in page.text) == (present != "scores")
    assert "No run has enhanced recordings" in page.text


def test_missing_data_and_broken_checkpoint_are_told(full, tmp_path):
    import shutil

    runs = tmp_path / "runs"
    shutil.copytree(full[0], runs)
    (runs / "student" / "best.pt").write_bytes(b"broken")
    (runs / "student_mvat" / "enhanced" / f"{NAMES[0]}.wav").unlink()
    page = Page(report(runs, progress=False).read_text())
    assert "“student, none” is left out" in page.text and "no enhanced file" in page.text
    assert page.tags.count("audio") == 14
    for path in runs.glob("*/scores.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "nowhere/manifest.json"}))
    page = Page(report(runs, progress=False).read_text())
    assert "nowhere/manifest.json: no such manifest" in page.text and "audio" not in page.tags


def test_runs_of_different_sets_are_warned_about(experiment):
    write_scores(experiment / "teacher", description("teacher"), [5, 5, 5, 5], data="other/manifest.json")
    assert "scored on different sets" in report(experiment, progress=False).read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("scores.json", "{", "cannot be read as JSON"),
        ("scores.json", '{"format": "mvat-scores-1"}', "malformed (no 'label')"),
        ("history.json", '{"format": "mvat-history-2"}', "is no file of format 'mvat-history-1'"),
        (
            "history.json",
            json.dumps({"format": "mvat-history-1", **description("student"), "epochs": [1]}),
            "malformed",
        ),
        ("scores.json", json.dumps({"format": "mvat-scores-1", **description("nobody")}), "unknown kind 'nobody'"),
    ],
)
def test_malformed_file_is_one_clear_error(experiment, capsys, name, text, message):
    (experiment / "report.html").write_text("the former report")
    path = experiment / "student_seed0" / name
    path.write_text(text)
    assert main([str(experiment)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.report: error: {path}") and message in line
    assert (experiment / "report.html").read_text() == "the former report"


def test_folder_without_runs(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2 and "holds no run" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2 and "no such folder" in capsys.readouterr().err


def test_spectrogram_of_a_tone():
    spectrum = decibels(np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000))
    assert spectrum.shape == (257, 101)
    assert (spectrum[:, 50].argmax()) == 32  # 1000 Hz in steps of 31.25 Hz
