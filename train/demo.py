"""The demonstration, `make demo`: data, a teacher, a student alone and with MV-AT, scores on unseen files, a report.

    python -m train.demo [--data data/demo] [--out runs/demo] [--source voices|synthetic]

Run again, it goes on where it stopped. The program ends with 1 if the student taught by MV-AT does not raise SI-SDR.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mvat.errors import Parser, failed, named
from mvat.kernels import current_backend
from mvat.metrics import Scores
from train import command
from train.evaluate import evaluate
from train.report import report
from train.sources import SourceUnavailable
from train.synthetic import prepare_synthetic
from train.voices import prepare_voices

CONFIGS = Path(__file__).parent / "configs"
#: Run folder, configuration, kind, and what its transfer is.
RUNS = (
    ("teacher", "demo_teacher.yaml", "teacher", "none"),
    ("student", "demo_student.yaml", "student", "none"),
    ("student_mvat", "demo_student.yaml", "student", "mvat"),
)
#: Loud noise, which a network that was trained for minutes can already lower.
TRAIN_SNRS, TEST_SNRS = (-5.0, 0.0, 5.0, 10.0), (-5.0, 0.0, 5.0)
SHOWN = ("pesq_wb", "stoi", "si_sdr")


def prepare(folder: Path, source: str | None) -> Path:
    """The data folder: real voices where they can be had, else generated ones, and says which."""
    voices, synthetic = folder / "voices", folder / "synthetic"
    if source is None:
        # What a former call settled on stays: its runs were trained on it.
        source = "synthetic" if (synthetic / "manifest.json").is_file() else None
    if source != "synthetic":
        try:
            prepare_voices(voices, train_snrs=TRAIN_SNRS, test_snrs=TEST_SNRS)
            print(f"data: real voices and noises from Debian packages, see {voices / 'LICENSES.md'}")
            return voices
        except SourceUnavailable as error:
            if source == "voices":
                raise ValueError(str(error)) from None
            print(f"data: no real voices here ({error})")
    prepare_synthetic(synthetic, train_snrs=TRAIN_SNRS, test_snrs=TEST_SNRS)
    print(f"data: generated voices and noises in {synthetic}")
    return synthetic


def train(data: Path, out: Path, name: str, config: str, kind: str, method: str) -> None:
    """One run of the demonstration."""
    arguments = ["--config", str(CONFIGS / config), "--data.path", str(data), "--out", str(out / name)]
    if method != "none":
        arguments += ["--transfer.method", method, "--transfer.teacher", str(out / "teacher" / "best.pt")]
        # In so few steps the default weight lets the maps outvote the speech.
        arguments += ["--transfer.weight", "0.01", "--label", "student, MV-AT"]
    command.run(command.parse(arguments, "demo"), kind)


def summary(scores: dict[str, Scores]) -> str:
    """The table of means, a row for the noisy input and for every run."""
    lines = [f"{'':14}" + "".join(f"{name:>10}" for name in SHOWN)]
    for name, score in scores.items():
        mean = score.mean()
        lines.append(
            f"{name:14}" + "".join(f"{'-' if (v := mean[m]) is None else format(v, '.3f'):>10}" for m in SHOWN)
        )
    return "\n".join(lines)


def demo(data: Path, out: Path, source: str | None = None) -> bool:
    """Everything; whether the student taught by MV-AT raised the mean SI-SDR over the noisy input."""
    started = time.perf_counter()
    print("1/5  data", flush=True)
    data = prepare(data, source)
    for i, run in enumerate(RUNS):
        print(f"{i + 2}/5  training: {run[0]}", flush=True)
        train(data, out, *run)
    print("5/5  scores on unseen voices and noises, report", flush=True)
    scores = {"noisy": evaluate(data, out / "noisy", metrics=SHOWN)}
    for name, *_ in RUNS:
        scores[name] = evaluate(data, out / name, out / name / "best.pt", metrics=SHOWN)
    page = report(out)
    print(f"\n{summary(scores)}\n")
    print(f"report: {page}")
    print(f"enhanced files: {out / 'student_mvat' / 'enhanced'}")
    before, after = (scores[name].mean()["si_sdr"] for name in ("noisy", "student_mvat"))
    raised = before is not None and after is not None and after > before
    verdict = "raises" if raised else "does NOT raise"
    values = " to ".join("none" if value is None else f"{value:.2f}" for value in (before, after))
    print(f"the student taught by MV-AT {verdict} SI-SDR over the noisy input: {values} dB")
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")
    return raised


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if the student raised SI-SDR, 1 if not, 2 with one line for what the user must mend."""
    parser = Parser(prog="python -m train.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=named, default=Path("data/demo"), help="folder for the data")
    parser.add_argument("--out", type=named, default=Path("runs/demo"), help="folder for the runs and the report")
    parser.add_argument("--source", choices=("voices", "synthetic"), help="default: voices, else synthetic")
    try:
        current_backend()
        options = parser.parse_args(argv)
        return 0 if demo(options.data, options.out, options.source) else 1
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return failed("train.demo", error)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
