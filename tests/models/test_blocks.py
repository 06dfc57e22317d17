"""The blocks as modules of their own: each is its op with its parameters, and refuses what it cannot be made of."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mvat import kernels, models
from mvat.kernels import Norm
from mvat.models import ChannelAttention, GlobalAttention, LocalAttention, MaskGate, MultiView, ResCon
from mvat.models.blocks import conv_stage, joined_stage


def ops(x: Tensor) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Each view's module, and the same answer from its op and the module's parameters by name."""
    channel, global_ = ChannelAttention(7), GlobalAttention(segment_len=8, head=2)
    local, gate = LocalAttention(7, segment_len=8).eval(), MaskGate(7)
    c, g, m, n = (dict(module.named_parameters()) for module in (channel, global_, gate, local))
    return {
        "channel": (channel, lambda: kernels.channel_attention(x, *c.values())),
        "global": (
            global_,
            lambda: kernels.global_attention(
                x, g["w_qs.weight"], g["w_ks.weight"], g["w_vs.weight"], g["fc.weight"], heads=2, segment_len=8
            ),
        ),
        "local": (
            local,
            lambda: kernels.local_attention(
                x,
                n["depth_conv.0.conv.weight"],
                Norm.of(local.depth_conv[1]),
                n["conv.conv.weight"],
                Norm.of(local.conv.bn),
                segment_len=8,
            ),
        ),
        "mask gate": (gate, lambda: kernels.mask_gate(x, *m.values())),
    }


@pytest.mark.parametrize("name", ["channel", "global", "local", "mask gate"])
def test_a_module_is_its_op_with_its_parameters(name: str) -> None:
    x = torch.randn(2, 7, 59)
    module, op = ops(x)[name]
    y = module(x)
    torch.testing.assert_close(y, op())
    y.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("module, given, made", [(ResCon(6, 10), 6, 10), (MultiView(7, 8, head=2), 7, 7)])
def test_shapes(module: nn.Module, given: int, made: int, batch: int) -> None:
    y = module.eval()(torch.randn(batch, given, 59))
    assert y.shape == (batch, made, 59) and torch.isfinite(y).all()


def test_a_block_is_its_views_merged() -> None:
    block, x = MultiView(7, segment_len=8).eval(), torch.randn(2, 7, 59)
    views = block.views(x)
    assert isinstance(views, models.Views) and all(view.shape == (2, 2, 59) for view in views)
    assert torch.equal(block.merge(x, views), block(x))


@pytest.mark.parametrize("mode", ["eager", "auto"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changed", [{}, {"momentum": 0.3}, {"eps": 0.1}, {"training": False}])
def test_branches_joined_are_branches_normalised(changed: dict, training: bool, mode: str) -> None:
    """Norms that differ cannot be taken for one; either way they are counted, and move their own statistics, once."""
    torch.manual_seed(0)
    first, last = nn.Conv1d(4, 3, 1).double(), nn.Conv1d(6, 5, 1).double()
    xs = [torch.randn(2, 4, 19, dtype=torch.float64) for _ in range(2)]
    results = []
    norms = [nn.BatchNorm1d(3).double().train(training) for _ in xs]
    for norm in norms:
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(t, 0.5, 1.5)
    vars(norms[1]).update(changed)
    for joined in (True, False):
        bns = copy.deepcopy(norms)
        with kernels.use_backend(mode if joined else "eager"):
            if joined:
                y = joined_stage([conv_stage(x, first) for x in xs], bns, "relu", last).features
            else:
                y = last(torch.cat([bn(first(x)) for x, bn in zip(xs, bns, strict=True)], 1).relu())
        parameters = [*first.parameters(), *last.parameters(), *(p for bn in bns for p in bn.parameters())]
        gradients = torch.autograd.grad(y.square().sum(), parameters)
        results.append([y, *gradients, *(buffer for bn in bns for buffer in bn.buffers())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ChannelAttention(1), "ChannelAttention: channels must be an integer of at least 2, got 1"),
        (lambda: ChannelAttention(4.0), "ChannelAttention: channels must be an integer of at least 2, got 4.0"),
        (lambda: GlobalAttention(7, 1), "GlobalAttention: segment_len must be an even integer of at least 2, got 7"),
        (lambda: GlobalAttention(8, 0), "GlobalAttention: head must be an integer of at least 1, got 0"),
        (lambda: LocalAttention(0, 8), "LocalAttention: channels must be an integer of at least 1, got 0"),
        (lambda: LocalAttention(3, 0), "LocalAttention: segment_len must be an even integer of at least 2, got 0"),
        (lambda: MultiView(5), "MultiView: channels must be an integer of at least 6, got 5"),
        (lambda: MultiView(6, head="1"), "GlobalAttention: head must be an integer of at least 1, got '1'"),
        (lambda: ResCon(0, 4), "ResCon: in_channels must be an integer of at least 1, got 0"),
        (lambda: ResCon(4, None), "ResCon: out_channels must be an integer of at least 1, got None"),
        (lambda: MaskGate(-1), "MaskGate: channels must be an integer of at least 1, got -1"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message
