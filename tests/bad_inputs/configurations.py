"""Configurations and data for `train.teacher` and `train.distill`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mvat
from tests.bad_inputs import Case, all_of, folders, nothing, removed, replaced, written
from tests.bad_inputs.scene import tone
from train import checkpoint

TEACHER = "python -m train.teacher --config"
DISTILL = "python -m train.distill --config base.yaml"


def option(given: str, options: str, words: str, make: Callable[[Path], object] = nothing) -> Case:
    """A good configuration with an option that is not."""
    return Case(given, f"{TEACHER} base.yaml {options}", words, make)


def transfer(given: str, options: str, words: str, make: Callable[[Path], object] = nothing) -> Case:
    """A good student's configuration and a teacher, with options that are not."""
    return Case(given, f"{DISTILL} --transfer.method mvat --transfer.teacher best.pt {options}", words, make)


def yaml(given: str, content: str | bytes, words: str) -> Case:
    """A file in the place of a configuration."""
    return Case(given, f"{TEACHER} bad.yaml", f"bad.yaml|{words}", written(content, "bad.yaml"))


def more(given: str, lines: str, words: str) -> Case:
    """A second file over the good configuration."""
    return Case(given, f"{TEACHER} base.yaml --config bad.yaml", f"bad.yaml|{words}", written(lines, "bad.yaml"))


def less(given: str, lines: str, words: str) -> Case:
    """What `more` does, where the key alone is named: by then all files are one configuration."""
    return Case(given, f"{TEACHER} base.yaml --config bad.yaml", words, written(lines, "bad.yaml"))


FILES = (
    Case("nothing after the sign", f"{TEACHER}=", "--config: the name of the file is empty"),
    Case("a file that is not there", f"{TEACHER} gone.yaml", "gone.yaml: No such file"),
    Case("a folder", f"{TEACHER} data", "data: Is a directory"),
    Case("a recording", f"{TEACHER} in.wav", "in.wav|not valid YAML"),
    Case("a checkpoint", f"{TEACHER} best.pt", "best.pt|not valid YAML"),
    Case("an empty name", f"{TEACHER} ''", "--config: the name of the file is empty"),
    Case("no file after --config", f"{TEACHER}", "--config|expected one argument"),
    Case("no options at all", "python -m train.teacher --seed 1", "out|required"),
    Case(
        "a file that names itself",
        f"{TEACHER} bad.yaml",
        "bad.yaml|loop",
        written("out: run\nconfig: bad.yaml\n", "bad.yaml"),
    ),
    yaml("an empty file", "", "expected keys and values, got NoneType"),
    yaml("a comment alone", "# nothing\n", "expected keys and values, got NoneType"),
    yaml("a text", "hello world\n", "expected keys and values, got str"),
    yaml("a list", "- out: run\n- seed: 1\n", "expected keys and values, got list"),
    yaml("a number", "3\n", "expected keys and values, got int"),
    yaml("a tab", "optim:\n\tlr: 0.1\n", "not valid YAML|line 2"),
    yaml("a quote without its end", 'out: "run\n', "not valid YAML|line"),
    yaml("a bracket without its end", "data: {path: data\n", "not valid YAML|line"),
    yaml("a key without a colon", "out: run\nseed 1\n", "not valid YAML|line"),
    yaml("bytes that are no text", b"out: \xff\xfe\n", "not valid YAML"),
    yaml("two documents", "out: run\n---\nout: other\n", "not valid YAML"),
    yaml("code", "out: !!python/object/apply:os.system [touch was_run]\n", "not valid YAML|python/object"),
    more("an unknown key", "colour: red\n", "colour"),
    more("an unknown key of a section", "optim: {momentum: 0.9}\n", "momentum"),
    more("a list as a section", "data: [data]\n", "data must be a section of keys and values|['data']"),
    more("a section as a number", "optim: 3\n", "optim must be a section of keys and values|3"),
    more("a section as a text", "valid: all\n", "valid must be a section of keys and values|'all'"),
    more("a section of nothing", "model:\n", "model must be a section of keys and values|nothing"),
    more("a section in a section as a list", "data: {mix: [1]}\n", "data.mix must be a section of keys and values|[1]"),
    more("nothing as a range's bound", "data: {tempo: [0.9, null]}\n", "data.tempo|None"),
    less("nothing as a number", "optim: {batch_size: null}\n", "optim.batch_size must be int|None"),
    less("nothing as a text", "label: null\n", "label must be str|None"),
    less("nothing as arguments", "model: {arguments: null}\n", "model.arguments must be dict|None"),
    more("a text as a number", "optim: {lr: fast}\n", "lr|fast"),
    more("a fraction as a count", "optim: {epochs: 1.5}\n", "epochs|1.5"),
    more("a list as a number", "seed: [1]\n", "seed"),
    more("a number as a list", "valid: {metrics: 3}\n", "metrics"),
    more("numbers as keys", "1: 2\n", "1"),
    more("three bounds of a range", "data: {tempo: [0.9, 1, 1.1]}\n", "tempo"),
    more("arguments as a list", "model: {arguments: [6]}\n", "arguments"),
)

