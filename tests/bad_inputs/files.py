"""Recordings to enhance, and where the result is to go."""

import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from tests.bad_inputs import Case, all_of, folders, written
from tests.bad_inputs.scene import tone

MODEL = "--checkpoint model"
TO_OUT = f"-o out.wav {MODEL}"


def wav(
    name: str = "bad.wav",
    rate: int = 16000,
    channels: int = 1,
    bits: int = 16,
    frames: int = 100,
    code: int = 1,
    declared: int | None = None,
) -> Callable[[Path], object]:
    """A maker: a WAV file written by hand, whatever its header says."""
    size = frames * max(channels, 1) * bits // 8
    block = channels * bits // 8 % 65536
    fmt = struct.pack("<HHIIHH", code, channels, rate, rate * block % 2**32, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", declared or size)
    return written(b"RIFF" + struct.pack("<I", len(body) + size) + body + b"\1" * size, name)


def samples(values: list[float], name: str = "bad.wav") -> Callable[[Path], object]:
    """A maker: a recording of these samples in float."""
    return lambda folder: soundfile.write(folder / name, np.array(values), 16000, subtype="FLOAT")


def cut(name: str, keep: float) -> Callable[[Path], object]:
    """A maker: a recording of which only a part is there."""

    def make(folder: Path) -> None:
        tone(folder / name, 20000)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return make


def damaged(folder: Path) -> None:
    """A FLAC with wrong bytes in the middle."""
    tone(folder / "bad.flac", 20000)
    content = bytearray((folder / "bad.flac").read_bytes())
    content[10000:10400] = bytes(400)
    (folder / "bad.flac").write_bytes(content)


def link(name: str, target: str) -> Callable[[Path], object]:
    """A maker: a symbolic link."""
    return lambda folder: (folder / name).symlink_to(target)


def tones(*names: str) -> Callable[[Path], object]:
    """A maker: good recordings."""
    return lambda folder: [tone(folder / name, 2000) for name in names]


def closed(name: str, mode: int = 0) -> Callable[[Path], object]:
    """A maker: a good recording, or a folder, that nobody but its owner may use."""

    def make(folder: Path) -> None:
        if not (folder / name).exists():
            tone(folder / name, 2000)
        (folder / name).chmod(mode)

    return make


def device(name: str) -> Callable[[Path], object]:
    """A maker: a named pipe, which waits for a writer for ever."""
    return lambda folder: os.mkfifo(folder / name)


bad = functools.partial(Case, run=f"mvat enhance bad.wav {TO_OUT}")
LONG = "n" * 300

READ = (
    bad("a file that is not there", words="bad.wav|no such file or folder"),
    bad("an empty file", words="bad.wav|is empty", make=written("", "bad.wav")),
    bad("a text named .wav", words="bad.wav|no readable audio", make=written("hello\n", "bad.wav")),
    bad("zeros named .wav", words="bad.wav|no readable audio", make=written(bytes(500), "bad.wav")),
    bad("the first 20 bytes of a WAV", words="bad.wav|no readable audio", make=cut("bad.wav", 0.0005)),
    bad("a WAV cut after its header", words="bad.wav|cut short|0 of 40000 bytes", make=cut("bad.wav", 0.0011)),
    bad("a WAV of which half is there", words="bad.wav|cut short|of 40000 bytes", make=cut("bad.wav", 0.5)),
    Case(
        "a FLAC of which half is there", f"mvat enhance bad.flac {TO_OUT}", "bad.flac|cut short", cut("bad.flac", 0.5)
    ),
    Case("a FLAC with wrong bytes", f"mvat enhance bad.flac {TO_OUT}", "bad.flac|corrupt or cut short", damaged),
    bad("a WAV without samples", words="bad.wav|holds no samples", make=wav(frames=0)),
    bad("a WAV of 0 Hz", words="bad.wav|no readable audio", make=wav(rate=0)),
    bad("a WAV of 4294967295 Hz", words="bad.wav|no readable audio", make=wav(rate=2**32 - 1)),
    bad("a WAV of 100 MHz", words="bad.wav|100000000|1000 to 10000000", make=wav(rate=10**8)),
    bad("a WAV of 1 Hz", words="bad.wav|has 1 samples a second|1000 to", make=wav(rate=1)),
    bad("a WAV of no channels", words="bad.wav|no readable audio", make=wav(channels=0)),
    bad("a WAV of 5000 channels", words="bad.wav|channels", make=wav(channels=5000, frames=2)),
    bad("a WAV of 2000 channels", words="bad.wav|channels", make=wav(channels=2000, frames=2)),
    bad("a WAV of 0 bits", words="bad.wav|no readable audio", make=wav(bits=0)),
    bad("a WAV of an unknown coding", words="bad.wav|no readable audio", make=wav(code=0x1234)),
    bad("a WAV that claims more samples than it has", words="bad.wav|cut short", make=wav(declared=10**6)),
    bad("a NaN among the samples", words="bad.wav|NaN or infinite", make=samples([0.1, float("nan"), 0.2] * 50)),
    bad("an infinity among the samples", words="bad.wav|NaN or infinite", make=samples([0.1, float("inf")] * 50)),
    Case(
        "an empty folder named .wav", f"mvat enhance bad.wav -o o {MODEL}", "bad.wav|holds no .wav", folders("bad.wav")
    ),
    Case(
        "a folder of other files",
        f"mvat enhance others -o out {MODEL}",
        "others|holds no .wav",
        written("x", "others/a.mp3"),
    ),
    Case("a folder of hidden recordings", f"mvat enhance h -o out {MODEL}", "h: |holds no .wav", tones("h/.a.wav")),
    bad("a link to nothing", words="bad.wav|link|gone.wav", make=link("bad.wav", "gone.wav")),
    bad("a link to itself", words="bad.wav|is a link to|leads to no file", make=link("bad.wav", "bad.wav")),
    bad(
        "two links in a circle",
        words="bad.wav|is a link to|leads to no file",
        make=all_of(link("bad.wav", "b"), link("b", "bad.wav")),
    ),
    bad("a named pipe", words="bad.wav|no regular file", make=device("bad.wav")),
    Case("a device", f"mvat enhance /dev/zero {TO_OUT}", "/dev/zero|no regular file"),
    Case("a file of the kernel that reads as empty", f"mvat enhance /proc/self/mem {TO_OUT}", "/proc/self/mem|empty"),
    Case("a name of 300 letters", f"mvat enhance {LONG}.wav {TO_OUT}", f"{LONG}.wav|name too long"),
    Case("a path through a file", f"mvat enhance in.wav/bad.wav {TO_OUT}", "in.wav/bad.wav|no such file"),
    Case("an empty name", f"mvat enhance '' {TO_OUT}", "name is empty"),
    Case("a name with a line break", f"mvat enhance 'a\nb.wav' {TO_OUT}", "a b.wav|no such file"),
    Case("a name in another script", f"mvat enhance 'шум 音.wav' {TO_OUT}", "шум 音.wav|no such file"),
    Case("a pattern that the shell found nothing for", f"mvat enhance '*.wav' {TO_OUT}", "*.wav|no such file"),
    Case("an option that does not exist", f"mvat enhance in.wav --loud {TO_OUT}", "--loud"),
    bad(
        "a file that may not be read",
        words="bad.wav|Permission denied",
        make=all_of(closed("bad.wav"), lambda folder: folder.chmod(0o777)),
        unprivileged=True,
    ),
    Case(
        "a folder that may not be looked into",
        f"mvat enhance closed -o out {MODEL}",
        "closed|Permission denied",
        all_of(tones("closed/a.wav"), closed("closed"), lambda folder: folder.chmod(0o777)),
        unprivileged=True,
    ),
    Case(
        "one bad file of three",
        f"mvat enhance in.wav bad.wav more.wav -o out {MODEL}",
        "1 of 3 files could not be enhanced|bad.wav: is empty",
        all_of(tones("more.wav"), written("", "bad.wav")),
        error=1,
        new=("out", "out/in.wav", "out/more.wav"),
    ),
    Case(
        "a folder with one bad file",
        f"mvat enhance folder -o out {MODEL}",
        "1 of 2 files could not be enhanced|folder/deep/b.wav: no readable audio",
        all_of(tones("folder/a.wav"), written("text", "folder/deep/b.wav")),
        error=1,
        new=("out", "out/a.wav"),
    ),
    Case(
        "two bad files of two",
        f"mvat enhance a.wav b.wav -o out {MODEL}",
        "none of 2 files was enhanced|a.wav: is empty|b.wav: no such file",
        written("", "a.wav"),
    ),
)

WRITE = (
    Case("the input", f"mvat enhance in.wav -o in.wav {MODEL}", "in.wav|is an input and would be overwritten"),
    Case(
        "the input, to be replaced", f"mvat enhance in.wav -o in.wav {MODEL} --overwrite", "in.wav|would be overwritten"
    ),
    Case("the input's folder", f"mvat enhance in.wav -o . {MODEL} --overwrite", "in.wav|would be overwritten"),
    Case(
        "a link to the input",
        f"mvat enhance in.wav -o alias.wav {MODEL} --overwrite",
        "alias.wav|would be overwritten",
        link("alias.wav", "in.wav"),
    ),
    Case(
        "a second name of the input",
        f"mvat enhance in.wav -o twin.wav {MODEL} --overwrite",
        "twin.wav|would be overwritten",
        lambda folder: os.link(folder / "in.wav", folder / "twin.wav"),
    ),
    Case("a file that exists", f"mvat enhance in.wav {TO_OUT}", "out.wav exists|--overwrite", tones("out.wav")),
    Case("a link to nothing", f"mvat enhance in.wav {TO_OUT}", "out.wav exists|--overwrite", link("out.wav", "gone")),
    Case(
        "a folder in the place of the file",
        f"mvat enhance in.wav -o out {MODEL}",
        "out/in.wav is a folder",
        folders("out/in.wav"),
    ),
    Case("another format", f"mvat enhance in.wav -o out.mp3 {MODEL}", "out.mp3|.wav and .flac"),
    Case("a misspelt suffix", f"mvat enhance in.wav -o out.wave {MODEL}", "out.wave|.wav and .flac"),
    Case("a file for several inputs", f"mvat enhance in.wav in.wav -o out.wav {MODEL}", "out.wav|several inputs"),
    Case("a file for a folder", f"mvat enhance voicebank -o out.wav {MODEL}", "out.wav|need a folder"),
    Case(
        "an existing file for a folder", f"mvat enhance voicebank -o precious.txt {MODEL}", "precious.txt|need a folder"
    ),
    Case(
        "a folder below a file", f"mvat enhance in.wav -o precious.txt/out/ {MODEL}", "precious.txt/out|cannot be made"
    ),
    Case("a file below a file", f"mvat enhance in.wav -o precious.txt/o.wav {MODEL}", "precious.txt|cannot be made"),
    Case("below a link to nothing", f"mvat enhance in.wav -o l/o.wav {MODEL}", "l: |cannot be made", link("l", "gone")),
    Case("below a link to itself", f"mvat enhance in.wav -o l/o.wav {MODEL}", "l", link("l", "l")),
    Case("an empty name", f"mvat enhance in.wav -o '' {MODEL}", "name is empty"),
    Case("a name of 300 letters", f"mvat enhance in.wav -o {LONG}.wav {MODEL}", f"{LONG}.wav|name too long"),
    Case("the device that is always full", f"mvat enhance in.wav -o /dev/full {MODEL}", "/dev/full"),
    Case(
        "two inputs of one name",
        f"mvat enhance a/x.wav b/x.wav -o out {MODEL}",
        "a/x.wav and b/x.wav|both be written to out/x.wav",
        tones("a/x.wav", "b/x.wav"),
    ),
    Case(
        "a folder that may not be written to",
        f"mvat enhance in.wav -o closed/out.wav {MODEL}",
        "closed|cannot be written to",
        all_of(folders("closed"), closed("closed", 0o555)),
        unprivileged=True,
    ),
    Case(
        "a folder that may not be made",
        f"mvat enhance in.wav -o closed/new/ {MODEL}",
        "closed/new|cannot be made|Permission denied",
        all_of(folders("closed"), closed("closed", 0o555)),
        unprivileged=True,
    ),
    Case("no output", f"mvat enhance in.wav {MODEL}", "-o/--out"),
    Case("no input", f"mvat enhance {TO_OUT}", "FILE|DIR"),
)

GROUPS = {"Recordings to enhance": READ, "Where the result goes": WRITE}
