"""What users get wrong, as one list of cases: what is given, and the line and exit status, or the error, it ends with.

A case runs in a folder of its own that holds a copy of the scene (tests/bad_inputs/scene.py) and what the case adds.
`python -m tests.bad_inputs` runs all of them and writes docs/errors.md.
"""

import contextlib
import hashlib
import importlib
import io
import os
import re
import shlex
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

import mvat
from tests.bad_inputs import scene

#: Programs by the words that start them: the module whose `main` runs, and what its line begins with.
PROGRAMS = {
    "mvat": ("mvat.cli", "mvat: error: "),
    **{
        f"python -m train.{name}": (f"train.{name}", f"train.{name}: error: ")
        for name in ("prepare", "demo", "teacher", "distill", "study", "evaluate", "report", "results")
    },
}


def nothing(folder: Path) -> None:
    """A maker that adds nothing."""


class Case(NamedTuple):
    """Something that cannot be used.

    Attributes:
        given: What is given, in words.
        run: A command line of one of PROGRAMS, or a Python expression.
        words: What the message must say: what was given and what was expected, words apart by "|".
        make: Adds to the folder before the command runs in it.
        error: The exit status, or the type of the exception.
        new: Files that are written nevertheless: those of the good inputs.
        unprivileged: Whether permissions count, which they do not for root.
        without_gpu: Whether it is wrong only where there is no GPU.
    """

    given: str
    run: str
    words: str
    make: Callable[[Path], object] = nothing
    error: int | type[Exception] = 2
    new: tuple[str, ...] = ()
    unprivileged: bool = False
    without_gpu: bool = False

    @property
    def program(self) -> str | None:
        """Which of PROGRAMS runs, None for an expression."""
        return next((name for name in PROGRAMS if self.run.startswith(f"{name} ")), None)


class Outcome(NamedTuple):
    """What a case ended with: its exit status or error, what it printed, and what became of the folder."""

    error: int | type[Exception] | None
    out: str
    message: str
    before: dict[str, str]
    after: dict[str, str]


class Bench:
    """Where cases run, one after the other: a copy of the scene, of which afterwards what is new or changed is undone.

    Args:
        folder: An empty folder that anybody may enter.
    """

    def __init__(self, folder: Path) -> None:
        self.scene, self.place = folder / "scene", folder / "place"
        self.scene.mkdir()
        scene.build(self.scene)
        shutil.copytree(self.scene, self.place)
        self._good = snapshot(self.place)

    def run(self, case: Case) -> Outcome:
        """Run a case."""
        case.make(self.place)
        before = self._good if case.make is nothing else snapshot(self.place)
        out, err, after = io.StringIO(), io.StringIO(), {}
        try:
            with (
                contextlib.chdir(self.place),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                warnings.catch_warnings(),
                _unprivileged() if case.unprivileged else contextlib.nullcontext(),
                mock.patch("torch.cuda.is_available", lambda: False) if case.without_gpu else contextlib.nullcontext(),
            ):
                warnings.simplefilter("ignore")
                error, message = _called(case.run) if case.program is None else _commanded(case)
            after = snapshot(self.place)
        finally:
            if case.unprivileged:
                _open(self.place)
            if case.make is not nothing or after != before:
                self._restore()
        message = message or err.getvalue()
        for path in (os.path.realpath(self.place), str(self.place)):
            message = message.replace(f"{path}/", "").replace(path, ".")
        return Outcome(error, out.getvalue(), message, before, after)

    def _restore(self) -> None:
        """Make the place what it was."""
        found = snapshot(self.place)
        if found == self._good:
            return
        for name in sorted(found, reverse=True):  # what a folder holds before the folder
            if found[name] != self._good.get(name):
                path = self.place / name
                path.rmdir() if found[name] == "folder" else path.unlink()
        for name, text in self._good.items():
            path = self.place / name
            if text == "folder":
                path.mkdir(exist_ok=True)
            elif not path.exists():
                shutil.copy(self.scene / name, path)


def _open(folder: Path) -> None:
    """Let the owner enter every folder again."""
    for place, names, _ in os.walk(folder):
        for path in (place, *(os.path.join(place, name) for name in names)):  # before the walk enters them
            if not os.path.islink(path):
                os.chmod(path, 0o755)


def _commanded(case: Case) -> tuple[int | type[Exception], str]:
    name, _ = PROGRAMS[case.program or ""]
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    arguments = shlex.split(case.run.removeprefix(case.program or ""))
    try:
        return module.main(arguments), ""
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1, ""
    except Exception as error:  # a traceback, as a user would see it
        return type(error), f"{type(error).__name__}: {error}"


def _called(expression: str) -> tuple[type[Exception] | None, str]:
    torch.manual_seed(0)
    try:
        eval(expression, dict(namespace()))
    except Exception as error:
        return type(error), str(error)
    return None, ""