VALUES = (
    option("an unknown option", "--optim.momentum 0.9", "optim.momentum"),
    option("an option cut short", "--optim.epoch 3", "optim.epoch"),
    option("a number as a section", "--optim 3", "optim|3"),
    option("a word too many", "more", "more"),
    option("no output", "--out ''", "out must be the name of a folder|''"),
    option("a seed below 0", "--seed=-1", "seed must be between 0 and 4294967295|-1"),
    option("a seed beyond 32 bits", "--seed 4294967296", "seed must be between 0 and 4294967295|4294967296"),
    option("no epochs", "--optim.epochs 0", "optim.epochs must be at least 1|0"),
    option("epochs below 0", "--optim.epochs=-3", "optim.epochs must be at least 1|-3"),
    option("epochs in words", "--optim.epochs many", "optim.epochs|many"),
    option("a batch of nothing", "--optim.batch_size 0", "optim.batch_size must be at least 1|0"),
    option("a batch larger than the set", "--optim.batch_size 100", "training examples do not fill one batch of 100"),
    option("nothing to accumulate", "--optim.accumulate 0", "optim.accumulate must be at least 1|0"),
    option("an unknown loss", "--optim.loss l1", "optim.loss|weighted_mrstft|perceptual|l1"),
    option("a learning rate of 0", "--optim.lr 0", "optim.lr must be positive|0"),
    option("a learning rate below 0", "--optim.lr=-0.1", "optim.lr must be positive|-0.1"),
    option("a learning rate of NaN", "--optim.lr .nan", "optim.lr must be positive|nan"),
    option("an infinite learning rate", "--optim.lr .inf", "optim.lr must be positive|inf"),
    option("a learning rate in words", "--optim.lr fast", "optim.lr|fast"),
    option("a gradient cut to 0", "--optim.clip 0", "optim.clip must be positive|0.0"),
    option("an average that never moves", "--optim.ema 1", "optim.ema must be at least 0 and less than 1|1.0"),
    option("an average below 0", "--optim.ema=-0.1", "optim.ema must be at least 0 and less than 1|-0.1"),
    option("compiling in words", "--optim.compile maybe", "optim.compile|maybe"),
    option("no patience", "--valid.patience 0", "valid.patience must be at least 1|0"),
    option("samples below 0", "--valid.samples=-1", "valid.samples must be 0 or more|-1"),
    option("minutes below 0", "--save_minutes=-1", "save_minutes must be 0 or more|-1.0"),
    option("minutes of NaN", "--save_minutes .nan", "save_minutes must be 0 or more|nan"),
    option("an unknown precision", "--optim.precision int8", "optim.precision|int8"),
    Case(
        "half precision without a GPU",
        f"{TEACHER} base.yaml --optim.precision fp16",
        'optim.precision "fp16" needs a GPU',
        without_gpu=True,
    ),
    option("no validation", "--valid.every 0", "valid.every must be at least 1|0"),
    option("an unknown metric", '--valid.metrics "[mos]"', "valid.metrics must be some of|mos"),
    option("a choice outside the metrics", "--valid.select stoi", "valid.select|'stoi'"),
    option("an empty choice", "--valid.select ''", "valid.select|''"),
    option(
        "segments too short for the loss", "--data.segment_seconds 0.05", "data.segment_seconds must be at least 0.06"
    ),
    option("segments of nothing", "--data.segment_seconds 0", "data.segment_seconds must be at least 0.0641|0"),
    option("segments below 0", "--data.segment_seconds=-4", "data.segment_seconds must be at least 0.0641|-4"),
    option("segments of NaN", "--data.segment_seconds .nan", "data.segment_seconds must be at least 0.0641|nan"),
    option("endless segments", "--data.segment_seconds .inf", "data.segment_seconds must be at least 0.0641|inf"),
    option("workers below 0", "--data.workers=-1", "data.workers must be 0 or more|-1"),
    option("a limit below 0", "--data.valid_limit=-1", "data.valid_limit must be 0 or more|-1"),
    option("a tempo for more than all", "--data.tempo_share 2", "data.tempo_share must be between 0 and 1|2.0"),
    option("noises from more than all", "--data.remix_share 2", "data.remix_share must be between 0 and 1|2.0"),
    option("more voices than all", "--data.pitch_share 1.5", "data.pitch_share must be between 0 and 1|1.5"),
    option("microphones of NaN", "--data.filter_share .nan", "data.filter_share must be between 0 and 1|nan"),
    option("hiss in less than none", "--data.hiss_share=-1", "data.hiss_share must be between 0 and 1|-1.0"),
    option("a share of NaN", "--data.tempo_share .nan", "data.tempo_share must be between 0 and 1|nan"),
    option("no hop", "--data.stride_seconds 0", "data.stride_seconds must be positive|0"),
    option("a hop below 0", "--data.stride_seconds=-1", "data.stride_seconds must be positive|-1"),
    option("a tempo from high to low", '--data.tempo "[1.1, 0.9]"', "data.tempo must be a positive range|[1.1, 0.9]"),
    option("a tempo of 0", '--data.tempo "[0, 1]"', "data.tempo must be a positive range|[0.0, 1.0]"),
    option("a tempo of NaN", '--data.tempo "[.nan, 1]"', "data.tempo must be a positive range|nan"),
    option("an unknown speaker", '--data.valid_speakers "[zoe]"', "data.valid_speakers not in the training set: zoe"),
    option("all speakers", '--data.valid_speakers "[a, b]"', "data.valid_speakers leaves nothing to train on"),
    option("mixing for pairs", "--data.mix.examples 10", "has training pairs, nothing to mix|data.mix"),
    option("an unknown preset", "--model.preset huge", "model.preset must be one of base, large, small|'huge'"),
    option("an unknown argument", "--model.arguments.colour 1", "model.arguments|colour"),
    option("an odd chunk", '--model.arguments "{hidden: 6, segment_len: 7}"', "model.arguments|segment_len|7"),
    option(
        "hidden as text", '--model.arguments "{hidden: six}"', "model.arguments|hidden must be a positive integer|'six'"
    ),
    option(
        "hidden below 0", '--model.arguments "{hidden: -6}"', "model.arguments|hidden must be a positive integer|-6"
    ),
    option("too few channels", '--model.arguments "{hidden: 4}"', "model.arguments|at least 6 channels|4"),
    option(
        "a depth of a million", '--model.arguments "{hidden: 6, depth: 1000000}"', "model.arguments|depth = 1000000"
    ),
    option("no model", '--model.arguments "{}"', "name model.preset, or model.arguments"),
    option("a teacher with transfer", "--transfer.method mvat", "a teacher is trained on its own|train.distill"),
    Case("mixing without a number", f"{TEACHER} base.yaml --data.path mixed", "data.mix.examples"),
    Case(
        "hiss in what is mixed",
        f"{TEACHER} base.yaml --data.path mixed --data.mix.examples 4 --data.hiss_share 0.5",
        "data.hiss_share",
    ),
    Case(
        "remixing what is mixed",
        f"{TEACHER} base.yaml --data.path mixed --data.mix.examples 4 --data.remix_share 0.5",
        "data.remix_share",
    ),
    Case("no mixtures", f"{TEACHER} base.yaml --data.path mixed --data.mix.examples 0", "data.mix|positive"),
    Case(
        "an SNR from high to low",
        f'{TEACHER} base.yaml --data.path mixed --data.mix.examples 4 --data.mix.snr "[20, 0]"',
        "data.mix|snr must be a range|[20.0, 0.0]",
    ),
    Case(
        "an SNR of NaN",
        f'{TEACHER} base.yaml --data.path mixed --data.mix.examples 4 --data.mix.snr "[.nan, 0]"',
        "data.mix|snr must be a range|nan",
    ),
    Case(
        "a level above full scale",
        f'{TEACHER} base.yaml --data.path mixed --data.mix.examples 4 --data.mix.level "[-10, 3]"',
        "data.mix|level must be at most 0 dB|3.0",
    ),
    Case(
        "reverberation without rooms",
        f"{TEACHER} base.yaml --data.path mixed --data.mix.examples 4 --data.mix.reverb_share 0.5",
        "data.mix|reverb_share 0.5 needs impulse responses",
    ),
    Case(
        "a share above 1",
        f"{TEACHER} base.yaml --data.path mixed --data.mix.examples 4 --data.mix.reverb_share 2",
        "data.mix|reverb_share must be between 0 and 1|2",
    ),
    Case(
        "speakers to hold out of what is mixed",
        f'{TEACHER} base.yaml --data.path mixed --data.mix.examples 4 --data.valid_speakers "[a]"',
        "data.valid_speakers is for pairs",
    ),
)


