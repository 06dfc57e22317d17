"""Checkpoints of a training run: written whole or not at all, read without running code.

best.pt is a dictionary of tensors and plain values with format, config (resolved), epoch (finished ones), step,
history, model_config and state_dict, so that `mvat.models.Manner.from_pretrained` reads it. last.pt has these and what
the run goes on with: optimizer, scheduler, scaler, progress and running (see `train.progress`), raw_state_dict and
moves where state_dict is an average, updates of the whole run, the length of the curves' file, random (the generators'
states).
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvat.files import replacing
from mvat.models.pretrained import read_checkpoint

FORMAT = "mvat-checkpoint-2"
#: What last.pt holds.
KEYS = (
    *("model_config", "state_dict", "epoch", "step", "history", "config", "raw_state_dict", "moves", "optimizer"),
    *("scheduler", "scaler", "progress", "running", "updates", "curves", "random"),
)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the checkpoint; OSError leaves the former one as it was."""
    with replacing(path) as part:
        try:
            torch.save({"format": FORMAT, **content}, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"{path}: {str(error).splitlines()[0]}") from error


def load(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote and that holds these keys; ValueError names the file and the reason."""
    content = read_checkpoint(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint that a run can go on from (format {content.get('format')!r})")
    for key in keys:
        if key not in content:
            raise ValueError(f"{path}: damaged: no {key!r}")
    return content


def random_states() -> dict[str, Any]:
    """The states of all generators, as plain values and tensors."""
    generator: Any = np.random.get_state(legacy=False)
    generator["state"]["key"] = generator["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": generator, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set all generators to states that `random_states` gave."""
    random.setstate(states["python"])
    generator = states["numpy"]
    generator["state"]["key"] = np.array(generator["state"]["key"], np.uint32)
    np.random.set_state(generator)
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