def namespace() -> dict[str, Any]:
    """What an expression can name."""
    from mvat import kernels, losses, metrics, models

    names: dict[str, Any] = {"np": np, "torch": torch, "nn": torch.nn, "mvat": mvat, "inf": float("inf")}
    for module in (kernels, losses, models):
        names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    names |= {"nan": float("nan"), "metrics": metrics, "zeros": torch.zeros, "ones": torch.ones, "randn": torch.randn}
    # A model that takes and gives [B, 1, T].
    names["same"] = torch.nn.Identity().eval()
    names["norm"] = lambda n: kernels.Norm(torch.ones(n), torch.zeros(n), torch.zeros(n), torch.ones(n))
    return names


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder: a folder, a link and its target, a file and what it holds, or something else."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            text = f"link to {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            readable = os.access(path, os.R_OK)
            text = hashlib.sha256(path.read_bytes()).hexdigest() if readable else f"{path.lstat().st_mtime_ns}"
        else:
            text = "folder" if stat.S_ISDIR(mode) else "special"
        found[str(path.relative_to(folder))] = text
    return found


@contextlib.contextmanager
def _unprivileged() -> Iterator[None]:
    """As nobody, where the process is root's."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def problems(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with how a case ended, against the rules of every command and call."""
    found = []
    ended = outcome.error
    as_expected = ended == case.error or (
        isinstance(ended, type) and isinstance(case.error, type) and issubclass(ended, case.error)
    )
    if not as_expected:
        found.append(f"ended with {outcome.error}, expected {case.error}")
    lines = outcome.message.splitlines()
    titles = [line for line in lines if not line.startswith("  ")]
    if len(titles) != 1 or (case.program is None and len(lines) != 1):
        found.append(f"{len(titles)} lines, expected one")
    if "Traceback" in outcome.message:
        found.append("a traceback")
    if case.program is not None and case.error == 2:
        _, start = PROGRAMS[case.program]
        if not outcome.message.startswith(start):
            found.append(f"the line does not begin with {start!r}")
        if outcome.out and case.program != "python -m train.demo":  # which tells its steps
            found.append(f"printed {outcome.out!r}")
    found += [f"says nothing of {word!r}" for word in case.words.split("|") if word not in outcome.message]
    changed = {path for path, text in outcome.before.items() if outcome.after.get(path) != text}
    made = outcome.after.keys() - outcome.before.keys()
    if changed or made != set(case.new):
        found.append(f"changed {sorted(changed)}, made {sorted(made)}, expected {sorted(case.new)}")
    return found


def groups() -> dict[str, tuple[Case, ...]]:
    """All cases by what they are about."""
    modules = ("files", "weights", "commands", "configurations", "preparation", "scores", "studies", "calls")
    found: dict[str, tuple[Case, ...]] = {}
    for module in modules:
        found |= importlib.import_module(f"tests.bad_inputs.{module}").GROUPS
    return found


def page(outcomes: Callable[[Case], Outcome]) -> str:
    """docs/errors.md."""
    cases = groups()
    lines = [
        "# Errors",
        "",
        f"{sum(map(len, cases.values()))} inputs that cannot be used, and what mvat says of each. A command ends with "
        "one line on stderr and status 2; where some",
        "of many files failed it names each of them, and ends with 1 if the others were done. A function raises "
        "TypeError or ValueError, or a",
        "subclass. In every case the files that were there stay as they were. `tests/test_bad_inputs.py` runs all of "
        "this; `python -m tests.bad_inputs`",
        "writes the page.",
    ]
    for title, members in cases.items():
        lines += ["", f"## {title}", "", "| given | to | ends with | message |", "|---|---|---|---|"]
        for case in members:
            outcome = outcomes(case)
            said = "<br>".join(code(line) for line in outcome.message.splitlines())
            lines.append(f"{row(case, outcome.error)}{said} |")
    return "\n".join(lines) + "\n"


def row(case: Case, error: object) -> str:
    """The beginning of a case's row, without the message."""
    name = error.__name__ if isinstance(error, type) else error
    return f"| {_escaped(case.given)} | {code(case.run)} | {name} | "


def code(text: str) -> str:
    """A code span that a table can hold, names of hundreds of letters cut."""
    text = re.sub(r"(.)\1{20,}", r"\1\1\1...", text.strip())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _escaped(text: str) -> str:
    return re.sub(r"([|*_<\[])", r"\\\1", text)


def written(text: str | bytes, *names: str) -> Callable[[Path], object]:
    """A maker: files of this content."""

    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def all_of(*makers: Callable[[Path], object]) -> Callable[[Path], object]:
    """A maker of several things, one after the other."""

    def make(folder: Path) -> None:
        for one in makers:
            one(folder)

    return make


def folders(*names: str) -> Callable[[Path], object]:
    """A maker: empty folders."""
    return lambda folder: [(folder / name).mkdir(parents=True) for name in names]


def removed(*names: str) -> Callable[[Path], object]:
    """A maker: what the scene has is gone."""
    return lambda folder: [
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink() for name in names
    ]


def replaced(name: str, *pairs: tuple[str, str]) -> Callable[[Path], object]:
    """A maker: a text file of the scene with these strings replaced, each of which it holds."""

    def make(folder: Path) -> None:
        text = (folder / name).read_text()
        for old, new in pairs:
            if old not in text:
                raise ValueError(f"{name} does not hold {old!r}")
            text = text.replace(old, new)
        (folder / name).write_text(text)

    return make