def saved(**arguments: Any) -> Callable[[Path], object]:
    """A maker: teacher.pt, a model of these arguments."""

    def make(folder: Path) -> None:
        model = mvat.Manner(**{"hidden": 6, "depth": 1, "segment_len": 8, **arguments})
        torch.save({"state_dict": model.state_dict(), "model_config": model.config}, folder / "teacher.pt")

    return make


TEACHERS = (
    Case("none", f"{DISTILL} --transfer.method mvat", 'transfer.method "mvat" needs transfer.teacher'),
    Case("an unknown method", f"{DISTILL} --transfer.method magic", "transfer.method|magic"),
    transfer("a file that is not there", "--transfer.teacher gone.pt", "gone.pt does not exist"),
    transfer("a text", "--transfer.teacher precious.txt", "precious.txt|not a readable checkpoint"),
    transfer("a data folder", "--transfer.teacher data", "data/config.json does not exist"),
    transfer("an empty name", "--transfer.teacher ''", "name is empty"),
    transfer(
        "a deeper teacher without pairs",
        "--transfer.teacher teacher.pt",
        "the student has 2 multi-view blocks and the teacher 4|name the pairs",
        saved(depth=2),
    ),
    transfer("a pair of too few", '--transfer.pairs "[[0]]"', "transfer.pairs"),
    transfer("a pair out of range", '--transfer.pairs "[[0, 7]]"', "pair (0, 7) does not exist"),
    transfer("a pair below 0", '--transfer.pairs "[[-1, 0]]"', "pair (-1, 0) does not exist"),
    transfer("pairs in words", "--transfer.pairs all", "transfer.pairs|all"),
    transfer(
        "an unknown view",
        '--transfer.views "[global]"',
        "views must be a sequence of some of channel, global_, local|global",
    ),
    transfer("no view", '--transfer.views "[]"', "views must be a sequence of some of|[]"),
    transfer("a view in place of a list", "--transfer.views local", "transfer.views|local"),
    transfer("a power below 1", "--transfer.p 0.5", "p must be finite and at least 1|0.5"),
    transfer("a power of NaN", "--transfer.p .nan", "p must be finite and at least 1|nan"),
    transfer("a weight below 0", "--transfer.weight=-1", "transfer.weight must be 0 or more|-1"),
    transfer("a weight of NaN", "--transfer.weight .nan", "transfer.weight must be 0 or more|nan"),
    transfer("an unknown form", "--transfer.form book", "transfer.form|book"),
)


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A maker: the data set's manifest after a change."""

    def make(folder: Path) -> None:
        path = folder / "data/manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


