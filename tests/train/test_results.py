import json
from pathlib import Path

import pytest

from train import results

REPO = Path(__file__).resolve().parents[2]


def system(label, kind, *means):
    runs = [{"seed": i, "epochs": 1, "mean": mean, "unscored": 0} for i, mean in enumerate(means)]
    return {"label": label, "kind": kind, "method": "none", "parameters": 1_119_271, "gflops": 8.059, "runs": runs}


@pytest.mark.parametrize("page", ["README.md", "docs/study.md", "mvat/weights/s-8.1gf/README.md"])
def test_pages_hold_the_tables_of_their_committed_results(page, capsys):
    assert results.main(["check", str(REPO / page)]) == 0, capsys.readouterr().err


def test_a_table_shows_mean_and_spread_and_what_is_missing(tmp_path):
    scores = [
        {"pesq_wb": 2.0 + i, "stoi": 0.9, "estoi": None, "si_sdr": 10.0} for i in (0, 1)
    ]  # no CSIG: an older file
    content = {"format": results.FORMAT, "systems": [system("student", "student", *scores)]}
    (tmp_path / "r.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: r.json -->\nold\n<!-- end -->\nafter\n")
    assert results.main(["check", str(readme)]) == 1
    assert "old" in readme.read_text()
    assert results.main(["readme", str(readme)]) == 0
    assert results.main(["check", str(readme)]) == 0
    row = readme.read_text().splitlines()[4]
    assert row == (
        "| student | 1.12 M | 8.06 | 2 | 2.50 (2.00 to 3.00) | 0.900 (0.900 to 0.900) |  | 10.00 (10.00 to 10.00) |"
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["check", "none.md"], "none.md"),
        (["readme", "empty.md"], "holds no table"),
        (["readme", "lost.md"], "lost.json: cannot be read"),
        (["readme", "other.md"], "other.json: is not of format"),
        (["save", "nowhere", "x.json"], "nowhere: no such folder"),
        (["renew"], "python -m train.results"),
    ],
)
def test_mistakes_end_with_2_and_a_reason(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    Path("empty.md").write_text("nothing\n")
    Path("lost.md").write_text("<!-- results: lost.json -->\n<!-- end -->\n")
    Path("other.md").write_text("<!-- results: other.json -->\n<!-- end -->\n")
    Path("other.json").write_text('{"format": "mvat-history-1"}')
    assert results.main(arguments) == 2
    assert reason in capsys.readouterr().err
    assert not Path("x.json").exists()
