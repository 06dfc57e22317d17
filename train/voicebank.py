"""Prepare VoiceBank-DEMAND, or pairs of one's own in its folders: check every pair, resample to 16 kHz, list them.

The source holds clean_trainset_wav (or clean_trainset_28spk_wav, clean_trainset_56spk_wav), noisy_trainset_..., and
clean_testset_wav, noisy_testset_wav, with wav or flac files of equal names.
"""

import multiprocessing
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from mvat import audio
from train import manifest
from train.manifest import SAMPLE_RATE, Entry, Manifest, ManifestError

__all__ = ["EXPECTED_SCORES", "noisy_scores", "prepare_voicebank"]

EXPECTED_SCORES = {"pesq_wb": 1.97, "stoi": 0.92, "csig": 3.35, "cbak": 2.44, "covl": 2.63, "segsnr": 1.68}
"""What the noisy test set of the real VoiceBank-DEMAND scores.

Published with SEGAN (Pascual, Bonafonte, Serra, Interspeech 2017) and in most tables since; STOI in later ones alone.
"""

_SETS = {"train": ("trainset", "trainset_28spk", "trainset_56spk"), "test": ("testset",)}
_SUFFIXES = (".wav", ".flac")


class _Pair(NamedTuple):
    name: str
    clean: Path
    noisy: Path


class _Job(NamedTuple):
    source: Path
    target: Path | None  # None: the file is only checked
    frames: int  # of the target


def prepare_voicebank(source: Path, out: Path, *, workers: int | None = None, progress: bool = True) -> Manifest:
    """Check the pairs, convert them to 16 kHz where they have another rate, and write the manifest.

    Files that are at 16 kHz already stay where they are and the manifest points to them. A run that was interrupted
    is continued by the same call: files that are converted already are left alone.

    Args:
        source: Folder of the four folders.
        out: New folder, or one that this function made from the same source.
        workers: Processes; by default one a CPU, 0 converts in this process.
        progress: Show progress bars.

    Raises:
        ManifestError: Folders or files that are missing, unmatched, or unfit; the first ten are listed. Nothing is
            written unless all names and headers are right, and no manifest unless all samples are.
    """
    source, out = Path(source).resolve(), Path(out)
    settings = {"source": "voicebank", "folder": str(source)}
    manifest.check_folder(out, settings)
    pairs: dict[str, list[_Pair]] = {}
    logs: dict[str, dict[str, tuple[str, float]]] = {}
    problems: list[str] = []
    for split in _SETS:
        variant = _variant(source, split)
        pairs[split], unmatched = _match(source, variant)
        problems += unmatched
        logs[split] = _read_log(source, variant, split)
    _refuse(source, problems)
    frames, rate = _check_headers([pair for members in pairs.values() for pair in members], progress)

    manifest.claim(out, settings)
    jobs: dict[Path, _Job] = {}
    for split, members in pairs.items():
        for side in ("clean", "noisy"):
            if rate != SAMPLE_RATE:
                (out / split / side).mkdir(parents=True, exist_ok=True)
            for pair in members:
                file: Path = getattr(pair, side)
                target = None if rate == SAMPLE_RATE else out / split / side / f"{pair.name}.wav"
                jobs[file] = _Job(file, target, int(frames[file] * SAMPLE_RATE / rate + 0.5))
    _convert_all(list(jobs.values()), workers, progress)

    splits = {
        split: [
            Entry(
                pair.name,
                pair.name.partition("_")[0],
                jobs[pair.clean].target or pair.clean,
                jobs[pair.noisy].target or pair.noisy,
                jobs[pair.clean].frames,
                *logs[split].get(pair.name, (None, None)),
            )
            for pair in pairs[split]
        ]
        for split in _SETS
    }
    return manifest.save(out, "voicebank", splits, None if rate == SAMPLE_RATE else audio.resampler_name())


def noisy_scores(data: Manifest, progress: bool = True) -> dict[str, float | None]:
    """Mean scores of the noisy test files, to compare with EXPECTED_SCORES."""
    from mvat.metrics import score_files

    pairs = [(entry.name, entry.clean, entry.noisy) for entry in data.test]
    return score_files(pairs, tuple(EXPECTED_SCORES), progress=progress).mean()


def _variant(source: Path, split: str) -> str:
    """Name of the set of a split, such as trainset_28spk."""
    found = [variant for variant in _SETS[split] if (source / f"clean_{variant}_wav").is_dir()]
    wanted = ", ".join(f"clean_{variant}_wav" for variant in _SETS[split])
    if not found:
        raise ManifestError(f"{source}: has none of the folders {wanted}")
    if len(found) > 1:
        raise ManifestError(f"{source}: must have only one of the folders {wanted}")
    if not (source / f"noisy_{found[0]}_wav").is_dir():
        raise ManifestError(f"{source}: has clean_{found[0]}_wav but no folder noisy_{found[0]}_wav")
    return found[0]