def data(given: str, words: str, make: Callable[[Path], object], options: str = "") -> Case:
    return Case(given, f"{TEACHER} base.yaml {options}".rstrip(), words, make)


def twice(content: dict[str, Any]) -> None:
    content["train"].append(content["train"][0])


def noisy(channels: int = 1, rate: int = 16000, frames: int = 4800) -> Callable[[Path], object]:
    """A maker: other noisy recordings to train on."""
    return lambda folder: [tone(folder / name, frames, rate, channels) for name in NOISY]


NOISY = tuple(f"data/train/noisy/{name}.wav" for name in ("a_1", "a_2", "b_1"))
MIXED = "--data.path mixed --data.mix.examples 4"

DATA = (
    Case("a folder that is not there", f"{TEACHER} base.yaml --data.path gone", "gone: no such manifest|train.prepare"),
    Case("an empty folder", f"{TEACHER} base.yaml --data.path e", "e/manifest.json: no such manifest", folders("e")),
    Case("a text", f"{TEACHER} base.yaml --data.path precious.txt", "precious.txt|as JSON"),
    Case("a recording", f"{TEACHER} base.yaml --data.path in.wav", "in.wav|as JSON"),
    data("an empty manifest", "data/manifest.json|as JSON", written("", "data/manifest.json")),
    data("half a manifest", "data/manifest.json|as JSON", written('{"format": "mvat', "data/manifest.json")),
    data("a list as manifest", "data/manifest.json|format 'mvat-manifest-1'", written("[]", "data/manifest.json")),
    data("another format", "data/manifest.json|format 'mvat-manifest-1'", manifest(lambda m: m.update(format="x-2"))),
    data("another rate", "sample_rate must be 16000|8000", manifest(lambda m: m.update(sample_rate=8000))),
    data("an unknown source", "source must be one of voicebank|'moon'", manifest(lambda m: m.update(source="moon"))),
    data("a list as source", "source must be one of voicebank|['dns']", manifest(lambda m: m.update(source=["dns"]))),
    data("a split that is no list", "'train' must be a list", manifest(lambda m: m.update(train={}))),
    data("a split that is missing", "'train' must be a list", manifest(lambda m: m.pop("train"))),
    data("a pair that is a text", "train[0] must be an object", manifest(lambda m: m.update(train=["a_1"]))),
    data("a pair without a name", "train[0]: 'name' must be a text", manifest(lambda m: m["train"][0].pop("name"))),
    data(
        "frames as text",
        "train[0]: 'frames' must be a positive integer|'4800'",
        manifest(lambda m: m["train"][0].update(frames="4800")),
    ),
    data(
        "frames below 0",
        "train[0]: 'frames' must be a positive integer|-5",
        manifest(lambda m: m["train"][0].update(frames=-5)),
    ),
    data(
        "frames as True",
        "train[0]: 'frames' must be a positive integer|True",
        manifest(lambda m: m["train"][0].update(frames=True)),
    ),
    data("a path as number", "train[0]: 'clean' must be a text|3", manifest(lambda m: m["train"][0].update(clean=3))),
    data("a name given twice", "train names 'a_1' more than once", manifest(twice)),
    data(
        "a recording that is gone", "1 files are missing|data/train/noisy/a_1.wav", removed("data/train/noisy/a_1.wav")
    ),
    data("all recordings gone", "10 files are missing", removed("data/train", "data/valid", "data/test")),
    data("no pairs to train on", "train", manifest(lambda m: m.update(train=[]))),
    data(
        "no pairs to validate on",
        "has no validation set; name data.valid_speakers",
        manifest(lambda m: m.update(valid=[])),
    ),
    data(
        "a recording too short to validate on",
        "c_1 is too short to validate on",
        manifest(lambda m: m["valid"][0].update(frames=100)),
    ),
    data("texts as recordings", "data/train/noisy/a_1.wav: no readable audio", written("text\n", *NOISY)),
    data("stereo recordings", "data/train/noisy/a_1.wav: expected 16000 Hz mono|2 channels", noisy(channels=2)),
    data("recordings at 8 kHz", "data/train/noisy/a_1.wav: expected 16000 Hz mono|got 8000 Hz", noisy(rate=8000)),
    data("recordings shorter than listed", "data/train/noisy/a_1.wav|the file has 100", noisy(frames=100)),
    data(
        "texts as recordings, a folder in folders",
        "data/train/noisy/a_1.wav: no readable audio",
        written("text\n", *NOISY),
        "--out new/deep/run",
    ),
    data("all speech gone", "mixed/clean/a.wav: no such file", removed("mixed/clean"), MIXED),
    data("no list of recordings", "recordings.csv is missing", removed("mixed/recordings.csv"), MIXED),
    data(
        "a list as name of the list",
        "mixed/manifest.json: recordings must be the name of a file|[1]",
        replaced("mixed/manifest.json", ('"recordings.csv"', "[1]")),
        MIXED,
    ),
    data("an empty list of recordings", "data.mix|no clean speech to mix", written("", "mixed/recordings.csv"), MIXED),
    data(
        "a list of no noise",
        "data.mix|no noise to mix",
        replaced("mixed/recordings.csv", ("\nnoise,", "\nrir,")),
        MIXED,
    ),
    data(
        "an unknown role",
        "mixed/recordings.csv:3|'song'",
        replaced("mixed/recordings.csv", ("\nnoise,", "\nsong,")),
        MIXED,
    ),
    data(
        "a column too few",
        "mixed/recordings.csv:2|expected role, path",
        replaced("mixed/recordings.csv", (",16000,16000,1,a\nnoise", ",16000\nnoise")),
        MIXED,
    ),
    data(
        "a frame count in words",
        "mixed/recordings.csv:2|'many'",
        replaced("mixed/recordings.csv", ("clean/a.wav,16000", "clean/a.wav,many")),
        MIXED,
    ),
)


