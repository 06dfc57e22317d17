"""Data to prepare: `train.prepare` voicebank, voices, synthetic, dns, and `train.demo`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mvat import audio
from tests.bad_inputs import Case, all_of, folders, nothing, removed, written
from tests.bad_inputs.scene import tone

VOICEBANK = "python -m train.prepare voicebank --source voicebank --out out --no-score"
SYNTHETIC = "python -m train.prepare synthetic"
VOICES = "python -m train.prepare voices --cache cache --out"
DNS = "python -m train.prepare dns"
OWN = f"{DNS} --clean mixed/clean --noise mixed/noise --out out"
FILE = "voicebank/noisy_trainset_wav/p1_001.wav"


def voicebank(given: str, words: str, make: Callable[[Path], object]) -> Case:
    return Case(given, VOICEBANK, words, make)


def spoken(name: str, frames: int = 2000, rate: int = 16000, channels: int = 1) -> Callable[[Path], object]:
    """A maker: a recording."""
    return lambda folder: tone(folder / name, frames, rate, channels)


def silent(*names: str) -> Callable[[Path], object]:
    """A maker: a second of silence in every place."""
    return lambda folder: [audio.write(folder / name, np.zeros(16000), 16000) for name in names]


PAIRS = (
    Case("no source", "python -m train.prepare voicebank --out out", "--source"),
    Case("no output", "python -m train.prepare voicebank --source voicebank", "--out"),
    Case(
        "a source that is not there",
        "python -m train.prepare voicebank --source gone --out out",
        "gone: |clean_trainset_wav",
    ),
    Case(
        "a file as source", "python -m train.prepare voicebank --source in.wav --out out", "in.wav: |clean_trainset_wav"
    ),
    voicebank("no clean folder", "has none of the folders clean_testset_wav", removed("voicebank/clean_testset_wav")),
    voicebank("no noisy folder", "no folder noisy_testset_wav", removed("voicebank/noisy_testset_wav")),
    voicebank("two training sets", "must have only one of the folders", folders("voicebank/clean_trainset_28spk_wav")),
    voicebank(
        "empty folders",
        "clean_testset_wav: holds no wav or flac files",
        all_of(
            removed("voicebank/clean_testset_wav", "voicebank/noisy_testset_wav"),
            folders("voicebank/clean_testset_wav", "voicebank/noisy_testset_wav"),
        ),
    ),
    voicebank("a clean file without its noisy one", "clean_trainset_wav/p1_001.wav: has no noisy file", removed(FILE)),
    voicebank(
        "a noisy file without its clean one",
        "noisy_trainset_wav/p3.wav: has no clean file",
        spoken("voicebank/noisy_trainset_wav/p3.wav"),
    ),
    voicebank(
        "two files of one name", "two files of one name|p1_001", spoken("voicebank/noisy_trainset_wav/p1_001.flac")
    ),
    voicebank("lengths that differ", f"{FILE}: has 1999 frames, its clean file 2000", spoken(FILE, 1999)),
    voicebank("rates that differ", f"{FILE}: has 8000 Hz, its clean file 16000", spoken(FILE, 2000, 8000)),
    voicebank("a stereo file", f"{FILE}: has 2 channels, expected mono", spoken(FILE, 2000, 16000, 2)),
    voicebank(
        "pairs of two rates",
        "all files must have one sample rate|2 files at 48000 Hz",
        all_of(spoken(FILE, 2000, 48000), spoken(FILE.replace("noisy", "clean"), 2000, 48000)),
    ),
    voicebank("a text among the files", f"{FILE}: no readable audio", written("hello", FILE)),
    voicebank("an empty file", f"{FILE}: is empty", written("", FILE)),
    voicebank(
        "three bad files",
        "voicebank: 3 problems|p1_001.wav: has no noisy file|p3_001.wav: has no clean file",
        all_of(removed(FILE, FILE.replace("p1", "p2")), spoken(FILE.replace("p1", "p3"))),
    ),
    voicebank(
        "a log of two columns",
        "log_trainset.txt:1|expected a name, a noise and an SNR",
        written("p1_001 bus\n", "voicebank/log_trainset.txt"),
    ),
    voicebank(
        "a log with words as SNR",
        "log_trainset.txt:2|'p2_001 bus loud'",
        written("p1_001 bus 3\np2_001 bus loud\n", "voicebank/log_trainset.txt"),
    ),
    voicebank(
        "an output that holds other files", "out: is not empty and was not made by train.prepare", written("x", "out/a")
    ),
    voicebank("an output that is a file", "out: is a file, expected a folder", written("x", "out")),
    voicebank(
        "an output of another preparation",
        "out: was prepared with other settings|'synthetic', now 'voicebank'",
        written('{"source": "synthetic"}', "out/prepare.json"),
    ),
    voicebank("an output whose note is damaged", "out/prepare.json: cannot be read", written("{", "out/prepare.json")),
    voicebank(
        "an output whose note is a list",
        "out/prepare.json: expected keys and values, got list",
        written("[]", "out/prepare.json"),
    ),
    Case("an output below a file", f"{VOICEBANK} --out in.wav/out", "in.wav/out: cannot be written (Not a directory)"),
    Case(
        "an output below a link to itself",
        f"{VOICEBANK} --out l/out",
        "l/out",
        lambda folder: (folder / "l").symlink_to("l"),
    ),
)

GENERATED = (
    Case("no output", SYNTHETIC, "--out"),
    Case("an empty name", f"{SYNTHETIC} --out ''", "--out|expected a name|''"),
    Case("minutes below 0", f"{SYNTHETIC} --out out --train-minutes=-1", "minutes of train|0 or more|-1"),
    Case("minutes of NaN", f"{SYNTHETIC} --out out --valid-minutes nan", "minutes of valid|0 or more|nan"),
    Case("infinite minutes", f"{SYNTHETIC} --out out --test-minutes inf", "minutes of test|0 or more|inf"),
    Case("minutes in words", f"{SYNTHETIC} --out out --train-minutes long", "--train-minutes|float|'long'"),
    Case("a seed below 0", f"{SYNTHETIC} --out out --seed=-1", "seed must be 0 or more|-1"),
    Case("a seed of a fraction", f"{SYNTHETIC} --out out --seed 1.5", "--seed|int|'1.5'"),
    Case("an unknown option", f"{SYNTHETIC} --out out --speakers 3", "--speakers"),
    Case("an option cut short", f"{SYNTHETIC} --out out --train 3", "--train"),
    Case("the scene's folder", f"{SYNTHETIC} --out .", "is not empty and was not made by train.prepare"),
    Case(
        "another data set", f"{SYNTHETIC} --out mixed", "mixed: was prepared with other settings|'dns', now 'synthetic'"
    ),
    Case("a file", f"{SYNTHETIC} --out precious.txt", "precious.txt: is a file, expected a folder"),
    Case(
        "a folder that may not be written to",
        f"{SYNTHETIC} --out closed/out",
        "closed/out: cannot be written (Permission denied)",
        all_of(folders("closed"), lambda folder: (folder / "closed").chmod(0o555)),
        unprivileged=True,
    ),
    Case("an unknown package", f"{VOICES} out --packages emacs", "emacs: not among the sources of voices"),
    Case("packages without voices", f"{VOICES} out --packages minetest-data", "hold no voice for: test, train, valid"),
    Case("no package", f"{VOICES} out --packages", "--packages|expected at least one argument"),
    Case("an SNR of NaN", f"{VOICES} out --train-snrs 0 nan", "signal-to-noise ratios must be finite|nan"),
    Case("an infinite SNR", f"{VOICES} out --train-snrs inf", "signal-to-noise ratios must be finite|inf"),
    Case("an SNR in words", f"{VOICES} out --train-snrs loud", "--train-snrs|float|'loud'"),
    Case("minutes below 0, of voices", f"{VOICES} out --train-minutes=-2", "minutes of train|-2"),
    Case("a seed below 0, of voices", f"{VOICES} out --seed=-1", "seed must be 0 or more|-1"),
    Case("a folder of something else, for voices", f"{VOICES} runs", "runs: is not empty and was not made by"),
    Case("no kind", "python -m train.prepare --out out", "voicebank|voices|synthetic|dns"),
    Case("an unknown kind", "python -m train.prepare musan --out out", "musan"),
    Case("an unknown source of the demonstration", "python -m train.demo --source moon", "--source|'moon'"),
    Case(
        "data of the demonstration where other files are",
        "python -m train.demo --source synthetic --data d",
        "d/synthetic: is not empty and was not made by train.prepare",
        written("x", "d/synthetic/a"),
    ),
)


def dns(given: str, options: str, words: str, make: Callable[[Path], object] = nothing) -> Case:
    return Case(given, f"{DNS} --out out {options}", words, make)


MIXED = (
    dns("no folders", "", "dns needs --source, or --clean and --noise"),
    dns("no noise", "--clean mixed/clean", "dns needs --source, or --clean and --noise"),
    dns("a source that is not there", "--source gone", "gone: no such folder"),
    dns("a source of something else", "--source runs", "runs: has none of the folders|--clean"),
    dns("a clean folder that is not there", "--clean gone --noise mixed/noise", "gone: no such folder (--clean)"),
    dns("a file as folder", "--clean in.wav --noise mixed/noise", "in.wav: no such folder (--clean)"),
    dns("an empty folder", "--clean e --noise mixed/noise", "e: holds no .wav, .flac, .ogg files", folders("e")),
    dns(
        "noise within the speech", "--clean mixed --noise mixed/noise", "mixed/noise (--noise): lies in|mixed (--clean)"
    ),
    Case(
        "an output within the speech",
        f"{DNS} --clean mixed/clean --noise mixed/noise --out mixed/clean/out",
        "mixed/clean/out: lies in|(--clean)",
    ),
    dns(
        "one file of speech",
        "--clean mixed/clean --noise mixed/noise",
        "mixed/clean: leaves no clean recordings|two files",
    ),
    dns(
        "silence",
        "--clean s --noise mixed/noise",
        "s: none of its files can be used|s/a.wav: is silent",
        all_of(folders("s"), silent("s/a.wav", "s/b.wav")),
    ),
    dns(
        "texts as speech",
        "--clean t --noise mixed/noise",
        "t: none of its files can be used|no readable audio",
        written("x", "t/a.wav", "t/b.wav"),
    ),
    dns(
        "speech too short",
        "--clean t --noise mixed/noise",
        "none of its files can be used|too short",
        all_of(spoken("t/a.wav", 100), spoken("t/b.wav", 100)),
    ),
    dns(
        "a test set without its folders",
        "--clean mixed/clean --noise mixed/noise --test e",
        "e: has no folder 'clean'",
        all_of(folders("e"), spoken("mixed/clean/b.wav", 16000), spoken("mixed/noise/b.wav", 16000)),
    ),
    dns(
        "a test set without pairs",
        "--clean mixed/clean --noise mixed/noise --test e",
        "no clean file has its noisy one",
        all_of(folders("e/clean", "e/noisy"), spoken("mixed/clean/b.wav", 16000), spoken("mixed/noise/b.wav", 16000)),
    ),
    dns(
        "too few minutes to validate on",
        "--clean mixed/clean --noise mixed/noise --valid-minutes 0.1",
        "minutes of valid must hold a mixture of 10 s|0.1",
    ),
    dns("minutes below 0", "--clean mixed/clean --noise mixed/noise --test-minutes=-1", "minutes of test|-1"),
    dns("minutes of NaN", "--clean mixed/clean --noise mixed/noise --valid-minutes nan", "minutes of valid|nan"),
    dns("a seed below 0", "--clean mixed/clean --noise mixed/noise --seed=-3", "seed must be 0 or more|-3"),
    Case("an output that holds other files", f"{OWN}", "out: is not empty", written("x", "out/a")),
    Case(
        "an output of other settings",
        f"{OWN}",
        "out: was prepared with other settings|seed 5, now 0",
        written('{"source": "dns", "seed": 5}', "out/prepare.json"),
    ),
)

GROUPS = {"Pairs to prepare": PAIRS, "Data to generate or fetch": GENERATED, "Data to mix": MIXED}
