"""Prepare speech, noise and room impulse responses for training pairs that are mixed while they are read.

The folders are those of the Deep Noise Suppression (DNS) challenge, which are found by their names, or any others.
Nothing is copied: the recordings are listed, and a part of the speakers, noises and rooms is held out, from which
pairs to validate on are mixed once and written. The challenge's synthetic test set, where it is there, becomes the test
pairs.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mvat import audio
from mvat.files import write_text
from train import manifest
from train.manifest import ROLES, SAMPLE_RATE, Entry, Manifest, ManifestError, Recording
from train.mixing import check_seed, minutes_by_split
from train.mixtures import Mixer

__all__ = ["SKIPPED", "Folders", "find_folders", "prepare_dns"]

MIXTURE_SECONDS = 10.0
"""Length of a pair to validate or test on, that of the challenge's test set."""
SHORTEST = {"clean": 0.5, "noise": 0.5, "rir": 0.002}
"""Recordings below so many seconds are left out."""
LONGEST_RESPONSE = 30.0
"""A longer file among the impulse responses is none."""
HELD_OUT = 0.05
"""Share of a role's seconds that is kept from training, where the folders are not split already."""

SKIPPED = "skipped.txt"
"""The list of what was left out, and why."""

_SUFFIXES = (".wav", ".flac", ".ogg")
#: Where the challenge's repository puts things, the 16-kHz folders before those of 48 kHz, which take longer to read.
_ROOTS = ("datasets", "", "datasets_fullband")
_PLACES: dict[str, tuple[str, ...]] = {
    "clean": ("clean", "clean_fullband"),
    "noise": ("noise", "noise_fullband"),
    "rir": ("impulse_responses",),
    "test": ("test_set/synthetic/no_reverb",),
}
#: Folders of clean speech that stand beside the noise where there is no folder "clean", as in the fourth challenge.
_SPEECH = ("*_speech", "*_data", "VocalSet*")
_READER = re.compile(r"reader_\d+")
_FILE_ID = re.compile(r"fileid_\d+$")
_TEST_NAME = re.compile(r"^[^_]+_(?P<noise>.+)_snr(?P<snr>-?\d+)_tl-?\d+_fileid_\d+$")


class Folders(NamedTuple):
    """Where recordings are.

    Attributes:
        clean, noise, rir: Folders, searched with all their subfolders. One that holds "train" and "valid" or "test" is
            split already, and only these are searched.
        test: A folder of the folders "clean" and "noisy", or None.
    """

    clean: tuple[Path, ...]
    noise: tuple[Path, ...]
    rir: tuple[Path, ...] = ()
    test: Path | None = None


def find_folders(source: Path) -> Folders:
    """The folders of the DNS challenge within its repository or its folder of data sets.

    Raises:
        ManifestError: There is no clean speech or no noise.
    """
    source = Path(source)
    if not source.is_dir():
        raise ManifestError(f"{source}: no such folder")
    found: dict[str, list[Path]] = {}
    for role, names in _PLACES.items():
        places = [source / root / name for root in _ROOTS for name in names]
        found[role] = [place for place in places if place.is_dir()][:1]
        for root in _ROOTS if role == "clean" else ():
            if not found[role]:
                folders = {folder for pattern in _SPEECH for folder in (source / root).glob(pattern)}
                found[role] = sorted(folder for folder in folders if folder.is_dir())
        if not found[role] and role in ("clean", "noise"):
            tried = ", ".join(str(place.relative_to(source)) for place in places)
            raise ManifestError(f"{source}: has none of the folders {tried}; name yours with --{role}")
    clean, noise, rir = (tuple(found[role]) for role in ROLES)
    return Folders(clean, noise, rir, next(iter(found["test"]), None))