def other_run(folder: Path) -> None:
    """A run's folder whose configuration is not this one's."""
    last(config={"seed": 2}, updates=9)(folder)


def last(**content: Any) -> Callable[[Path], object]:
    """A maker: a run's folder with a checkpoint of which this alone is not None."""

    def make(folder: Path) -> None:
        (folder / "run").mkdir()
        checkpoint.save(folder / "run/last.pt", dict.fromkeys(checkpoint.KEYS) | content)

    return make


def without_keys(folder: Path) -> None:
    """A run's folder with a checkpoint of the right format that holds nothing."""
    (folder / "run").mkdir()
    torch.save({"format": checkpoint.FORMAT}, folder / "run/last.pt")


RUNS = (
    data("a file", "precious.txt", nothing, "--out precious.txt"),
    data("below a file", "precious.txt/run", nothing, "--out precious.txt/run"),
    data("a name of 300 letters", "name too long", nothing, f"--out {'n' * 300}"),
    data("a folder with an empty checkpoint", "run/last.pt|empty", written("", "run/last.pt")),
    data("a folder with a text as checkpoint", "run/last.pt|not a readable checkpoint", written("text", "run/last.pt")),
    data(
        "a folder with a model as checkpoint",
        "run/last.pt|format",
        lambda folder: [
            (folder / "run").mkdir(),
            (folder / "run/last.pt").write_bytes((folder / "best.pt").read_bytes()),
        ],
    ),
    data("a folder with a checkpoint of nothing", "run/last.pt: damaged: no 'model_config'", without_keys),
    data("a folder with a checkpoint without values", "run/last.pt: damaged", last()),
    data(
        "the folder of a model that is no run's",
        ".: holds a best.pt that is no run's and would be overwritten; choose another out",
        nothing,
        "--out .",
    ),
    data(
        "a folder with another run",
        "run: holds a run of another configuration (data|choose another out",
        other_run,
    ),
    Case(
        "a folder that may not be written to",
        f"{TEACHER} base.yaml --out closed/run",
        "closed/run|Permission denied",
        all_of(folders("closed"), lambda folder: (folder / "closed").chmod(0o555)),
        unprivileged=True,
    ),
)

GROUPS = {
    "Configuration files": FILES,
    "Settings of a training": VALUES,
    "A student's teacher": TEACHERS,
    "Data to train on": DATA,
    "The run's folder": RUNS,
}
