import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine, plots, publish, results, table
from benchmarks.results import Row

MACHINE = {
    "name": "test-machine", "device": "cpu", "cpu": "Test CPU", "instruction_set": "AVX2", "gpu": None, "threads": 2,
    "date": "2026-01-02T03:04:05", "versions": {"torch": "2.13.0"}, "warning": "",
}  # fmt: skip
COMMIT = {"id": "abcdef0", "dirty": False}


def row(variant: str, milliseconds: float, length: int = 100, **others) -> Row:
    samples = [1e-3 * milliseconds * (1 + 0.01 * (i % 3)) for i in range(9)]
    shape = {"place": "base decoder.3", "B": 1, "T": length}
    values = {"status": "timed", "error": 1e-7, "samples": samples, "floor": 0.5e-3, "peak_extra": 10**6}
    return Row("some_op", shape, "forward", variant, "float32", **(values | others))


@pytest.fixture
def rows() -> list[Row]:
    long = [row("eager", 8, 400), row("fused", 16, 400)]
    big = {"status": "does not fit", "detail": "needs 99.0 GB", "samples": [], "error": None}
    return [row("eager", 4), row("fused", 2), *long, row("eager", 0, 800, **big)]


@pytest.fixture
def path(tmp_path: Path, rows: list[Row]) -> Path:
    path = machine.results_path(MACHINE, COMMIT, tmp_path)
    results.write(path, rows, MACHINE, COMMIT)
    return path


def test_the_file_has_its_place(tmp_path: Path, path: Path) -> None:
    assert path == tmp_path / "test-machine" / "2026-01-02-abcdef0.json"
    dirty = machine.results_path(MACHINE, COMMIT | {"dirty": True}, tmp_path, "kernels")
    assert dirty.name == "2026-01-02-abcdef0-dirty-kernels.json"


def test_rows_come_back_as_they_were(path: Path, rows: list[Row]) -> None:
    assert results.read(path) == (rows, MACHINE, COMMIT)


def test_pytest_benchmark_compares_the_file(tmp_path: Path, path: Path) -> None:
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path), "--columns=median,iqr,rounds"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "some_op" in shown and "[eager]" in shown and "[fused]" in shown and "T=800" not in shown


def test_statistics_of_the_file(path: Path, rows: list[Row]) -> None:
    stats = json.loads(path.read_text())["benchmarks"][0]["stats"]
    assert stats["rounds"] == 9 and stats["median"] == rows[0].median == pytest.approx(4.04e-3)
    assert stats["min"] <= stats["q1"] <= stats["median"] <= stats["q3"] <= stats["max"]


@pytest.mark.parametrize("content", ["", "{}", '{"benchmarks": [{}], "untimed": []}', "[]"])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="other.json: not a results file"):
        results.read(path)


def test_the_table_shows_winners_losers_and_what_does_not_fit(path: Path) -> None:
    text = table.full(results.read(path)[0])
    assert "| base decoder.3, B 1, T 100 | forward | 4.04 ms (1.00x, 12%) | 2.02 ms (2.00x, 25%) |" in text
    assert "| base decoder.3, B 1, T 400 | forward | 8.08 ms (1.00x, 6%) | 16.2 ms (0.50x, 3%) |" in text
    assert "| base decoder.3, B 1, T 800 | forward | does not fit | – |" in text


def test_the_table_marks_noise_and_drops_peers_that_never_ran() -> None:
    drifting = row("eager", 4, samples=[1e-3] * 8 + [2e-3] * 8)
    absent = row("peer", 0, status="absent", detail="not installed", samples=[])
    text = table.full([drifting, absent])
    assert "| ~1.5 ms (1.00x, 33%) |" in text and "peer" not in text


def test_a_busy_machine_and_uncommitted_changes_are_said() -> None:
    assert (
        table.measured_on(MACHINE, COMMIT)
        == "Test CPU with AVX2 (2 threads, cpu), PyTorch 2.13.0, 2026-01-02, commit abcdef0"
    )
    text = table.measured_on(MACHINE | {"warning": "the machine is busy"}, COMMIT | {"dirty": True})
    assert "abcdef0 with changes" in text and "warned at the start: the machine is busy" in text


