"""The documentation: its code runs, its commands and excerpts exist, its tables are up to date, the site builds.

Of a page's fences, `python` is run, all blocks in order and in one namespace; `title="PATH"` makes a block an excerpt
of that file, held to its words; `sh` is checked, not run. `<!-- not run: REASON -->` leaves the next block out.
"""

import doctest
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from mvat import audio
from mvat.cli import _parser
from mvat.losses import transfer
from mvat.models import Manner
from mvat.models import blocks as blocks_module
from train import study_config
from train.command import parse

REPO = Path(__file__).resolve().parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.M
)


class Block(NamedTuple):
    page: Path
    language: str
    title: str
    reason: str  # why it is not run
    text: str
    line: int  # of its first line in the page


def blocks(page: Path, language: str | None = None, excerpt: bool = False) -> list[Block]:
    """The page's fenced blocks of a language (None: any), either the excerpts of files or all others."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(text):
        name, _, rest = match["info"].partition(" ")
        title = re.fullmatch(r'title="([^"]+)"', rest.strip())
        assert not rest or title, f"{page.name}: a fence with more than a title: {match['info']}"
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, name, title[1] if title else "", match["reason"] or "", match["text"], line))
    return [b for b in found if language in (None, b.language) and bool(b.title) == excerpt]


def name_of(page: object) -> str | None:
    return str(page.relative_to(REPO)) if isinstance(page, Path) else None


def pages_with(language: str | None, excerpt: bool = False) -> list[Path]:
    return [page for page in PAGES if blocks(page, language, excerpt)]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A folder with the recording and the checkpoint that pages speak of, and the namespace a page begins with."""
    monkeypatch.chdir(tmp_path)
    audio.write("noisy.wav", 0.1 * torch.randn(1, 8000).numpy(), 16000)
    checkpoint = tmp_path / "runs/demo/student_mvat/best.pt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"state_dict": Manner(hidden=6, depth=2, segment_len=8).state_dict()}, checkpoint)
    # README hands over features that are not made there.
    features = [torch.randn(2, channels, 50) for channels in (4, 20)]
    return {"__name__": "page", "student_features": features[:1], "teacher_features": features[1:]}


@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_the_code_of_a_page_runs(page: Path, scene: dict[str, object]) -> None:
    dtype = torch.get_default_dtype()
    try:
        for block in blocks(page, "python"):
            if not block.reason:
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), scene)
            else:
                compile(block.text, str(page), "exec")
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("module", [blocks_module, transfer], ids=["blocks", "transfer"])
def test_the_examples_in_docstrings_run(module: ModuleType) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


def test_few_blocks_are_not_run() -> None:
    left_out = [block for page in PAGES for block in blocks(page) if block.reason]
    assert [(block.page.name, block.reason) for block in left_out] == [
        ("README.md", "MANNER's own code is not here"),
        ("enhance.md", "the files are not here"),
    ]


@pytest.mark.parametrize("page", pages_with(None, excerpt=True), ids=name_of)
def test_excerpts_are_what_the_files_say(page: Path) -> None:
    for block in blocks(page, excerpt=True):
        source = (REPO / block.title).read_text(encoding="utf-8")
        at = 0
        for part in block.text.split("...\n"):
            found = source.find(part, at)
            assert found >= 0, f"{page.name}, line {block.line}: {block.title} has no such lines, or not in this order"
            at = found + len(part)


@pytest.mark.parametrize("page", pages_with("sh"), ids=name_of)
def test_commands_exist(page: Path) -> None:
    for block in blocks(page, "sh"):
        for line in block.text.splitlines():
            check_command(shlex.split(line, comments=True), f"{page.name}: {line}")


def check_command(words: list[str], where: str) -> None:
    """Assert that a command, its subcommands, its options and the files of the repository that it names are there."""
    program, *arguments = words
    if program == "torchrun":  # torchrun's own options, then -m MODULE ...
        arguments = arguments[arguments.index("-m") :]
        program = "python"
    if program == "make":
        makefile = (REPO / "Makefile").read_text(encoding="utf-8")
        targets = {t for line in re.findall(r"^([\w -]+):", makefile, re.M) for t in line.split()}
        assert arguments and set(arguments) <= targets, where
    elif program == "mvat":
        _parser().parse_args(arguments)
    elif program == "pip":
        extras = re.findall(r"\.\[(.+)\]", " ".join(arguments))
        known = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(extra in known for names in extras for extra in names.split(",")), where
    elif program == "python" and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:], where)
    else:
        script = arguments[0] if program == "python" else program
        assert (REPO / script).is_file(), where
        assert not arguments[1:] or script == "setup.py", where


def check_module(module: str, arguments: list[str], where: str) -> None:
    """Assert that `python -m module` is there, and that its configuration parses, or its source knows, the options."""
    found = importlib.util.find_spec(module)
    assert found is not None, where
    if found.submodule_search_locations:
        found = importlib.util.find_spec(f"{module}.__main__")
    source = Path(found.origin).read_text(encoding="utf-8")
    if module == "train.study":
        study_config.parse(["--config", *(str(REPO / word) for word in arguments)], "")
    elif "train import command" in source:  # typed options, see train/config.py
        parse([str(REPO / word) if word.endswith(".yaml") else word for word in arguments], "")
    else:
        options = [word for word in arguments if word.startswith("--")]
        assert all(f'"{option}"' in source for option in options), where


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_a_page_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    roots = "mvat|csrc|tests|benchmarks|docs|train"
    for name in re.findall(rf"`((?:{roots})/[\w./-]+\.(?:py|h|cpp|cu|md|json|sh|yaml))`", text):
        assert (REPO / name).is_file(), f"{page.name}: {name}"
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        here = (page.parent / target).exists()
        assert here or "://" in target, f"{page.name}: {target}"


def test_the_table_of_back_ends_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("docs_where", REPO / "docs" / "where.py")
    where = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(where)
    text = where.PAGE.read_text(encoding="utf-8")
    assert where.page(text) == text, "python docs/where.py renews it"
    assert "| `attention_map` | f32 f64 | f32 bf16 f16 |" in text and "| `mask_gate` |" in text
    with pytest.raises(ValueError, match="has no <!-- what runs where -->"):
        where.page("no table")


def test_the_site_builds_and_no_link_breaks(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site is built with mkdocs-material and mkdocstrings-python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        for source in re.findall(r'<img[^>]* src="([^":]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / source).is_file(), f"{page.name}: no picture {source}"
    reference = (tmp_path / "site/api/models.html").read_text(encoding="utf-8")
    assert 'id="mvat.models.blocks.GlobalAttention"' in reference
    benchmarks = (tmp_path / "site/benchmarks.html").read_text(encoding="utf-8")
    machines = [path.parent.name for path in (REPO / "benchmarks/results").glob("*/README.md")]
    assert machines and all(f"machines/{name}/index.html" in benchmarks for name in machines)
