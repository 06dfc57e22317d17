import argparse
import ast
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mvat.models import Manner
from mvat.models.pretrained import read_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"hidden": 6, "depth": 2, "segment_len": 8}


@pytest.fixture(scope="module")
def model() -> Manner:
    model = Manner(**TINY)
    model(torch.randn(2, 1, 200))  # so that the running statistics are not those of a new model
    return model.eval()


@pytest.fixture
def folder(model: Manner, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(model: Manner, tmp_path: Path) -> Path:
    torch.save({"state_dict": model.state_dict()}, tmp_path / "official.pth")
    return tmp_path / "official.pth"


def assert_equal(got: Manner, expected: Manner) -> None:
    assert not got.training and got.config == expected.config
    ours, theirs = got.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_round_trip(model: Manner, folder: Path) -> None:
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    content = json.loads((folder / "config.json").read_text())
    assert content["arguments"] == model.config and content["sample_rate"] == 16_000
    assert_equal(Manner.from_pretrained(folder), model)
    assert_equal(Manner.from_pretrained(str(folder)), model)


def test_saving_over_another_model_and_into_a_new_folder(model: Manner, folder: Path) -> None:
    other = Manner(hidden=7, depth=1, segment_len=8).eval()
    other.save_pretrained(folder)
    assert_equal(Manner.from_pretrained(folder), other)
    other.save_pretrained(str(folder / "deep" / "deeper"))
    assert_equal(Manner.from_pretrained(folder / "deep" / "deeper"), other)


CONFIGURATIONS = [
    {"hidden": 8, "depth": 1, "segment_len": 6, "attention_layers": "deepest"},
    {"hidden": 6, "depth": 3, "segment_len": 8, "head": 2},
    {"hidden": 3, "depth": 2, "segment_len": 8, "head": 3, "attention_layers": "deepest"},
    {"hidden": 6, "depth": 2, "kernel_size": 6, "stride": 3, "segment_len": 8},
    {"in_channels": 2, "out_channels": 3, "hidden": 6, "depth": 2, "segment_len": 4},
]


@pytest.mark.parametrize("config", CONFIGURATIONS)
@pytest.mark.parametrize("zipped", [True, False])
def test_official_checkpoints_tell_their_architecture(config: dict, zipped: bool, tmp_path: Path) -> None:
    model = Manner(**config).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    loaded = Manner.from_pretrained(tmp_path / "a.pth")
    # With one level "all" and "deepest" are the same network.
    assert_equal(loaded, model)


def test_official_weights_give_the_golden_output(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    golden = make.read(GOLDEN / "deepest_h7_head2.npz")
    state = {
        k.removeprefix("state/"): torch.from_numpy(np.asarray(v)) for k, v in golden.items() if k.startswith("state/")
    }
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    model = Manner.from_pretrained(tmp_path / "official.pth")
    assert model.config | ast.literal_eval(str(golden["config"])) == model.config
    with torch.no_grad():
        y = model(torch.from_numpy(golden["x"]).float())
    expected = torch.from_numpy(golden["y_eval"])
    assert (y - expected).norm() <= 1e-5 * expected.norm()


def test_a_checkpoint_with_its_configuration(model: Manner, tmp_path: Path) -> None:
    config = {"hidden": 6, "depth": 2, "kernel_size": 8, "stride": 3, "segment_len": 8}  # a stride no weight tells
    torch.save({"state_dict": model.state_dict(), "model_config": config}, tmp_path / "best.pt")
    assert Manner.from_pretrained(tmp_path / "best.pt").config["stride"] == 3


class Code:
    """A pickle that would run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_does_not_run(model: Manner, zipped: bool, tmp_path: Path) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "it_ran"
    torch.save({"state_dict": model.state_dict(), "extra": Code(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"evil.pth: refused to load the checkpoint: .* holds Python objects"
    ) as caught:
        Manner.from_pretrained(file)
    assert not trace.exists() and "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_python_objects_are_refused(model: Manner, tmp_path: Path) -> None:
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(a=1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: refused to load the checkpoint: .* holds Python objects"):
        read_checkpoint(tmp_path / "a.pth")


def one_line(error: pytest.ExceptionInfo, path: Path) -> None:
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 1e-5, 0.001, 0.5, 0.999])
def test_a_cut_file(model: Manner, zipped: bool, kept: float, tmp_path: Path) -> None:
    file = tmp_path / "cut.pth"
    torch.save({"state_dict": model.state_dict()}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError) as caught:
        Manner.from_pretrained(file)
    one_line(caught, file)


@pytest.mark.parametrize("content", [b"hello world, no checkpoint", b"\0" * 100, b"RIFF\x10\0\0\0WAVEfmt "])
def test_a_foreign_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "foreign.pt").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Manner.from_pretrained(tmp_path / "foreign.pt")
    one_line(caught, tmp_path / "foreign.pt")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: [c], "not a checkpoint: it holds a list instead of a dictionary"),
        (lambda c: c["state_dict"], 'it has no "state_dict" of tensors'),
        (lambda c: {"state_dict": 5}, 'it has no "state_dict" of tensors'),
        (lambda c: {"state_dict": {1: torch.ones(1)}}, 'it has no "state_dict" of tensors'),
        (lambda c: {"state_dict": {"a": 1}}, 'it has no "state_dict" of tensors'),
        (lambda c: {"state_dict": {}}, "the weights are not those of a MANNER network"),
        (lambda c: {"state_dict": {"layer.weight": torch.ones(1)}}, "the weights are not those of a MANNER network"),
        (
            lambda c: (
                c["state_dict"].update({"manner_block.encoder.1.attn_block.global_attn.w_qs.weight": torch.ones(5, 0)})
                or c
            ),
            "the weights are not those of a MANNER network",
        ),
        (
            lambda c: c["state_dict"].pop("manner_block.decoder.0.up_conv.0.bias") is None or c,
            r"do not fit the model: 1 missing \(such as manner_block.decoder.0.up_conv.0.bias\)",
        ),
        (
            lambda c: c["state_dict"].update({"manner_block.extra": torch.ones(1)}) or c,
            r"do not fit the model: 1 unexpected \(such as manner_block.extra\)",
        ),
        (
            lambda c: c["state_dict"].update({"manner_block.linear.0.weight": torch.ones(24, 25)}) or c,
            r"1 of another shape \(such as manner_block.linear.0.weight: \[24, 25\] instead of \[24, 24\]\)",
        ),
        (lambda c: c | {"model_config": {"hidden": 7, "depth": 2}}, r"of another shape \(such as"),
        (lambda c: c | {"model_config": {"hidden": 6, "width": 2}}, "unexpected keyword argument 'width'"),
        (lambda c: c | {"model_config": {"hidden": "6"}}, "hidden must be a positive integer, got '6'"),
        (lambda c: c | {"model_config": {6: "hidden"}}, "the configuration does not fit Manner"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, message: str, checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save(change(content), checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        Manner.from_pretrained(checkpoint)
    one_line(caught, checkpoint)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder(missing: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} does not exist; a model's folder holds config.json and"):
        Manner.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"arguments": [1]}', '{"arguments": null}', "\udcff"])
def test_a_broken_configuration(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match="config.json: not a model's configuration: expected JSON") as caught:
        Manner.from_pretrained(folder)
    one_line(caught, folder / "config.json")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden": 6, "layers": 3}, "the configuration does not fit Manner: .*unexpected keyword argument 'layers'"),
        ({"hidden": 6, "depth": "2"}, "the configuration does not fit Manner: depth must be a positive integer"),
        ({"hidden": 6, "depth": 3, "segment_len": 8}, "the weights do not fit the model: [0-9]+ missing"),
        ({"hidden": 6, "depth": 2, "segment_len": 10}, "of another shape .such as .*global_attn"),
    ],
)
def test_a_configuration_that_does_not_fit(arguments: dict, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(ValueError, match=message) as caught:
        Manner.from_pretrained(folder)
    one_line(caught, folder)


@pytest.mark.parametrize("kept", [0, 100, -10])
def test_cut_weights(kept: int, folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
        Manner.from_pretrained(folder)
    one_line(caught, weights)


@pytest.mark.parametrize("name", ["best.pt", "runs/best.pth", "./model", "/no/such/folder", "a/b/c", "~/model"])
def test_what_does_not_exist_and_can_be_no_hub_name(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=f"^{name} does not exist$"):
        Manner.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist$"):
        Manner.from_pretrained(tmp_path / "nowhere")


def test_a_hub_name_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        FileNotFoundError, match="somebody/manner does not exist; to load it from the .* hub, pip install"
    ):
        Manner.from_pretrained("somebody/manner")


def test_a_hub_name(model: Manner, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str]) -> str:
            if name != "somebody/manner":
                raise OSError("offline\nand much more")
            assert allow_patterns == ["config.json", "model.safetensors"]
            return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert_equal(Manner.from_pretrained("somebody/manner"), model)
    with pytest.raises(FileNotFoundError, match="nobody/manner is neither .* nor to be had from the hub: offline$"):
        Manner.from_pretrained("nobody/manner")


def test_an_unwritable_folder(model: Manner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    for target in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(OSError, match="file"):
            model.save_pretrained(target)
    assert (tmp_path / "file").read_text() == "keep me" and os.listdir(tmp_path) == ["file"]


def test_both_files_can_be_read_by_whoever_reads_other_new_files(model: Manner, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "new", *(tmp_path / "model").iterdir())}
    assert len(modes) == 1


@pytest.mark.parametrize("failing", ["pathlib.Path.write_bytes", "pathlib.Path.write_text", "os.replace"])
def test_a_failing_save_leaves_the_former_files_whole(
    failing: str, model: Manner, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        if failing.endswith("write_bytes"):
            with open(arguments[0], "wb") as file:
                file.write(b"half")
        raise OSError(28, "No space left on device")

    shutil.copytree(folder, tmp_path / "before")
    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        with pytest.raises(OSError, match="No space left on device"):
            Manner(hidden=7, depth=1, segment_len=8).save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    for name in os.listdir(folder):
        assert (folder / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert_equal(Manner.from_pretrained(folder), model)


def test_other_dtypes_and_layouts_load(model: Manner, tmp_path: Path) -> None:
    state = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state["manner_block.linear.0.weight"] = state["manner_block.linear.0.weight"].T.contiguous().T
    torch.save({"state_dict": state}, tmp_path / "half.pth")
    loaded = Manner.from_pretrained(tmp_path / "half.pth")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, p in loaded.named_parameters():
        assert torch.equal(p, state[name].float())


def test_weights_too_large_for_half_precision_are_refused_and_nothing_is_written(tmp_path: Path):
    model = Manner(hidden=6, depth=1)
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() > 1).fill_(1e5)
    with pytest.raises(ValueError, match=r"up to 1e\+05, too large for torch.float16"):
        model.save_pretrained(tmp_path / "model", dtype=torch.float16)
    assert not (tmp_path / "model").exists()


def test_half_precision_is_how_it_is_stored_not_how_it_runs(tmp_path: Path):
    model = Manner(hidden=6, depth=1).eval()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = Manner.from_pretrained(tmp_path)
    for (name, before), after in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        stored = before.half().float() if before.dim() > 1 else before
        assert after.dtype == before.dtype and torch.equal(after, stored), name
