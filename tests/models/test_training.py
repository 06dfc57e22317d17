"""Training with the fused kernels and with the plain references takes the same course."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels import native, use_backend
from mvat.models import Manner

pytestmark = pytest.mark.skipif(
    native.missing("norm_act_conv") is not None, reason=f"no kernel: {native.missing('norm_act_conv')}"
)

STEPS = 50


def course(mode: str) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a small network's first steps on tones in noise, and its state behind them."""
    torch.manual_seed(0)
    model = Manner(hidden=6, depth=2, segment_len=8).train()
    # Not Adam: it makes full steps of the rounding that is all a bias before a batch norm has for a gradient.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    time = torch.arange(400) / 16_000
    losses = []
    for _ in range(STEPS):
        clean = 0.3 * torch.sin(2 * torch.pi * (200 + 400 * torch.rand(2, 1, 1)) * time)
        noisy = clean + 0.1 * torch.randn_like(clean)
        with use_backend(mode):
            loss = F.l1_loss(model(noisy), clean)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_fused_and_eager_training_stay_together() -> None:
    (ours, our_state), (theirs, their_state) = course("fused"), course("eager")
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(a - b) <= 1e-3 * b, (step, a, b)
    assert theirs[-1] < 0.95 * theirs[0]  # the weights have moved
    for name in our_state:
        if "running" in name:
            torch.testing.assert_close(our_state[name], their_state[name], rtol=1e-2, atol=1e-3)
