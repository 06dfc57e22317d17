import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mvat.kernels.depthwise import depthwise_reference


@pytest.mark.parametrize("channels", [1, 2, 7, 12])
@pytest.mark.parametrize("height", [1, 5])
def test_equals_the_plain_convolution_forward_and_backward(channels, height):
    x = torch.randn(3, channels, height, 40, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 1, 31, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels, dtype=torch.float64, requires_grad=True)
    y = depthwise_reference(x, weight, bias, 15)
    rows = x.transpose(1, 2).flatten(0, 1)
    plain = F.conv1d(rows, weight, bias, padding=15, groups=channels).unflatten(0, (3, height)).transpose(1, 2)
    torch.testing.assert_close(y, plain)
    r = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, (x, weight, bias), r), torch.autograd.grad(plain, (x, weight, bias), r), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_few_channels_in_bfloat16_come_back():
    """oneDNN's channels_last depthwise convolution does not; in a process of its own, which can be ended."""
    script = (
        "import torch; from mvat.kernels.depthwise import depthwise_reference as f\n"
        "for n in (2, 4, 6, 8, 16):\n"
        "    x, w = torch.randn(2, n, 3, 64), torch.randn(n, 1, 31)\n"
        "    a = f(x.bfloat16(), w.bfloat16(), padding=15)\n"
        "    with torch.autocast('cpu', torch.bfloat16): b = f(x, w, padding=15)\n"
        "    assert (a - f(x, w, padding=15)).abs().max() < 0.3 and torch.equal(a, b)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
