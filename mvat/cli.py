"""The command `mvat`: info, enhance, export, doctor.

Exit status: 0 all done, 1 some files of many failed (or the extension is broken), 2 something that the user must mend.
PyTorch and the audio packages are imported by the commands that need them, so that --help is quick.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from mvat import __version__
from mvat.errors import Parser, failed, interrupted, listed, one_line
from mvat.files import making

if TYPE_CHECKING:
    from mvat.models import Manner

SUFFIXES = (".wav", ".flac")
_EPILOG = """\
examples:
  mvat enhance noisy.wav -o enhanced.wav
  mvat enhance recordings/ more/a.flac -o enhanced/ --device cuda
  mvat enhance lecture.flac -o enhanced.flac --checkpoint runs/demo/student --window 20
  mvat info --preset s-8.1gf --seconds 10
  mvat export --checkpoint best.pt --format onnx -o model.onnx
  mvat doctor
"""


class Job(NamedTuple):
    """A file to enhance and the file to write."""

    source: Path
    target: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own) and give its exit status."""
    try:
        arguments = _parser().parse_args(argv)
        with _terminable():
            return arguments.run(arguments)
    except KeyboardInterrupt:
        return interrupted("mvat")
    except (ValueError, OSError, ImportError) as error:
        return failed("mvat", error)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that nothing half written stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> NoReturn:
        print("mvat: terminated", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mvat",
        description="Speech enhancement with multi-view attention.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mvat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="info|enhance|export|doctor")

    info = commands.add_parser("info", allow_abbrev=False, help="the presets and what they cost")
    info.add_argument("--preset", metavar="NAME", help="this one only")
    info.add_argument("--seconds", type=_seconds, default=4.0, help="length of the audio (default: 4)")
    info.set_defaults(run=_info)

    enhance = commands.add_parser(
        "enhance",
        allow_abbrev=False,
        help="remove the noise from recordings",
        description="Remove the noise from .wav and .flac files of any length, sample rate and number of channels; "
        "rate, channels, length and sample format are kept. Folders are searched with all their subfolders. A file has "
        "its name only when it is whole.",
    )
    enhance.add_argument("inputs", nargs="+", metavar="FILE|DIR")
    enhance.add_argument(
        "-o",
        "--out",
        required=True,
        help="for a single file the file to write (.wav or .flac) or a folder, else a folder; made where missing",
    )
    _add_model(enhance)
    enhance.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one"
    )
    enhance.add_argument(
        "--window",
        type=_window,
        default="auto",
        metavar="SECONDS|whole",
        help="audio that the model is given at once: a longer recording runs in overlapped windows of this length, "
        '"whole" never does (default: up to 30 s whole, else windows of 10 s)',
    )
    enhance.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show progress bars (default: on a terminal, when it takes long)",
    )
    enhance.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    enhance.set_defaults(run=_enhance)

    export = commands.add_parser(
        "export",
        allow_abbrev=False,
        help="write a model for another runtime",
        description="Write a model for another runtime: torch.export (pt2), AOTInductor (aoti, which compiles for "
        "minutes) or ONNX (onnx). The file is run and compared with the model before it takes its name. Loading pt2 or "
        "aoti takes `import mvat.kernels`, which registers the fused operators.",
    )
    _add_model(export)
    export.add_argument("--format", required=True, metavar="pt2|aoti|onnx", help="what to write")
    export.add_argument("-o", "--out", required=True, help="the file to write, ending in .pt2 or .onnx")
    export.add_argument(
        "--seconds", type=_seconds, help="fix the length, and the batch at 1 (default: any length and batch)"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    export.set_defaults(run=_export, device="cpu")

    doctor = commands.add_parser("doctor", allow_abbrev=False, help="what is installed, what runs where and why")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    model = command.add_mutually_exclusive_group()
    model.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a model's folder, a run folder, a .pt or .pth file, or a name on the Hugging Face hub "
        "(default: the student that comes with mvat)",
    )
    model.add_argument("--preset", metavar="NAME", help="untrained weights, for timing and trying the plumbing only")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1e-4 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"must be a number between 0.0001 and 1000000, got {text!r}")
    return seconds