def prepare_dns(
    folders: Folders,
    out: Path,
    *,
    valid_minutes: float = 10.0,
    test_minutes: float = 10.0,
    seed: int = 0,
    progress: bool = True,
) -> Manifest:
    """List the recordings, hold some out, mix pairs to validate on, and write the manifest.

    Of every recording the header and a quarter of a second are read. Files that are silent, too short or cannot be read
    are left out, counted, and listed in skipped.txt. A finished preparation with the same settings is not done again.

    Args:
        folders: Where the recordings are.
        out: New folder, or one that this function made with the same settings.
        valid_minutes: How much to mix of what is held out.
        test_minutes: How much to mix of clean/test and noise/test, where those are there and folders.test is None.
        seed: The same seed holds out the same recordings and mixes the same pairs.
        progress: Show progress bars.

    Raises:
        ManifestError: A folder is missing or holds nothing to use, folders contain each other, or the test set has no
            pairs.
        ValueError: An amount or the seed is negative.
    """
    check_seed(seed)
    minutes = minutes_by_split(0, valid_minutes, test_minutes)
    if round(minutes["valid"] * 60) < MIXTURE_SECONDS:
        raise ManifestError(f"minutes of valid must hold a mixture of {MIXTURE_SECONDS:g} s, got {valid_minutes}")
    out = Path(out)
    places = {role: tuple(Path(folder).resolve() for folder in getattr(folders, role)) for role in ROLES}
    test = None if folders.test is None else Path(folders.test).resolve()
    _check_folders(places, test, out.resolve())
    settings = {
        "source": "dns",
        **{role: [str(folder) for folder in places[role]] for role in ROLES},
        "test": None if test is None else str(test),
        "minutes": minutes,
        "seed": seed,
    }
    done = manifest.check_folder(out, settings)
    if done is not None:
        return done
    skipped: list[str] = []
    sets: dict[str, dict[str, list[Recording]]] = {split: {} for split in manifest.SPLITS}
    for number, role in enumerate(ROLES):
        found = _index(role, places[role], skipped, progress)
        for split, recordings in _split(found, np.random.default_rng((seed, number))).items():
            sets[split][role] = recordings
            if role != "rir" and split != "test" and not recordings:
                raise ManifestError(
                    f"{places[role][0]}: leaves no {role} recordings for {split}; it takes two files at least"
                )
    pairs = [] if test is None else _match(test, skipped)

    manifest.claim(out, settings)
    splits = {"valid": _mix(out, "valid", sets["valid"], minutes["valid"], seed, progress)}
    if test is not None:
        splits["test"] = [_entry(*pair, out) for pair in pairs]
    elif sets["test"]["clean"] and sets["test"]["noise"]:
        splits["test"] = _mix(out, "test", sets["test"], minutes["test"], seed, progress)
    # A name that is not UTF-8 can be in any of the lines.
    write_text(out / SKIPPED, "".join(f"{line}\n" for line in skipped).encode(errors="backslashreplace").decode())
    return manifest.save(out, "dns", splits, recordings=sets["train"])


def _check_folders(places: Mapping[str, Sequence[Path]], test: Path | None, out: Path) -> None:
    """Whether all folders are there and none holds another one's files, nor the folder to write."""
    named = [(f"--{role}", folder) for role in ROLES for folder in places[role]]
    for option, folder in [*named, *([("--test", test)] if test else [])]:
        if not folder.is_dir():
            raise ManifestError(f"{folder}: no such folder ({option})")
        if out.is_relative_to(folder):
            raise ManifestError(f"{out}: lies in {folder} ({option}), where its files would be taken for recordings")
    for option, folder in named:
        for other, parent in named:
            if option != other and folder.is_relative_to(parent):
                raise ManifestError(f"{folder} ({option}): lies in {parent} ({other}); the roles need folders apart")


