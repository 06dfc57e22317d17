"""Hundreds of inputs that cannot be used (tests/bad_inputs): one clear line, the right end, nothing overwritten."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_inputs import PROGRAMS, Bench, Case, Outcome, code, groups, problems, row

for package in ("soundfile", "soxr", "safetensors", "jsonargparse", "accelerate", "tensorboard", "yaml", "pesq"):
    pytest.importorskip(package)

REPO = Path(__file__).resolve().parents[1]
CASES = [(title, case) for title, members in groups().items() for case in members]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """Not in pytest's own folders, which only their owner may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Bench(Path(name))


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{title}: {case.given}") for title, case in CASES])
def test_what_cannot_be_used_is_refused(bench: Bench, case: Case) -> None:
    outcome = bench.run(case)
    assert not problems(case, outcome), outcome.message


def test_there_are_hundreds_of_cases_and_none_twice() -> None:
    assert len(CASES) >= 200
    assert len({(title, case.given) for title, case in CASES}) == len(CASES)
    assert {case.program for _, case in CASES} == {None, *PROGRAMS}


def test_the_page_lists_every_case() -> None:
    """Its messages may be those of other versions of Python and of packages, but must say what is promised."""
    text = (REPO / "docs/errors.md").read_text(encoding="utf-8")
    lines = iter([line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| given |")])
    for title, case in CASES:
        line = next(lines, "")
        name = case.error if isinstance(case.error, int) else case.error.__name__
        start = row(case, name).rpartition(f"{name} | ")[0]
        assert line.startswith(start), f"python -m tests.bad_inputs renews docs/errors.md: {title}: {case.given}"
        assert all(code(word).strip("` ") in line for word in case.words.split("|")), line
    assert next(lines, None) is None


@pytest.mark.parametrize(
    ("run", "new"),
    [
        ("mvat enhance in.wav -o out.wav --checkpoint model", {"out.wav"}),
        ("mvat enhance in.wav -o out.wav --checkpoint best.pt", {"out.wav"}),
        ("python -m train.results save runs out.json", {"out.json"}),
    ],
)
def test_the_scene_itself_is_good(bench: Bench, run: str, new: set[str]) -> None:
    outcome = bench.run(Case("", run, ""))
    assert outcome.error == 0 and outcome.after.keys() - outcome.before.keys() == new
    assert all(outcome.after[path] == text for path, text in outcome.before.items())


def test_the_scene_s_configuration_and_data_are_good(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from train import command, manifest

    monkeypatch.chdir(bench.scene)
    config = command.parse(["--config", "base.yaml"], "")
    train, valid = command.split(manifest.load(config.data.path), [], 0)
    assert (len(train), len(valid)) == (3, 1)
    assert manifest.recordings(manifest.load("mixed")).keys() == {"clean", "noise", "rir"}


def test_the_rules_find_what_breaks_them(tmp_path: Path) -> None:
    case = Case("", "mvat enhance in.wav", "in.wav|expected")
    good = Outcome(2, "", "mvat: error: in.wav: expected a recording", {"a": "1"}, {"a": "1"})
    assert not problems(case, good)
    for change in (
        {"error": 1},
        {"out": "done"},
        {"message": "error: in.wav: expected a recording"},
        {"message": "mvat: error: in.wav: expected\nanother line"},
        {"message": "mvat: error: in.wav: expected Traceback"},
        {"message": "mvat: error: in.wav: no"},
        {"after": {"a": "2"}},
        {"after": {}},
        {"after": {"a": "1", "b": "1"}},
    ):
        assert len(problems(case, good._replace(**change))) == 1, change


def test_processes_end_the_same_way(tmp_path: Path) -> None:
    started = []
    for command, variables, words in (
        (["mvat", "enhance", b"\xff.wav", "-o", "out.wav"], {"LC_ALL": "C"}, "mvat: error: \\udcff.wav: no such file"),
        (["mvat", "info"], {"MVAT_BACKEND": "x"}, "mvat: error: the environment variable MVAT_BACKEND must be one of"),
        (["train.teacher"], {"MVAT_BACKEND": "x"}, "train.teacher: error: the environment variable MVAT_BACKEND must"),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPO), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append((process, words))
    for process, words in started:
        out, error = process.communicate()
        assert (process.returncode, out) == (2, "")
        assert error.startswith(words) and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []
