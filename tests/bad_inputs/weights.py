"""Checkpoints and folders of weights, for `mvat enhance` and `mvat export`."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import mvat
from tests.bad_inputs import Case, folders, removed, written
from tests.bad_inputs.scene import ARGUMENTS


class Code:
    """Unpickling it would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_run"),)


def torch_file(content: Any) -> Callable[[Path], object]:
    """A maker: bad.pt as PyTorch saves it."""
    return lambda folder: torch.save(content() if callable(content) else content, folder / "bad.pt")


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A maker: bad.pt is the scene's checkpoint after a change to its dictionary."""

    def make(folder: Path) -> None:
        content = torch.load(folder / "best.pt", weights_only=True)
        change(content)
        torch.save(content, folder / "bad.pt")

    return make


def state(change: Callable[[dict[str, Any]], object], official: bool = False) -> Callable[[Path], object]:
    """A maker: bad.pt has a changed state_dict; an official checkpoint has no configuration beside it."""

    def both(content: dict[str, Any]) -> None:
        change(content["state_dict"])
        if official:
            del content["model_config"]

    return changed(both)


def configured(**arguments: Any) -> Callable[[Path], object]:
    """A maker: bad.pt has other arguments in its configuration."""
    return changed(lambda content: content["model_config"].update(arguments))


def settings(**arguments: Any) -> Callable[[Path], object]:
    """A maker: the model's folder has other arguments in its configuration."""

    def make(folder: Path) -> None:
        content = {"architecture": "Manner", "sample_rate": 16000, "arguments": {**ARGUMENTS, **arguments}}
        (folder / "model/config.json").write_text(json.dumps(content))

    return make


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A maker: the model's folder has changed weights."""

    def make(folder: Path) -> None:
        values = load_file(folder / "model/model.safetensors")
        change(values)
        save_file(values, folder / "model/model.safetensors")

    return make


def clipped(source: str, target: str, keep: float) -> Callable[[Path], object]:
    """A maker: the first part of a file of the scene."""

    def make(folder: Path) -> None:
        content = (folder / source).read_bytes()
        (folder / target).write_bytes(content[: int(keep * len(content))])

    return make


def spoiled(folder: Path) -> None:
    """A checkpoint with other bytes in the middle."""
    content = bytearray((folder / "best.pt").read_bytes())
    content[2000:12000] = b"\x5a" * 10000
    (folder / "bad.pt").write_bytes(content)


def empty_zip(folder: Path) -> None:
    """A ZIP file that is no checkpoint."""
    with zipfile.ZipFile(folder / "bad.pt", "w") as file:
        file.writestr("hello.txt", "hello")


def nan_weight(values: dict[str, torch.Tensor]) -> None:
    values["manner_block.in_conv.0.weight"].fill_(float("nan"))


def narrow(values: dict[str, torch.Tensor]) -> None:
    values["manner_block.linear.0.weight"] = torch.zeros(3, 3)


ENHANCE = "mvat enhance in.wav -o out.wav --checkpoint"
KEY = "manner_block.in_conv.0.bias"


def file(given: str, words: str, make: Callable[[Path], object]) -> Case:
    return Case(given, f"{ENHANCE} bad.pt", f"bad.pt|{words}", make)


def model(given: str, words: str, make: Callable[[Path], object]) -> Case:
    return Case(given, f"{ENHANCE} model", f"model|{words}", make)


CHECKPOINTS = (
    Case("a file that is not there", f"{ENHANCE} gone.pt", "gone.pt does not exist"),
    Case("a folder that is not there", f"{ENHANCE} runs/gone/deep", "runs/gone/deep does not exist"),
    Case("an empty name", f"{ENHANCE} ''", "name is empty"),
    file("an empty file", "empty", written("", "bad.pt")),
    file("a text", "not a readable checkpoint", written("no weights\n", "bad.pt")),
    Case("a recording", f"{ENHANCE} in.wav", "in.wav|not a readable checkpoint"),
    file("random bytes", "not a readable checkpoint", written(bytes(range(1, 256)) * 9, "bad.pt")),
    file("half a checkpoint", "not a readable checkpoint|cut, damaged", clipped("best.pt", "bad.pt", 0.5)),
    file("all but the last byte", "not a readable checkpoint", clipped("best.pt", "bad.pt", 0.99999)),
    file("wrong bytes in the middle", "damaged", spoiled),
    file("a ZIP file of texts", "not a readable checkpoint", empty_zip),
    file(
        "a safetensors file named .pt",
        "is a safetensors file|give the folder",
        clipped("model/model.safetensors", "bad.pt", 1),
    ),
    file("a pickle that would run code", "refused to load|Python objects", torch_file(lambda: {"state_dict": Code()})),
    file(
        "a bare pickle that would run code",
        "refused to load",
        lambda folder: (folder / "bad.pt").write_bytes(pickle.dumps(Code())),
    ),
    file("a whole model", "refused to load|Python objects", torch_file(lambda: mvat.Manner(**ARGUMENTS))),
    file("a tensor", "holds a Tensor instead of a dictionary", torch_file(torch.zeros(3))),
    file("a list", "holds a list instead of a dictionary", torch_file([1, 2])),
    file("an empty dictionary", 'no "state_dict" of tensors', torch_file({})),
    file("weights without a name", 'no "state_dict" of tensors', torch_file({"a": torch.zeros(3)})),
    file("a list as state_dict", 'no "state_dict" of tensors', torch_file({"state_dict": [1]})),
    file("a number among the weights", 'no "state_dict" of tensors', torch_file({"state_dict": {"a": 1}})),
    file("weights by number", 'no "state_dict" of tensors', torch_file({"state_dict": {1: torch.zeros(1)}})),
    file("no weights, no configuration", "not those of a MANNER", torch_file({"state_dict": {}})),
    file(
        "another network",
        "not those of a MANNER",
        torch_file(lambda: {"state_dict": torch.nn.Linear(2, 2).state_dict()}),
    ),
    file("a missing weight", f"1 missing (such as {KEY})", state(lambda s: s.pop(KEY))),
    file("a weight too many", "1 unexpected (such as more)", state(lambda s: s.update(more=torch.zeros(1)))),
    file("a weight of another shape", "[3, 3] instead of", state(narrow)),
    file(
        "a weight of integers",
        "of another kind|int64 instead of torch.float32",
        state(lambda s: s.update({KEY: s[KEY].long()})),
    ),
    file("a complex weight", "of another kind|complex64", state(lambda s: s.update({KEY: s[KEY].to(torch.complex64)}))),
    file("a NaN among the weights", "NaN or infinity|manner_block.in_conv.0.weight", state(nan_weight)),
    file(
        "a weight beyond single precision",
        f"1 weights hold NaN or infinity in torch.float32 (such as {KEY}",
        state(lambda s: s.update({KEY: s[KEY].double().fill_(1e300)})),
    ),
    file("a sparse weight", f"not stored in full (such as {KEY}", state(lambda s: s.update({KEY: s[KEY].to_sparse()}))),
    file("official, a missing weight", "missing", state(lambda s: s.pop(KEY), official=True)),
    file(
        "official, a level without its name",
        "not those of a MANNER",
        state(lambda s: s.update({"manner_block.encoder.x.weight": torch.zeros(1)}), official=True),
    ),
    file(
        "official, no input",
        "not those of a MANNER",
        state(lambda s: s.pop("manner_block.in_conv.0.weight"), official=True),
    ),
    file(
        "official, a flat input",
        "not those of a MANNER",
        state(lambda s: s.update({"manner_block.in_conv.0.weight": torch.zeros(3)}), official=True),
    ),
    file("hidden as text", "hidden must be a positive integer|'6'", configured(hidden="6")),
    file("hidden as a fraction", "hidden must be a positive integer|6.5", configured(hidden=6.5)),
    file("hidden as True", "hidden must be a positive integer|True", configured(hidden=True)),
    file("hidden below 1", "hidden must be a positive integer|-6", configured(hidden=-6)),
    file("a depth of nothing", "depth must be a positive integer|None", configured(depth=None)),
    file("another depth", "missing", configured(depth=2)),
    file("a depth of a million", "2 ** depth|depth = 1000000", configured(depth=10**6)),
    file("other channels", "of another shape", configured(hidden=8)),
    file("an odd chunk", "segment_len must be an even integer|7", configured(segment_len=7)),
    file("unknown layers", 'attention_layers must be "all" or "deepest"|some', configured(attention_layers="some")),
    file("an unknown argument", "does not fit Manner|colour", configured(colour=1)),
    file(
        "a list as configuration",
        '"model_config" must be a dictionary|list',
        changed(lambda c: c.update(model_config=[1])),
    ),
    file(
        "an argument without a name", "does not fit Manner|strings", changed(lambda c: c["model_config"].update({1: 2}))
    ),
    file("growth of 3", "growth must be 2|3", configured(growth=3)),
    file("two channels of audio", "another shape", configured(in_channels=2)),
)

FOLDERS = (
    Case("an empty folder", f"{ENHANCE} empty", "empty/config.json does not exist", folders("empty")),
    Case("a folder of something else", f"{ENHANCE} data", "data/config.json does not exist"),
    model("no weights", "model.safetensors does not exist", removed("model/model.safetensors")),
    model("no configuration", "config.json does not exist", removed("model/config.json")),
    model("an empty configuration", "config.json|expected JSON", written("", "model/config.json")),
    model("a text as configuration", "config.json|expected JSON", written("hello", "model/config.json")),
    model("bytes as configuration", "config.json|expected JSON", written(b"\xff\xfe", "model/config.json")),
    model("a list as configuration", 'config.json|"arguments"', written("[1]", "model/config.json")),
    model("no arguments", 'config.json|"arguments"', written("{}", "model/config.json")),
    model("a text as arguments", 'config.json|"arguments"', written('{"arguments": "no"}', "model/config.json")),
    model("lists in lists without end", 'config.json|"arguments"', written("[" * 200_000, "model/config.json")),
    model(
        "another rate",
        "config.json|sample_rate must be 16000, got 48000",
        written('{"sample_rate": 48000, "arguments": {}}', "model/config.json"),
    ),
    model(
        "another architecture",
        "config.json|architecture must be 'Manner', got 'Demucs'",
        written('{"architecture": "Demucs", "arguments": {}}', "model/config.json"),
    ),
    Case(
        "a name of 5000 letters",
        "mvat.Manner.from_pretrained('a' * 5000)",
        "a name of 5000 characters is too long",
        error=ValueError,
    ),
    model("half the weights", "safetensors", clipped("model/model.safetensors", "model/model.safetensors", 0.5)),
    model("empty weights", "safetensors", written("", "model/model.safetensors")),
    model("a text as weights", "safetensors", written("hello world" * 9, "model/model.safetensors")),
    model("a header of 2^60 bytes", "safetensors", written(b"\0" * 7 + b"\x10" + b"{}", "model/model.safetensors")),
    model("a missing weight", "1 missing", tensors(lambda s: s.pop(KEY))),
    model("a weight of another shape", "[3, 3] instead of", tensors(narrow)),
    model("an infinite weight", "NaN or infinity", tensors(lambda s: s[KEY].fill_(float("inf")))),
    model(
        "half precision written as integers",
        "of another kind|int32 instead of torch.float32",
        tensors(lambda s: s.update({KEY: s[KEY].int()})),
    ),
    model("hidden as text", "hidden must be a positive integer", settings(hidden="6")),
    model("a stride above the kernel", "stride must be at most kernel_size", settings(stride=9)),
    model("an unknown argument", "does not fit Manner|colour", settings(colour=1)),
    model("too few channels", "at least 6 channels", settings(hidden=4)),
    model("NaN in the configuration", "hidden must be a positive integer", settings(hidden=float("nan"))),
    Case(
        "a file as model to write",
        "mvat.Manner(hidden=6, depth=1).save_pretrained('precious.txt')",
        "precious.txt|is a file",
        error=FileExistsError,
    ),
    Case(
        "weights stored as integers",
        "mvat.Manner(hidden=6, depth=1).save_pretrained('model', dtype=torch.int8)",
        "dtype|torch.float16|torch.int8",
        error=ValueError,
    ),
    Case(
        "weights stored by the name of a dtype",
        "mvat.Manner(hidden=6, depth=1).save_pretrained('model', dtype='float16')",
        "dtype|str",
        error=TypeError,
    ),
    Case("a number as model to read", "mvat.Manner.from_pretrained(3)", "source|int", error=TypeError),
    Case("nothing as model to read", "mvat.Manner.from_pretrained(None)", "source|NoneType", error=TypeError),
    Case("an empty name to read", "mvat.Manner.from_pretrained('')", "name is empty", error=ValueError),
    Case("an unknown preset", "mvat.Manner.from_preset('huge')", "base, large, small|'huge'", error=ValueError),
    Case("a list as preset", "mvat.Manner.from_preset(['base'])", "base, large, small|['base']", error=ValueError),
    Case(
        "a named pipe",
        f"{ENHANCE} pipe",
        "pipe|no regular file",
        lambda folder: __import__("os").mkfifo(folder / "pipe"),
    ),
    Case("a device", f"{ENHANCE} /dev/zero", "/dev/zero|no regular file"),
)

