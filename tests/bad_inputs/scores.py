"""`train.evaluate`, `train.report`, `train.results`: what they are given to score and to show."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bad_inputs import Case, folders, removed, written

NOISY = "python -m train.evaluate --data data --noisy --out runs/noisy --workers 0"
MODEL = "python -m train.evaluate --data data --out runs/new --workers 0 --checkpoint"
REPORT = "python -m train.report"
SAVE = "python -m train.results save"


def record(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A maker: history.json or scores.json of the scene's run after a change."""

    def make(folder: Path) -> None:
        path = folder / "runs/student" / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def shown(given: str, words: str, make: Callable[[Path], object]) -> Case:
    return Case(given, f"{REPORT} runs", words, make)


def history(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return record("history.json", change)


def scores(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return record("scores.json", change)


HISTORY, SCORES = "runs/student/history.json", "runs/student/scores.json"

GROUPS = {
    "Scores": (
        Case("data that are not there", f"{NOISY} --data gone", "gone: no such manifest"),
        Case("data of another format", f"{NOISY} --data {HISTORY}", "history.json|format 'mvat-manifest-1'"),
        Case("recordings that are gone", NOISY, "2 files are missing|data/test/", removed("data/test")),
        Case("a set that is empty", f"{NOISY} --data mixed", "mixed/manifest.json: the test set is empty"),
        Case("a model that is not there", f"{MODEL} gone.pt", "gone.pt does not exist"),
        Case("a text as model", f"{MODEL} precious.txt", "precious.txt: not a readable checkpoint"),
        Case("a data folder as model", f"{MODEL} data", "data/config.json does not exist"),
        Case("no model", "python -m train.evaluate --data data --out o", "--checkpoint --noisy|required"),
        Case("an unknown option", f"{NOISY} --colour red", "--colour"),
        Case("an option cut short", f"{NOISY} --metric si_sdr", "--metric"),
        Case(
            "an unknown metric", "python -m train.evaluate --data data --noisy --out o --metrics mos", "--metrics|'mos'"
        ),
        Case("an unknown set", f"{NOISY} --set train", "--set|'train'"),
        Case("workers below 0", "python -m train.evaluate --data data --noisy --out o --workers=-1", "workers|-1"),
        Case("workers in words", f"{NOISY} --workers many", "--workers|'many'"),
        Case("an unknown device", f"{MODEL} best.pt --device tpu", "--device|cuda:1|'tpu'"),
        Case("a device that is not there", f"{MODEL} best.pt --device cuda:99", "--device|'cuda:99'"),
        Case("no output", "python -m train.evaluate --data data --noisy --out ''", "--out|expected a name|''"),
        Case(
            "a file as output", "python -m train.evaluate --data data --noisy --out precious.txt", "precious.txt: File"
        ),
    ),
    "Reports": (
        Case("a folder that is not there", f"{REPORT} gone", "gone: no such folder"),
        Case("a file", f"{REPORT} precious.txt", "precious.txt"),
        Case("an empty folder", f"{REPORT} e", "e: holds no run|history.json", folders("e")),
        Case("a folder of something else", f"{REPORT} voicebank", "voicebank: holds no run"),
        shown("an empty history", f"{HISTORY}: cannot be read as JSON", written("", HISTORY)),
        shown("half a history", f"{HISTORY}: cannot be read as JSON", written('{"format": "mvat', HISTORY)),
        shown("bytes as history", f"{HISTORY}: cannot be read as JSON", written(b"\xff\xfe", HISTORY)),
        shown("a list as history", f"{HISTORY}: is no file of format", written("[]", HISTORY)),
        shown(
            "a history of another format", f"{HISTORY}: is no file of format", history(lambda h: h.update(format="x"))
        ),
        shown("a history without epochs", f"{HISTORY}: malformed|epochs", history(lambda h: h.pop("epochs"))),
        shown("a history without a label", f"{HISTORY}: malformed|label", history(lambda h: h.pop("label"))),
        shown("epochs as a number", f"{HISTORY}: malformed", history(lambda h: h.update(epochs=3))),
        shown("an epoch as a text", f"{HISTORY}: malformed", history(lambda h: h.update(epochs=["one"]))),
        shown(
            "a loss in words",
            f"{HISTORY}: malformed|low",
            history(lambda h: h["epochs"][0]["train"].update(total="low")),
        ),
        shown("an unknown kind", f"{HISTORY}: malformed|'pupil'", history(lambda h: h.update(kind="pupil"))),
        shown("an unknown method", f"{HISTORY}: malformed|'magic'", history(lambda h: h.update(method="magic"))),
        shown("empty scores", f"{SCORES}: cannot be read as JSON", written("", SCORES)),
        shown("scores of another format", f"{SCORES}: is no file of format", scores(lambda s: s.update(format="x"))),
        shown("scores without means", f"{SCORES}: malformed|mean", scores(lambda s: s.pop("mean"))),
        shown("a mean in words", f"{SCORES}: malformed|high", scores(lambda s: s["mean"].update(si_sdr="high"))),
        shown("files as a list", f"{SCORES}: malformed", scores(lambda s: s.update(files=[1]))),
        shown("failures as a number", f"{SCORES}: malformed", scores(lambda s: s.update(failed=3))),
        Case("no experiment", REPORT + " --out x.html", "FOLDER|required"),
        Case("an unknown baseline", f"{REPORT} runs --baseline nobody", "no run is called 'nobody'|student"),
        Case("no page", f"{REPORT} runs --out ''", "--out|expected a name|''"),
        Case("a folder as page", f"{REPORT} runs --out data", "data: Is a directory"),
        Case("a page in a folder that is not there", f"{REPORT} runs --out gone/x.html", "gone/x.html: No such file"),
        Case("an unknown verb", "python -m train.results shout", "save FOLDER FILE, readme FILE|shout"),
        Case(
            "a verb without its files", "python -m train.results save runs", "save FOLDER FILE, readme FILE|save runs"
        ),
        Case("no file to save in", f"{SAVE} runs ''", "save FOLDER FILE, readme FILE|save runs ''"),
        Case("a folder to save in", f"{SAVE} runs data", "data: Is a directory"),
        Case("below a file, to save", f"{SAVE} runs precious.txt/out.json", "precious.txt: File exists"),
        Case("a folder that is not there, to save", f"{SAVE} gone out.json", "gone: no such folder"),
        Case("no run, to save", f"{SAVE} e out.json", "e: holds no run", folders("e")),
        Case(
            "damaged scores, to save",
            f"{SAVE} runs out.json",
            f"{SCORES}: cannot be read as JSON",
            written("{", SCORES),
        ),
        Case("a page without a table", "python -m train.results readme precious.txt", "holds no table between"),
        Case("a page that is not there", "python -m train.results check gone.md", "gone.md"),
        Case(
            "a table of a file that is gone",
            "python -m train.results readme page.md",
            "gone.json: cannot be read",
            written("<!-- results: gone.json -->\n<!-- end -->\n", "page.md"),
        ),
        Case(
            "a table of a file of another format",
            "python -m train.results readme page.md",
            f"{HISTORY}: is not of format 'mvat-results-1'",
            written(f"<!-- results: {HISTORY} -->\n<!-- end -->\n", "page.md"),
        ),
    ),
}
