"""The data manifest: which pairs of clean and noisy files make up a data set, and the folder that holds them.

``manifest.json`` lists the pairs of every split; all audio is 16 kHz mono. Where training pairs are mixed while they
are read, the manifest has none, and ``recordings.csv`` beside it lists what they are mixed from, at any rate and number
of channels. ``prepare.json`` says from what and with which settings the folder was made, so that a preparation can be
continued and never writes into a foreign folder.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mvat.audio import SAMPLE_RATE
from mvat.files import write_text

__all__ = [
    "ROLES",
    "SPLITS",
    "Entry",
    "Manifest",
    "ManifestError",
    "Recording",
    "check_folder",
    "claim",
    "load",
    "recordings",
    "save",
    "summary",
]

FORMAT = "mvat-manifest-1"
SPLITS = ("train", "valid", "test")
SOURCES = ("voicebank", "voices", "synthetic", "dns")
ROLES = ("clean", "noise", "rir")
"""What a recording is mixed as: speech, noise, or a room impulse response that speech is convolved with."""
_NAME = "manifest.json"
_RECORDINGS = "recordings.csv"
_COLUMNS = ("role", "path", "frames", "sample_rate", "channels", "group")
_MARKER = "prepare.json"


class ManifestError(ValueError):
    """A manifest or data folder that cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class Entry:
    """One pair of files.

    Attributes:
        name: Unique within the split.
        speaker: Who speaks.
        clean: The clean file.
        noisy: The noisy file, as long as the clean one.
        frames: Samples of either.
        noise: Kind of noise, where known.
        snr: Signal-to-noise ratio in dB, where known.
    """

    name: str
    speaker: str
    clean: Path
    noisy: Path
    frames: int
    noise: str | None = None
    snr: float | None = None


class Recording(NamedTuple):
    """A file that training pairs are mixed from.

    Attributes:
        path: The file. A string: there can be hundreds of thousands.
        frames: Samples a channel.
        sample_rate: Samples a second.
        channels: Number of channels.
        group: Who speaks, which noise or which room it is, as far as names tell.
    """

    path: str
    frames: int
    sample_rate: int
    channels: int
    group: str


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Attributes:
        path: The manifest file.
        source: "voicebank", "voices", "synthetic" or "dns".
        train: Pairs to train on; none where they are mixed while they are read.
        valid: Pairs to validate on; may be empty, then validation speakers are taken out of train.
        test: Pairs to report on.
        resampler: What resampled the files; None where nothing did.
        recordings: The list of what training pairs are mixed from; None where they are files.
    """

    path: Path
    source: str
    train: tuple[Entry, ...]
    valid: tuple[Entry, ...]
    test: tuple[Entry, ...]
    resampler: str | None = None
    recordings: Path | None = None

    def split(self, name: str) -> tuple[Entry, ...]:
        """The pairs of "train", "valid" or "test".

        Raises:
            ValueError: Another name.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {name!r}")
        return getattr(self, name)