def _match(source: Path, variant: str) -> tuple[list[_Pair], list[str]]:
    """Pair clean and noisy files by name; the pairs, and what has no partner."""
    problems: list[str] = []
    sides = []
    for side in ("clean", "noisy"):
        folder = source / f"{side}_{variant}_wav"
        files: dict[str, Path] = {}
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in _SUFFIXES:
                if file.stem in files:
                    problems.append(f"{file} and {files[file.stem].name}: two files of one name")
                files[file.stem] = file
        if not files:
            problems.append(f"{folder}: holds no wav or flac files")
        sides.append(files)
    clean, noisy = sides
    problems += [f"{clean[name]}: has no noisy file" for name in clean if name not in noisy]
    problems += [f"{noisy[name]}: has no clean file" for name in noisy if name not in clean]
    return [_Pair(name, clean[name], noisy[name]) for name in clean if name in noisy], problems


def _check_headers(pairs: Sequence[_Pair], progress: bool) -> tuple[dict[Path, int], int]:
    """Check that all files are mono and readable, equally long in pairs, of one rate; frames of each, and the rate."""
    from tqdm import tqdm

    problems: list[str] = []
    frames: dict[Path, int] = {}
    rates: Counter[int] = Counter()
    for pair in tqdm(pairs, desc="checking", unit="pair", disable=None if progress else True):
        try:
            infos = audio.info(pair.clean), audio.info(pair.noisy)
        except audio.AudioError as error:
            problems.append(str(error))
            continue
        for item in infos:
            frames[item.path] = item.frames
            rates[item.sample_rate] += 1
            if item.channels != 1:
                problems.append(f"{item.path}: has {item.channels} channels, expected mono")
        for word, values in (("frames", [i.frames for i in infos]), ("Hz", [i.sample_rate for i in infos])):
            if values[0] != values[1]:
                problems.append(f"{pair.noisy}: has {values[1]} {word}, its clean file {values[0]}")
    _refuse(pairs[0].clean.parent.parent, problems)
    if len(rates) > 1:
        counts = ", ".join(f"{count} files at {rate} Hz" for rate, count in rates.most_common())
        raise ManifestError(f"{pairs[0].clean.parent.parent}: all files must have one sample rate, found {counts}")
    return frames, rates.popitem()[0]


def _convert_all(jobs: Sequence[_Job], workers: int | None, progress: bool) -> None:
    """Run the jobs in processes."""
    from tqdm import tqdm

    verb = "resampling" if jobs[0].target else "reading"
    with ExitStack() as stack:
        results: Iterable[str | None]
        if workers == 0:
            results = map(_convert, jobs)
        else:
            # Spawned, since a fork of a process with PyTorch's threads can hang.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
            results = pool.map(_convert, jobs, chunksize=16)
        problems = [
            p for p in tqdm(results, desc=verb, total=len(jobs), unit="file", disable=None if progress else True) if p
        ]
    _refuse(jobs[0].source.parent.parent, problems)


def _convert(job: _Job) -> str | None:
    """Read, resample and write one file; the problem, if there is one."""
    try:
        if job.target and job.target.exists():
            done = audio.info(job.target)
            if (done.sample_rate, done.channels, done.frames) == (SAMPLE_RATE, 1, job.frames):
                return None
        samples, rate = audio.read(job.source)
        if job.target:
            audio.write(job.target, audio.resample(samples, rate, SAMPLE_RATE)[:, : job.frames], SAMPLE_RATE)
    except audio.AudioError as error:
        return str(error)
    return None


def _read_log(source: Path, variant: str, split: str) -> dict[str, tuple[str, float]]:
    """Noise and SNR by name from the data set's log ("p232_001 bus 17.5"); nothing where there is no log."""
    for file in (source / f"log_{variant}.txt", source / f"log_{split}set.txt"):
        if file.is_file():
            break
    else:
        return {}
    rows = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        fields = line.split()
        try:
            if fields:
                name, noise, snr = fields
                rows[name] = noise, float(snr)
        except ValueError:
            raise ManifestError(f"{file}:{number}: expected a name, a noise and an SNR, found {line!r}") from None
    return rows


def _refuse(source: Path, problems: Iterable[str], shown: int = 10) -> None:
    """Raise the problem, or one error that counts them and lists the first ones."""
    problems = list(problems)
    if len(problems) == 1:
        raise ManifestError(problems[0])
    if problems:
        more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
        lines = "\n  ".join([*problems[:shown], *more])
        raise ManifestError(f"{source}: {len(problems)} problems:\n  {lines}")