def _index(
    role: str, folders: Sequence[Path], skipped: list[str], progress: bool
) -> dict[str | None, dict[str, Recording]]:
    """The usable recordings of a role by path, by the split that their folder says, or None where it says none."""
    from tqdm import tqdm

    found: dict[str | None, dict[str, Recording]] = {}
    before = len(skipped)
    for folder in folders:
        roots = {split: folder / split for split in manifest.SPLITS if (folder / split).is_dir()}
        # "train" alone may be the noise of one.
        for split, root in (roots if "train" in roots and len(roots) > 1 else {None: folder}).items():
            files = list(_files(root))
            if not files:
                raise ManifestError(f"{root}: holds no {', '.join(_SUFFIXES)} files")
            bar = tqdm(files, desc=f"reading {role}", unit="file", disable=None if progress else True)
            for file in bar:
                recording = _inspect(role, file, root)
                if isinstance(recording, Recording):
                    found.setdefault(split, {})[recording.path] = recording
                else:
                    skipped.append(recording)
    if folders and not found:
        raise ManifestError(f"{folders[0]}: none of its files can be used, the first: {skipped[before]}")
    return found


def _files(root: Path) -> Iterator[str]:
    """The audio files below a folder, in an order that does not depend on the file system; links are followed."""
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield os.path.join(folder, name)


def _inspect(role: str, file: str, root: Path) -> Recording | str:
    """A recording as its header tells, or why it cannot be used."""
    try:
        file.encode()
    except UnicodeEncodeError:
        return f"{file}: its name is not UTF-8"
    try:
        info = audio.info(file)
        seconds = info.frames / info.sample_rate
        if seconds < SHORTEST[role]:
            return f"{file}: too short, {seconds:.3f} s"
        if role == "rir":
            # OpenSLR 28 keeps noises among its impulse responses and tells them apart by name alone.
            if "noise" in info.path.stem.lower() or seconds > LONGEST_RESPONSE:
                return f"{file}: is noise, no impulse response"
        elif _is_silent(file, info):
            return f"{file}: is silent"
    except audio.AudioError as error:
        return str(error)
    return Recording(file, info.frames, info.sample_rate, info.channels, _group(info.path, root))