def _window(text: str) -> float | str | None:
    if text in ("auto", "whole"):
        return None if text == "whole" else text
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f'must be seconds, 1 at least, or "whole", got {text!r}')
    return seconds


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from mvat.kernels import current_backend
    from mvat.models import PRESETS, Manner, count_flops, count_parameters

    current_backend()  # refuses what MVAT_BACKEND may not be
    names = list(PRESETS) if arguments.preset is None else [arguments.preset]
    cost = f"GFLOPs on {arguments.seconds:g} s"
    lines = [f"{'preset':9} {'hidden':>6}  {'attention':9} {'parameters (M)':>14}  {cost}"]
    for name in names:
        with torch.device("meta"):
            model = Manner.from_preset(name)
        gflops = count_flops(model.config, arguments.seconds) / 1e9
        hidden, layers = model.config["hidden"], model.config["attention_layers"]
        lines.append(f"{name:9} {hidden:6}  {layers:9} {count_parameters(model) / 1e6:14.3f}  {gflops:{len(cost)}.2f}")
    print("\n".join(lines))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from mvat.doctor import report

    text, well = report()
    print(text)
    return 0 if well else 1


def _enhance(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from mvat.audio import require

    require("soundfile")
    from mvat.inference import enhance

    jobs, failures = plan(arguments.inputs, arguments.out, arguments.overwrite)
    count = len(jobs) + len(failures)
    if jobs:
        model = _model(arguments)
        _check_folder(Path(os.path.commonpath([job.target.parent for job in jobs])))
    progress = arguments.progress
    # A single file has only the bar of its own.
    hidden = len(jobs) == 1 or (None if progress is None else not progress)
    for job in tqdm(jobs, desc="files", unit="file", disable=hidden):
        try:
            with making(job.target.parent):
                enhance(job.source, model, out=job.target, window=arguments.window, progress=progress)
        # An unreadable file, a full disk, out of memory: the other files go on.
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            reason = one_line(error)
            failures.append(reason if str(job.source) in reason else f"{job.source}: {reason}")

    if len(failures) == count == 1:
        raise ValueError(failures[0])
    if len(failures) == count:
        return failed("mvat", f"none of {count} files was enhanced:", failures)
    if failures:
        title = f"mvat: {len(failures)} of {count} files could not be enhanced:"
        print(listed(title, failures), file=sys.stderr)
    print(f"enhanced {count - len(failures)} of {count} files into {arguments.out}")
    return 1 if failures else 0


def plan(inputs: Sequence[str], out: str, overwrite: bool = False) -> tuple[list[Job], list[str]]:
    """Decide what is read and what is written, before anything is.

    Args:
        inputs: Files, and folders to search for .wav and .flac files.
        out: The file to write if `inputs` is a single file and `out` has a suffix and is no folder; else a folder, in
            which files keep their names and, from a folder, their relative paths.
        overwrite: Whether an output may exist.

    Returns:
        The jobs, and one line "<path>: <reason>" for every input that cannot be one.

    Raises:
        ValueError: Two inputs have one output, an output is an input, or `out` is a file where a folder is needed.
    """
    if not out or "" in inputs:
        raise ValueError("a name is empty; the folder one is in is written as .")
    target = Path(out)
    if len(inputs) == 1 and not os.path.isdir(inputs[0]):
        into_folder = target.is_dir() or not target.suffix or out.endswith(os.sep)
    elif target.suffix.lower() in SUFFIXES or target.is_file():
        raise ValueError(f"{out}: several inputs need a folder to write to, not a file")
    else:
        into_folder = True

    jobs: list[Job] = []
    failures: list[str] = []
    for name in inputs:
        source = Path(name)
        if source.is_dir():
            found, closed = _recordings(source, target)
            jobs += [Job(path, target / path.relative_to(source)) for path in found]
            failures += closed
            if not found and not closed:
                failures.append(f"{name}: the folder holds no {' or '.join(SUFFIXES)} file")
        elif source.is_file():
            jobs.append(Job(source, target / source.name if into_folder else target))
        elif source.is_symlink() and not source.exists():
            failures.append(f"{name}: is a link to {os.readlink(source)}, which leads to no file or folder")
        else:
            failures.append(f"{name}: {'is no regular file' if source.exists() else 'no such file or folder'}")
    _refuse_clashes(jobs)

    possible = []
    for job in jobs:
        if job.target.suffix.lower() not in SUFFIXES:
            failures.append(f"{job.source}: cannot write {job.target}, only {' and '.join(SUFFIXES)} files")
        elif job.target.is_dir():
            failures.append(f"{job.source}: the output {job.target} is a folder")
        elif os.path.lexists(job.target) and not overwrite:
            failures.append(f"{job.source}: the output {job.target} exists; --overwrite replaces it")
        else:
            possible.append(job)
    return possible, failures


def _recordings(folder: Path, out: Path) -> tuple[list[Path], list[str]]:
    """The audio files below a folder, in order, and a line for each subfolder that cannot be looked into.

    No hidden files, and no former results where `out` lies below the folder too.
    """
    root, results = os.path.realpath(folder), os.path.realpath(out)
    closed: list[str] = []
    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=lambda error: closed.append(one_line(error))):
        if results != root:
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) != results]
        paths = (Path(place, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(found), closed


def _refuse_clashes(jobs: Sequence[Job]) -> None:
    writers: dict[str, Path] = {}
    sources = {(status.st_dev, status.st_ino) for status in (os.stat(job.source) for job in jobs)}
    for job in jobs:
        other = writers.setdefault(os.path.realpath(job.target), job.source)
        if other is not job.source:
            raise ValueError(f"{other} and {job.source} would both be written to {job.target}")
        if job.target.exists():
            status = os.stat(job.target)
            if (status.st_dev, status.st_ino) in sources:
                raise ValueError(f"{job.target} is an input and would be overwritten; choose another --out")


def _model(arguments: argparse.Namespace) -> "Manner":
    import torch

    from mvat.kernels import current_backend
    from mvat.models import Manner

    current_backend()  # refuses what MVAT_BACKEND may not be
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here (see `mvat doctor`)")
    if arguments.checkpoint is not None:
        best = Path(arguments.checkpoint) / "best.pt"
        model = Manner.from_pretrained(best if arguments.checkpoint and best.is_file() else arguments.checkpoint)
    elif arguments.preset is not None:
        model = Manner.from_preset(arguments.preset).eval()
        print(
            f"mvat: warning: --preset {arguments.preset} has untrained weights: for timing and trying the plumbing "
            "only, no speech is enhanced",
            file=sys.stderr,
        )
    else:
        model = Manner.from_pretrained()
    return model.to("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")


def _export(arguments: argparse.Namespace) -> int:
    from mvat.audio import SAMPLE_RATE
    from mvat.export import check_request, export_model

    check_request(arguments.out, arguments.format, arguments.overwrite)
    samples = None if arguments.seconds is None else max(1, round(arguments.seconds * SAMPLE_RATE))
    try:
        done = export_model(_model(arguments), arguments.out, arguments.format, samples, arguments.overwrite)
    except RuntimeError as error:  # PyTorch's, of many lines
        raise ValueError(f"{arguments.out}: {str(error).partition(chr(10))[0]}") from error
    print(
        f"exported {arguments.out}: audio {done.shape} at {SAMPLE_RATE} Hz; largest difference from the model "
        f"{done.error:.0e} of its peak"
    )
    return 0


def _check_folder(folder: Path) -> None:
    """ValueError unless the folder is there, or can be made, and can be written to."""
    try:
        with making(folder):
            writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be made ({error.strerror})") from error
    if not writable:
        raise ValueError(f"{folder}: this folder cannot be written to")
