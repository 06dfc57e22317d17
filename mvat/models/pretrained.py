"""Weights in and out: folders of config.json and model.safetensors, hub names, checkpoint files."""

import errno
import json
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvat.files import replacing
from mvat.models.presets import PRESETS

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
#: What a model's configuration says beside its arguments.
_KIND = {"architecture": "Manner", "sample_rate": 16_000}
#: What matrices may be stored in.
STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: The student that comes with the package; its card lies beside it.
SHIPPED = Path(__file__).parents[1] / "weights" / "s-8.1gf"


def load(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The configuration, the state_dict and a name for messages; see `Manner.from_pretrained`."""
    if not isinstance(source, str | Path):
        raise TypeError(f"from_pretrained: source must be a path or a name, got {type(source).__name__}")
    if source == "":
        raise ValueError("from_pretrained: the name is empty; the folder one is in is written as .")
    path = Path(source)
    try:
        if path.is_dir():
            return _load_folder(path)
        if path.is_file():
            return _load_checkpoint(path)
        if path.exists():
            raise ValueError(f"{path}: is no regular file")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ValueError(f"from_pretrained: a name of {len(str(source))} characters is too long") from None
    return _load_folder(_download(source))


def save(
    folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Write both files under temporary names, then rename them, so that a failure leaves the former ones whole.

    With a dtype the matrices are written in it; vectors (biases, norms and their statistics) keep their own.
    """
    from safetensors.torch import save as packed

    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"save_pretrained: dtype must be a torch.dtype or None, got {type(dtype).__name__}")
    if dtype is not None and dtype not in STORED:
        raise ValueError(f"save_pretrained: dtype must be one of {', '.join(map(str, STORED))}, got {dtype}")
    tensors = {name: _stored(name, value, dtype) for name, value in state.items()}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileExistsError(f"{folder}: is a file, expected a folder") from None
    text = json.dumps({**_KIND, "arguments": dict(config)}, indent=2)
    weights, settings = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    with replacing(settings) as new_settings, replacing(weights) as new_weights:
        # Its own way of writing files lets nobody but their owner read them.
        new_weights.write_bytes(packed(tensors))
        new_settings.write_text(text + "\n")