def _is_silent(file: str, info: audio.AudioInfo) -> bool:
    """Whether all samples are zero; all are read only where a quarter of a second in the middle is."""
    part = min(info.frames, info.sample_rate // 4)
    if audio.read(file, (info.frames - part) // 2, part)[0].any():
        return False
    return not any(block.any() for block in audio.blocks(file))


def _group(file: Path, root: Path) -> str:
    """Who speaks, which noise, which room: the reader in the name, else the folder, else the name but for a number."""
    reader = _READER.search(file.stem)
    if reader:
        return reader[0]
    return file.parent.name if file.parent != root else re.sub(r"[_-]\d+$", "", file.stem)


def _split(found: Mapping[str | None, Mapping[str, Recording]], rng: np.random.Generator) -> dict[str, list[Recording]]:
    """The recordings of every split: the folders' own, else a part of the training recordings is held out."""
    sets = {split: list(found.get(split, {}).values()) for split in manifest.SPLITS}
    sets["train"] += found.get(None, {}).values()
    if not sets["valid"]:
        held = _hold_out(sets["train"], rng)
        sets["valid"] = [recording for recording in sets["train"] if recording.path in held]
        sets["train"] = [recording for recording in sets["train"] if recording.path not in held]
    return sets


def _hold_out(recordings: Sequence[Recording], rng: np.random.Generator) -> set[str]:
    """Paths of about HELD_OUT of the seconds: whole groups, or files where the groups are too large for that."""
    by_group: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_group.setdefault(recording.group, []).append(recording)
    seconds = sum(recording.frames / recording.sample_rate for recording in recordings)
    files = [[recording] for recording in recordings]
    for units, most in ((list(by_group.values()), 1 / 3), (files, 1.0)):
        sizes = [sum(recording.frames / recording.sample_rate for recording in unit) / seconds for unit in units]
        # A folder of more than a tenth may be a language, not a speaker: it is held out only where all are so large.
        small = [i for i in rng.permutation(len(units)) if sizes[i] <= 0.1]
        if not small and len(units) > 1 and min(sizes) <= most:
            small = [int(np.argmin(sizes))]
        held: set[str] = set()
        share = 0.0
        for i in small:
            if share >= HELD_OUT:
                break
            held |= {recording.path for recording in units[i]}
            share += sizes[i]
        if held:
            return held
    return set()


def _mix(
    out: Path, split: str, roles: Mapping[str, Sequence[Recording]], minutes: float, seed: int, progress: bool
) -> list[Entry]:
    """Mix and write pairs of a split."""
    from tqdm import tqdm

    mixer = Mixer(roles["clean"], roles["noise"], roles["rir"])
    folders = [out / split / side for side in ("clean", "noisy")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    frames = round(MIXTURE_SECONDS * SAMPLE_RATE)
    entries = []
    count = round(minutes * 60 / MIXTURE_SECONDS)
    for i in tqdm(range(count), desc=f"mixing {split}", unit="pair", disable=None if progress else True):
        mixture = mixer.draw(np.random.default_rng((seed, manifest.SPLITS.index(split), i)), frames)
        name = f"{split}_{i + 1:04d}"
        clean, noisy = (folder / f"{name}.wav" for folder in folders)
        audio.write(clean, mixture.clean, SAMPLE_RATE)
        audio.write(noisy, mixture.noisy, SAMPLE_RATE)
        entries.append(Entry(name, mixture.speaker, clean, noisy, frames, mixture.noise, round(mixture.snr, 2)))
    return entries


def _match(test: Path, skipped: list[str]) -> list[tuple[audio.AudioInfo, audio.AudioInfo]]:
    """Pairs of a test set: files of one file id, as the challenge names them, or of one name."""
    sides = []
    for side in ("clean", "noisy"):
        if not (test / side).is_dir():
            raise ManifestError(f"{test}: has no folder {side!r}, expected the folders clean and noisy")
        files: dict[str, Path] = {}
        for file in map(Path, _files(test / side)):
            number = _FILE_ID.search(file.stem)
            key = number[0] if number else file.stem
            if key in files:
                skipped.append(f"{file}: {files[key].name} has the same name or file id")
            else:
                files[key] = file
        sides.append(files)
    clean, noisy = sides
    skipped += [f"{clean[key]}: has no noisy file" for key in clean if key not in noisy]
    skipped += [f"{noisy[key]}: has no clean file" for key in noisy if key not in clean]
    pairs = []
    for key in clean.keys() & noisy.keys():
        try:
            pair = audio.info(clean[key]), audio.info(noisy[key])
        except audio.AudioError as error:
            skipped.append(str(error))
            continue
        shapes = [f"{info.frames} frames, {info.sample_rate} Hz, {info.channels} channels" for info in pair]
        if shapes[0] != shapes[1] or pair[0].channels != 1:
            skipped.append(f"{noisy[key]}: {shapes[1]}, its clean file {shapes[0]}; expected equal and mono")
        else:
            pairs.append(pair)
    if not pairs:
        raise ManifestError(
            f"{test}: no clean file has its noisy one; expected clean/clean_fileid_1.wav and noisy/..._fileid_1.wav, "
            "or equal names"
        )
    return sorted(pairs, key=lambda pair: pair[1].path)


def _entry(clean: audio.AudioInfo, noisy: audio.AudioInfo, out: Path) -> Entry:
    """A test pair, resampled into the folder where it has another rate."""
    name = noisy.path.stem
    known = _TEST_NAME.match(name)
    places = {"clean": clean.path, "noisy": noisy.path}
    if clean.sample_rate != SAMPLE_RATE:
        for side, file in list(places.items()):
            places[side] = out / "test" / side / f"{name}.wav"
            places[side].parent.mkdir(parents=True, exist_ok=True)
            samples, rate = audio.read(file)
            audio.write(places[side], audio.resample(samples, rate, SAMPLE_RATE), SAMPLE_RATE)
    noise, snr = (known["noise"], float(known["snr"])) if known else (None, None)
    frames = audio.info(places["clean"]).frames
    return Entry(name, name.partition("_")[0], **places, frames=frames, noise=noise, snr=snr)
