"""Manner against golden files: the project's own everywhere, those of the reference implementation where they are.

The project's own were made by a second specification (tests/golden/make.py), which is itself held to both.
"""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvat.kernels import use_backend
from mvat.models import Manner

GOLDEN = Path(__file__).parents[1] / "golden"
spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

OWN = ("all_h6", "deepest_h7_head2")
SHARED = ("base_h6", "base_h6_seg32_head2_depth3", "small_h8")


@pytest.fixture(params=[*OWN, *SHARED])
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    folder = GOLDEN if request.param in OWN else request.getfixturevalue("shared") / "golden"
    return make.read(folder / f"{request.param}.npz")


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
    value = torch.from_numpy(np.asarray(array))
    return value.to(dtype) if value.is_floating_point() else value


def named(golden: dict[str, np.ndarray], kind: str) -> dict[str, Tensor]:
    return {k.removeprefix(kind): tensor(v) for k, v in golden.items() if k.startswith(kind)}


def loaded(model_class: type[nn.Module], golden: dict[str, np.ndarray], dtype: torch.dtype) -> nn.Module:
    model = model_class(**ast.literal_eval(str(golden["config"]))).to(dtype)
    model.load_state_dict(named(golden, "state/"), strict=True)
    return model


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.detach().double() - expected).norm() / expected.norm())


def view_errors(views: list, golden: dict[str, np.ndarray]) -> list[float]:
    expected = named(golden, "views/")
    assert len(expected) == 3 * len(views)
    return [
        error(view, expected[f"{i}/{name}"])
        for i, block in enumerate(views)
        for name, view in zip(("channel", "global", "local"), block, strict=True)
    ]


def gradient_errors(model: nn.Module, golden: dict[str, np.ndarray]) -> tuple[float, float]:
    """The worst tensor's, scaled as the golden files' README says, and that of all gradients as one vector."""
    expected = named(golden, "grad/")
    got = {name: p.grad.double() for name, p in model.named_parameters()}
    assert got.keys() == expected.keys()
    floor = 1e-4 * max(g.norm() for g in expected.values())
    worst = max((got[k] - g).norm() / max(g.norm(), floor) for k, g in expected.items())
    whole = error(*(torch.cat([side[k].flatten() for k in expected]) for side in (got, expected)))
    return float(worst), whole


def check(golden: dict[str, np.ndarray], dtype: torch.dtype, output: float, views: float, gradients: tuple) -> None:
    model = loaded(Manner, golden, dtype).eval()
    x, r = tensor(golden["x"], dtype), tensor(golden["r"], dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        y, collected = model(x, return_views=True)
    assert error(y, tensor(golden["y_eval"])) <= output
    assert max(view_errors(collected, golden)) <= views
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # evaluation counts nothing

    model.train()
    y = model(x)
    (y * r).sum().backward()
    assert error(y, tensor(golden["y_train"])) <= output
    after = named(golden, "after/")
    buffers = dict(model.named_buffers())
    assert max(error(buffers[k], expected) for k, expected in after.items()) <= 1e-6
    worst, whole = gradient_errors(model, golden)
    assert worst <= gradients[0] and whole <= gradients[1]


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_float64(golden: dict[str, np.ndarray], mode: str) -> None:
    with use_backend(mode):
        check(golden, torch.float64, output=1e-9, views=1e-6, gradients=(1e-6, 1e-6))


def test_float32(golden: dict[str, np.ndarray]) -> None:
    # How far a deep view is off depends on the machine's order of summation: 4e-6 on one CPU, 1.5e-5 on another.
    check(golden, torch.float32, output=1e-5, views=5e-5, gradients=(5e-2, 1e-2))


def test_the_second_specification(golden: dict[str, np.ndarray]) -> None:
    model = loaded(make.Reference, golden, torch.float64).eval()
    with torch.no_grad():
        assert error(model(tensor(golden["x"])), tensor(golden["y_eval"])) <= 1e-9
    assert max(view_errors([block.values() for block in model.views()], golden)) <= 1e-6


def test_names_and_shapes_are_the_official_ones(golden: dict[str, np.ndarray]) -> None:
    state = Manner(**ast.literal_eval(str(golden["config"]))).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in named(golden, "state/").items()}


def test_a_random_model_agrees_with_the_second_specification_at_odd_lengths() -> None:
    config = {"hidden": 8, "depth": 2, "kernel_size": 5, "stride": 2, "head": 1, "segment_len": 6}
    model, reference = Manner(**config).double().eval(), make.Reference(**config).double().eval()
    reference.load_state_dict(model.state_dict())
    for length in (2, 3, 59, 127, 300):
        x = torch.randn(1, 1, length, dtype=torch.float64)
        with torch.no_grad():
            assert error(model(x), reference(x)) <= 1e-12


def test_every_view_matters_in_the_golden_files(golden: dict[str, np.ndarray]) -> None:
    model = loaded(make.Reference, golden, torch.float64).eval()
    expected = tensor(golden["y_eval"])
    for view in ("channel", "global", "local"):
        for block in model.blocks():
            block.without = view
        with torch.no_grad():
            assert error(model(tensor(golden["x"])), expected) > 1e-3