EXPORT = "mvat export --checkpoint model"
EXPORTS = (
    Case("no format", f"{EXPORT} -o m.pt2", "--format"),
    Case("an unknown format", f"{EXPORT} --format tflite -o m.tflite", "pt2, aoti, onnx|'tflite'"),
    Case("no output", f"{EXPORT} --format pt2", "-o/--out"),
    Case("another suffix", f"{EXPORT} --format onnx -o m.pt2", "m.pt2|must end in .onnx"),
    Case("no suffix", f"{EXPORT} --format pt2 -o m", "m: |must end in .pt2"),
    Case("an empty name", f"{EXPORT} --format pt2 -o ''", "must end in .pt2"),
    Case("a folder that is not there", f"{EXPORT} --format pt2 -o gone/m.pt2", "gone/m.pt2|gone does not exist"),
    Case("a folder in the place of the file", f"{EXPORT} --format pt2 -o m.pt2", "m.pt2 is a folder", folders("m.pt2")),
    Case("a file that exists", f"{EXPORT} --format pt2 -o m.pt2", "m.pt2 exists|--overwrite", written("x", "m.pt2")),
    Case("below a file", f"{EXPORT} --format pt2 -o in.wav/m.pt2", "the folder in.wav does not exist"),
    Case("a name of 300 letters", f"{EXPORT} --format pt2 -o {'n' * 300}.pt2", "name too long"),
    Case(
        "a model that is not there", "mvat export --format pt2 -o m.pt2 --checkpoint gone.pt", "gone.pt does not exist"
    ),
    Case("an unknown preset", "mvat export --format pt2 -o m.pt2 --preset huge", "base, large, small|'huge'"),
    Case("two models", f"{EXPORT} --preset base --format pt2 -o m.pt2", "--preset|not allowed with"),
    Case("0 seconds", f"{EXPORT} --format pt2 -o m.pt2 --seconds 0", "--seconds|'0'"),
    Case("seconds in words", f"{EXPORT} --format pt2 -o m.pt2 --seconds four", "--seconds|'four'"),
    Case("two hundred million seconds", f"{EXPORT} --format pt2 -o m.pt2 --seconds 2e8", "--seconds|'2e8'"),
    Case(
        "a module",
        "mvat.export.export_model(same, 'm.pt2', 'pt2')",
        "model must be a mvat.Manner|Identity",
        error=TypeError,
    ),
    Case(
        "a model in training",
        "mvat.export.export_model(mvat.Manner(hidden=6, depth=1), 'm.pt2', 'pt2')",
        "training mode",
        error=ValueError,
    ),
    Case(
        "a model in float64",
        "mvat.export.export_model(mvat.Manner(hidden=6, depth=1).double().eval(), 'm.pt2', 'pt2')",
        "float32|float64",
        error=ValueError,
    ),
    Case(
        "no samples",
        "mvat.export.export_model(mvat.Manner(hidden=6, depth=1).eval(), 'm.pt2', 'pt2', 0)",
        "samples must be a positive integer|0",
        error=ValueError,
    ),
)

GROUPS = {"Checkpoints": CHECKPOINTS, "Folders of weights": FOLDERS, "Exports": EXPORTS}
