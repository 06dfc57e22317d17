"""Inference on a CPU from folded weights: always what the plain reference gives, whatever happened to the weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mvat.kernels import use_backend
from mvat.models import Manner
from mvat.models.folded import folded

SMALL = {"hidden": 12, "depth": 2, "segment_len": 8}


@pytest.fixture
def model() -> Manner:
    """One whose batch norms have seen something, so that a wrong fold shows."""
    model = Manner(**SMALL)
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm1d):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias)
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
    return model.eval()


def difference(model: Manner, x: Tensor) -> float:
    with torch.no_grad():
        y = model(x)
        with use_backend("eager"):
            expected = model(x)
    return ((y - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 37), (1, 1, 800), (3, 1, 4001)])
def test_gives_what_the_reference_gives(model: Manner, shape: tuple[int, ...]) -> None:
    assert difference(model, torch.randn(shape)) < 1e-5


def test_empty_batch(model: Manner) -> None:
    with torch.no_grad():
        assert model(torch.zeros(0, 1, 100)).shape == (0, 1, 100)


def test_the_folded_operators_run(model: Manner) -> None:
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(torch.randn(1, 1, 400))
    names = {event.name for event in profile.events()}
    assert {"mvat::conv_act", "mvat::conformer_block", "mvat::multi_view_merge"} <= names
    assert "mvat::norm_act" not in names


def _data_columns(model: Manner) -> None:
    for p in model.parameters():
        if p.dim() == 3 and p.shape[1] >= 24 and p.shape[2] == 1:
            p.data[:, 1:12:2] *= 3


def _one_value(model: Manner) -> None:
    model.manner_block.encoder[0].attn_block.shortcut.conv.weight.data.view(-1)[1] = 20


def _average(model: Manner) -> None:
    for p in model.parameters():
        p.data.lerp_(torch.randn_like(p), 0.1)


def _load(model: Manner) -> None:
    torch.manual_seed(1)
    model.load_state_dict(Manner(**SMALL).state_dict())


def _eps(model: Manner) -> None:
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm1d):
            bn.eps = 0.5


def _replace(model: Manner) -> None:
    model.manner_block.encoder[1].conv_block.conv.conv = nn.Conv1d(48, 48, 1, bias=False)


def _train(model: Manner) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 1, 400)).square().mean().backward()
    optimizer.step()
    model.eval()


def _statistics(model: Manner) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.data.fill_(0.3)


@pytest.mark.parametrize("change", [_data_columns, _one_value, _average, _load, _eps, _replace, _train, _statistics])
def test_a_change_of_the_weights_is_seen(model: Manner, change: Callable[[Manner], None]) -> None:
    x = torch.randn(1, 1, 400)
    with torch.no_grad():
        before = model(x)
    change(model)
    with torch.no_grad():
        assert not torch.allclose(model(x), before, rtol=1e-4)
    assert difference(model, x) < 1e-5


def test_weights_made_in_inference_mode(model: Manner) -> None:
    x = torch.randn(1, 1, 400)
    with torch.inference_mode():
        made = Manner(**SMALL).eval()
        made(x)
        made.manner_block.linear[0].weight[0, 1] = 5.0
        y = made(x)
        with use_backend("eager"):
            torch.testing.assert_close(y, made(x), rtol=1e-4, atol=1e-5)


def test_only_where_no_gradient_is_asked_for(model: Manner) -> None:
    x = torch.randn(1, 1, 400)
    fold = type(model.manner_block.encoder[0].conv_block)._fold
    block = model.manner_block.encoder[0].conv_block
    assert folded(block, x, fold) is None
    with torch.no_grad():
        assert folded(block, x, fold) is not None
        assert folded(block, x.double(), fold) is None
        with use_backend("eager"):
            assert folded(block, x, fold) is None
        block.depth_conv[1].train()
        assert folded(block, x, fold) is None
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