def test_the_overview_holds_both_passes_of_every_variant() -> None:
    rows = [row("eager", 4, 64_084), row("fused", 2, 64_084), row("eager", 1, 100)]
    rows += [row("eager", 8, 64_084), row("manner", 0, 64_084, status="absent", samples=[])]
    rows[3].pass_name = "forward+backward"
    text = table.overview(rows)
    assert "| op | case | eager | mvat |" in text and "T 100" not in text
    assert "| some_op | base decoder.3, B 1, T 64084 | 4.04 / 8.08 | 2.02 |" in text


def test_pictures(tmp_path: Path, rows: list[Row]) -> None:
    model = row("eager", 5, audio_seconds=4.0)
    model.op, model.shape = "model", {"place": "base", "seconds": 4, "B": 1}
    written = plots.draw([*rows, model], tmp_path / "plots")
    assert {p.name for p in written} == {"some_op.png", "model.png", "throughput.png"}
    assert {p.name for p in written} == set(plots.planned([*rows, model]))
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)
    assert plots.draw([], tmp_path / "none") == []


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- end of benchmarks -->\nafter\n")
    return readme


def test_pages_follow_the_newest_results(tmp_path: Path, path: Path, readme: Path) -> None:
    command = ["--results", str(tmp_path), "--readme", str(readme)]
    newer = [row("eager", 3, 64_084), row("eager", 5, 400), row("fused", 4, 400)]
    results.write(path.with_name("2026-01-03-1234567.json"), newer, MACHINE | {"date": "2026-01-03T00:00:00"}, COMMIT)
    assert publish.main([*command, "--check"]) == 1
    assert readme.read_text().startswith("before\n<!-- benchmarks -->\nold")
    assert publish.main(command) == 0
    assert "T 64084 | 3.03" in readme.read_text() and "not measured on a GPU yet" in readme.read_text()
    assert readme.read_text().startswith("before\n") and readme.read_text().endswith("\nafter\n")
    page = (path.parent / "README.md").read_text()
    assert "T 64084" in page and "T 100" in page and "![some_op](some_op.png)" in page
    assert "2026-01-02, commit abcdef0" in page and "2026-01-03, commit abcdef0" in page
    assert "T 400 | forward | 5.05 ms" in page and "8.08 ms" not in page  # the newest of a case
    assert (path.parent / "some_op.png").is_file()
    assert publish.main([*command, "--check"]) == 0


def test_readme_shows_the_newest_machine_of_each_kind_and_links_the_others() -> None:
    def measured(name: str, gpu: str | None, day: int, median: float) -> dict[str, publish.Measured]:
        info = MACHINE | {"cpu": name, "gpu": gpu, "date": f"2026-01-0{day}T00:00:00"}
        return {"some_op": publish.Measured([row("eager", median, 64_084)], [(info, COMMIT)])}

    old, new = measured("Old", None, 1, 4), measured("New", None, 3, 2)
    text = publish.block({"new": new, "old": old})
    assert (
        text.index("New with") < text.index("| 2.02 |") < text.index("not measured on a GPU") < text.index("[Old with")
    )
    assert "(benchmarks/results/old/README.md)" in text and "| 4.04 |" not in text
    text = publish.block({"new": new, "old": old, "gpu": measured("", "Some GPU", 2, 1)})
    assert text.index("Some GPU") < text.index("| 1.01 |") < text.index("New with") < text.index("[Old with")
    assert "not measured on a GPU" not in text
    full = old | {"model": old["some_op"]}
    assert publish.block({"new": new, "old": full}).startswith("Old with")  # one op alone does not take its place


def test_a_readme_without_a_place_is_refused(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no place\n")
    assert publish.main(["--results", str(tmp_path), "--readme", str(readme)]) == 2
    assert "README.md: has no <!-- benchmarks -->" in capsys.readouterr().err


def test_the_committed_pages_are_up_to_date() -> None:
    assert publish.main(["--check"]) == 0


def test_the_machine_is_named() -> None:
    info = machine.machine_info("cpu")
    assert info["name"] == machine.name("cpu") and info["name"].endswith("-cores") and " " not in info["name"]
    assert info["threads"] >= 1 and info["versions"]["torch"]