def _stored(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What is written of one tensor; ValueError where the dtype cannot hold its values."""
    value = value.detach().cpu().contiguous()
    if dtype is None or value.dim() < 2:
        return value
    stored = value.to(dtype)
    if not torch.equal(torch.isfinite(stored), torch.isfinite(value)):
        raise ValueError(f"save_pretrained: {name} holds values up to {value.abs().max():.3g}, too large for {dtype}")
    return stored


def check_fit(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """ValueError in one line that names the origin, unless the model can load the weights strictly and all are finite.

    The model may be on the meta device.
    """
    expected = model.state_dict()
    problems = []
    for kind, names in (("missing", expected.keys() - state.keys()), ("unexpected", state.keys() - expected.keys())):
        if names:
            problems.append(f"{len(names)} {kind} (such as {min(names)})")
    shapes = [n for n in sorted(expected.keys() & state.keys()) if expected[n].shape != state[n].shape]
    if shapes:
        n = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape (such as {n}: {list(state[n].shape)} instead of {list(expected[n].shape)})"
        )
    kinds = [n for n in expected if n in state and expected[n].is_floating_point() > state[n].is_floating_point()]
    if kinds:
        n = kinds[0]
        problems.append(f"{len(kinds)} of another kind (such as {n}: {state[n].dtype} instead of {expected[n].dtype})")
    if problems:
        raise ValueError(f"{origin}: the weights do not fit the model: {', '.join(problems)}")
    odd = [name for name, value in state.items() if value.layout != torch.strided or value.is_meta]
    if odd:
        raise ValueError(f"{origin}: {len(odd)} weights are not stored in full (such as {odd[0]})")
    wild = [name for name, value in state.items() if not torch.isfinite(value.to(expected[name].dtype)).all()]
    if wild:
        what = f"{len(wild)} weights hold NaN or infinity in {expected[wild[0]].dtype}"
        raise ValueError(f"{origin}: {what} (such as {wild[0]})")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint file's dictionary, loaded without running any code it may hold.

    Raises:
        ValueError: if it is no readable checkpoint or holds Python objects; names the file and the reason.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if not start:
        raise ValueError(f"{path}: is empty, expected a checkpoint")
    if start[8:] == b"{":
        raise ValueError(f"{path}: is a safetensors file; give the folder of {WEIGHTS_NAME} and {CONFIG_NAME}")
    unreadable = f"{path}: not a readable checkpoint: it is cut, damaged or of another kind"
    if not start.startswith((b"PK", b"\x80")):  # what torch.save writes: a ZIP, once a pickle
        raise ValueError(unreadable)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a foreign file; the error below is enough
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose own text recommends the unsafe way out
        reason = "it is damaged or holds Python objects other than tensors and plain values"
        raise ValueError(f"{path}: refused to load the checkpoint: {reason}") from None
    except Exception:  # torch.load raises many types for a cut or foreign file, few of them in plain words
        raise ValueError(unreadable) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(content).__name__} instead of a dictionary")
    return content


def _load_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    for path in (settings, weights):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; a model's folder holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        content = json.loads(settings.read_text())
        config = content["arguments"]
        config.keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f'{settings}: not a model\'s configuration: expected JSON with "arguments"') from None
    for key, value in _KIND.items():
        if content.get(key, value) != value:
            raise ValueError(f"{settings}: {key} must be {value!r}, got {content[key]!r}")
    try:
        with open(weights, "rb"):  # safetensors takes a file that may not be read for one that is missing
            state = load_file(weights)
    except OSError as error:
        raise ValueError(f"{weights}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"{weights}: not a readable safetensors file ({error})") from None
    return dict(config), state, str(folder)


def _load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    content = read_checkpoint(path)
    state = content.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f'{path}: not a checkpoint of a model: it has no "state_dict" of tensors')
    config = content.get("model_config")
    if config is None:
        config = _infer_config(state, path)
    elif not isinstance(config, dict):
        raise ValueError(f'{path}: "model_config" must be a dictionary, got {type(config).__name__}')
    return dict(config), state, str(path)


def _infer_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The architecture of an official checkpoint, read off its weights; the stride leaves no trace: half the kernel."""
    block = "manner_block."
    try:
        depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith(block + "encoder."))
        hidden, in_channels, _ = state[block + "in_conv.0.weight"].shape
        kernel_size = state[block + "encoder.0.down_conv.0.weight"].shape[2]
        query = state[f"{block}encoder.{depth - 1}.attn_block.global_attn.w_qs.weight"]
        everywhere = depth > 1 and f"{block}encoder.0.attn_block.shortcut.conv.weight" in state
        return {
            "in_channels": in_channels,
            "out_channels": state[block + "out_conv.0.weight"].shape[0],
            "hidden": hidden,
            "depth": depth,
            "kernel_size": kernel_size,
            "stride": max(kernel_size // 2, 1),
            "head": math.isqrt(query.shape[0] // query.shape[1]),
            "segment_len": query.shape[1],
            "attention_layers": "all" if everywhere else "deepest",
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise ValueError(f"{path}: the weights are not those of a MANNER network") from None


def _download(name: str | Path) -> Path:
    if name in PRESETS:
        reason = f"it is a preset's name, and weights come with {SHIPPED.name} alone, without a name"
        raise FileNotFoundError(f"{name} does not exist; {reason}")
    # A path that does not exist looks like a hub name, owner/name, only with one slash and no file's ending.
    is_file = str(name).endswith((".pt", ".pth", ".safetensors"))
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith((".", "/", "~")) or is_file:
        raise FileNotFoundError(f"{name} does not exist")
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{name} does not exist; to load it from the Hugging Face hub, pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except Exception as error:  # the hub's many network, name and permission errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"{name} is neither a file or folder nor to be had from the hub: {reason}") from None