def load(path: str | os.PathLike[str]) -> Manifest:
    """Read and check a manifest: its structure, unique names, and that every file is there.

    Args:
        path: The manifest, or the folder that holds it.

    Raises:
        ManifestError: It is missing, malformed, of another format, or names files that are missing.
    """
    path = Path(path)
    if path.is_dir():
        path = path / _NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest (python -m train.prepare makes one)") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ManifestError(f"{path}: is no manifest of format {FORMAT!r}")
    if data.get("sample_rate") != SAMPLE_RATE:
        raise ManifestError(f"{path}: sample_rate must be {SAMPLE_RATE}, not {data.get('sample_rate')!r}")
    if data.get("source") not in SOURCES:
        raise ManifestError(f"{path}: source must be one of {', '.join(SOURCES)}, not {data.get('source')!r}")
    splits = {name: _entries(path, name, data.get(name)) for name in SPLITS}
    files = [file for entries in splits.values() for entry in entries for file in (entry.clean, entry.noisy)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ManifestError(f"{path}: {len(missing)} files are missing, the first is {missing[0]}")
    listed = data.get("recordings")
    if listed is not None and (not isinstance(listed, str) or not listed):
        raise ManifestError(f"{path}: recordings must be the name of a file, not {listed!r}")
    listed = None if listed is None else path.parent / listed
    if listed is not None and not listed.is_file():
        raise ManifestError(f"{path}: {listed} is missing")
    return Manifest(path, data["source"], resampler=data.get("resampler"), recordings=listed, **splits)


def recordings(data: Manifest) -> dict[str, list[Recording]]:
    """What the training pairs of a manifest are mixed from, by role.

    Raises:
        ManifestError: The manifest has none, or the list is malformed.
    """
    path = data.recordings
    if path is None:
        raise ManifestError(f"{data.path}: has training pairs, nothing to mix them from")
    found: dict[str, list[Recording]] = {role: [] for role in ROLES}
    number = 0
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, (role, name, frames, rate, channels, group) in enumerate(csv.reader(file)):
                if number:  # the first line names the columns
                    found[role].append(Recording(name, int(frames), int(rate), int(channels), group))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    except (KeyError, ValueError, csv.Error) as error:
        raise ManifestError(f"{path}:{number + 1}: expected {', '.join(_COLUMNS)} ({error})") from error
    return found


def save(
    folder: Path,
    source: str,
    splits: Mapping[str, Sequence[Entry]],
    resampler: str | None = None,
    recordings: Mapping[str, Sequence[Recording]] | None = None,
) -> Manifest:
    """Write the manifest of a folder atomically; paths inside the folder become relative.

    Args:
        folder: An existing folder.
        source: "voicebank", "voices", "synthetic" or "dns".
        splits: The pairs of each split; a split left out is empty.
        resampler: What resampled the files, if anything did.
        recordings: What training pairs are mixed from, by role, with absolute paths.
    """
    folder = folder.resolve()

    def place(file: Path) -> str:
        file = file.resolve()
        return str(file.relative_to(folder) if file.is_relative_to(folder) else file)

    def row(entry: Entry) -> dict[str, Any]:
        values = vars(entry) | {"clean": place(entry.clean), "noisy": place(entry.noisy)}
        return {key: value for key, value in values.items() if value is not None}

    head = {"format": FORMAT, "source": source, "sample_rate": SAMPLE_RATE, "resampler": resampler}
    rows = {name: [row(entry) for entry in splits.get(name, ())] for name in SPLITS}
    if recordings is not None:
        head["recordings"] = _RECORDINGS
        table = io.StringIO()
        lines = csv.writer(table, lineterminator="\n")
        lines.writerow(_COLUMNS)
        lines.writerows([role, *recording] for role in ROLES for recording in recordings.get(role, ()))
        write_text(folder / _RECORDINGS, table.getvalue())
    write_text(folder / _NAME, json.dumps(head | rows, indent=1) + "\n")
    return load(folder)


def check_folder(folder: Path, settings: Mapping[str, Any]) -> Manifest | None:
    """Check that a preparation with these settings may write into a folder.

    Args:
        folder: May be missing.
        settings: What the data is made from, as JSON values.

    Returns:
        The manifest where the preparation is complete already, else None.

    Raises:
        ManifestError: The folder is a file, foreign, or was prepared with other settings.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ManifestError(f"{folder}: is a file, expected a folder")
    marker = folder / _MARKER
    if not marker.exists():
        if any(folder.iterdir()):
            raise ManifestError(f"{folder}: is not empty and was not made by train.prepare; name another folder")
        return None
    try:
        known = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ManifestError(f"{marker}: cannot be read ({error})") from error
    if not isinstance(known, dict):
        raise ManifestError(f"{marker}: expected keys and values, got {type(known).__name__}")
    if known != settings:
        keys = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        changes = ", ".join(f"{key} {known.get(key)!r}, now {settings.get(key)!r}" for key in keys)
        raise ManifestError(f"{folder}: was prepared with other settings ({changes}); name another folder or remove it")
    return load(folder) if (folder / _NAME).exists() else None


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Create a folder, or continue with it, and note in it what it is made from.

    Raises:
        ManifestError: As check_folder, or the folder cannot be written.
    """
    check_folder(folder, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / _MARKER, json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise ManifestError(f"{folder}: cannot be written ({error.strerror})") from error


def summary(manifest: Manifest) -> str:
    """A few lines for people: pairs, minutes, speakers and noises of every split."""
    lines = [f"{manifest.path}"]
    for name in SPLITS:
        entries = manifest.split(name)
        minutes = sum(entry.frames for entry in entries) / SAMPLE_RATE / 60
        noises = Counter(entry.noise for entry in entries if entry.noise)
        line = f"  {name:5}  {len(entries):5} pairs  {minutes:6.1f} min  "
        line += f"speakers: {_some(sorted({entry.speaker for entry in entries})) or 'none'}"
        if noises:
            line += f"  noises: {_some([f'{noise} {count}' for noise, count in sorted(noises.items())])}"
        lines.append(line)
    if manifest.recordings is not None:
        lines.append("  training pairs are mixed from:")
        for role, files in recordings(manifest).items():
            hours = sum(file.frames / file.sample_rate for file in files) / 3600
            groups = _some(sorted({file.group for file in files})) or "none"
            lines.append(f"  {role:5}  {len(files):5} files  {hours:6.1f} h    {groups}")
    return "\n".join(lines)


def _some(words: Sequence[str], most: int = 12) -> str:
    """The words, or the first ones and how many more there are."""
    more = [f"and {len(words) - most} more"] if len(words) > most else []
    return ", ".join([*words[:most], *more])


def _entries(path: Path, split: str, rows: Any) -> tuple[Entry, ...]:
    """Check the rows of one split."""
    if not isinstance(rows, list):
        raise ManifestError(f"{path}: {split!r} must be a list")
    entries = []
    for index, row in enumerate(rows):
        where = f"{path}: {split}[{index}]"
        if not isinstance(row, dict):
            raise ManifestError(f"{where} must be an object")
        for key in ("name", "speaker", "clean", "noisy"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise ManifestError(f"{where}: {key!r} must be a text and not empty, not {row.get(key)!r}")
        frames = row.get("frames")
        if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1:
            raise ManifestError(f"{where}: 'frames' must be a positive integer, not {frames!r}")
        clean, noisy = (path.parent / row[side] for side in ("clean", "noisy"))
        entries.append(
            Entry(row["name"], row["speaker"], clean, noisy, row["frames"], row.get("noise"), row.get("snr"))
        )
    repeated = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if repeated:
        raise ManifestError(f"{path}: {split} names {repeated[0]!r} more than once")
    return tuple(entries)
