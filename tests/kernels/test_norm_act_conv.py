import itertools
import math

import pytest
import torch
from torch import Tensor

from mvat.kernels import Norm, norm_act, norm_act_conv
from mvat.kernels.norm_act_conv import ACTIVATIONS


def norm(channels: int, dtype=torch.float64, momentum: float = 0.1) -> Norm:
    values = [torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5]
    return Norm(*(v.to(dtype) for v in values), momentum)


def copied(norm: Norm) -> Norm:
    return Norm(*(t.clone() for t in norm[:4]), *norm[4:])


def normalised(x: Tensor, norm: Norm, training: bool) -> Tensor:
    """Channel after channel; in training the running statistics are moved."""
    channels = []
    for c in range(x.shape[1]):
        mean, var = norm.running_mean[c].clone(), norm.running_var[c].clone()
        if training:
            values = x[:, c].flatten()
            mean, var = sum(values) / len(values), ((values - sum(values) / len(values)) ** 2).mean()
            norm.running_mean[c] = (1 - norm.momentum) * norm.running_mean[c] + norm.momentum * mean
            unbiased = var * len(values) / (len(values) - 1)
            norm.running_var[c] = (1 - norm.momentum) * norm.running_var[c] + norm.momentum * unbiased
        channels.append((x[:, c] - mean) / torch.sqrt(var + norm.eps) * norm.weight[c] + norm.bias[c])
    return torch.stack(channels, 1)


def activated(x: Tensor, name: str) -> Tensor:
    if name == "glu":
        half = x.shape[1] // 2
        return x[:, :half] / (1 + torch.exp(-x[:, half:]))
    return {"identity": x, "relu": x * (x > 0), "silu": x / (1 + torch.exp(-x))}[name]


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int) -> Tensor:
    """The sum of the definition, output by output."""
    batch, channels, length = x.shape
    out, within, kernel = weight.shape
    silence = x.new_zeros(batch, channels, padding)
    x = torch.cat((silence, x, silence), 2)
    y = x.new_zeros(batch, out, (length + 2 * padding - kernel) // stride + 1)
    for o, t in itertools.product(range(out), range(y.shape[2])):
        first = o // (out // groups) * within
        window = x[:, first : first + within, t * stride : t * stride + kernel]
        y[:, o, t] = (window * weight[o]).sum((1, 2)) + (0 if bias is None else bias[o])
    return y


def transposed(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Every input sample leaves the whole kernel, scaled."""
    batch, channels, length = x.shape
    y = x.new_zeros(batch, weight.shape[1], (length - 1) * stride + weight.shape[2])
    for c, t in itertools.product(range(channels), range(length)):
        y[:, :, t * stride : t * stride + weight.shape[2]] += x[:, c, t, None, None] * weight[c]
    return y if bias is None else y + bias[:, None]


STAGES = {
    # channels in, weight, options: the stages that MANNER is made of
    "1x1": (6, (5, 6, 1), {}),
    "1x1 glu": (6, (4, 3, 1), {"activation": "glu"}),
    "depthwise": (6, (3, 1, 31), {"activation": "glu", "padding": 15, "groups": 3}),
    "3": (6, (5, 6, 3), {"activation": "silu", "padding": 1}),
    "down": (6, (6, 6, 8), {"activation": "relu", "stride": 4}),
    "groups of two": (4, (6, 2, 3), {"groups": 2}),
    "1x1 strided": (3, (2, 3, 1), {"stride": 2}),
    "1x1 padded": (3, (2, 3, 1), {"padding": 2}),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch, length", [(1, 8), (3, 59)])
@pytest.mark.parametrize("stage", STAGES)
def test_matches_the_formula(stage: str, batch: int, length: int, training: bool) -> None:
    channels, shape, options = STAGES[stage]
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((batch, channels, length), shape, shape[:1]))
    ours = norm(channels)
    theirs = copied(ours)
    got = norm_act_conv(x, weight, bias, norm=ours, training=training, **options)
    u = activated(normalised(x, theirs, training), options.get("activation", "identity"))
    place = [options.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("groups", 1))]
    torch.testing.assert_close(got, convolved(u, weight, bias, *place), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-11, atol=1e-12)
    bare = norm_act_conv(x, weight, **options)
    u = activated(x, options.get("activation", "identity"))
    torch.testing.assert_close(bare, convolved(u, weight, None, *place), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [1, 59])
def test_transposed(length: int) -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, length), (3, 4, 8), (4,)))
    ours = norm(3)
    got = norm_act_conv(x, weight, bias, norm=ours, activation="relu", stride=4, transposed=True)
    expected = transposed(activated(normalised(x, ours, False), "relu"), weight, bias, 4)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_norm_act_matches_the_formula(activation: str, training: bool) -> None:
    x, shortcut = torch.randn(2, 4, 59, dtype=torch.float64), torch.randn(2, 4, 59, dtype=torch.float64)
    ours = [norm(4), norm(4, momentum=0.01)]
    theirs = [copied(n) for n in ours]
    plain = norm_act(x, copied(ours[0]), activation, training=training)
    added = norm_act(x, copied(ours[0]), activation, shortcut=shortcut, training=training)
    both = norm_act(x, ours[0], activation, shortcut=shortcut, shortcut_norm=ours[1], training=training)
    u, v = normalised(x, theirs[0], training), normalised(shortcut, theirs[1], training)
    for got, expected in ((plain, u), (added, u + shortcut), (both, u + v)):
        torch.testing.assert_close(got, activated(expected, activation), rtol=1e-11, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-11, atol=1e-12)


def test_evaluation_leaves_the_statistics_alone() -> None:
    x, ours = torch.randn(2, 4, 9), norm(4, torch.float32)
    before = copied(ours)
    norm_act_conv(x, torch.randn(2, 4, 1), norm=ours)
    norm_act(x, ours, "relu", shortcut=x, shortcut_norm=ours)
    assert all(torch.equal(a, b) for a, b in zip(before[:4], ours[:4], strict=True))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "every second", "expanded"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_views(layout: str, kernel: int) -> None:
    x = {
        "sliced": torch.randn(4, 5, 70, dtype=torch.float64)[1:3, 1:-1, 3:],
        "transposed": torch.randn(2, 59, 3, dtype=torch.float64).transpose(1, 2),
        "every second": torch.randn(2, 3, 60, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(2, 1, 59, dtype=torch.float64).expand(2, 3, 59),
    }[layout]
    weight, bias = torch.randn(kernel, 4, 3, dtype=torch.float64).permute(1, 2, 0), torch.randn(4, dtype=torch.float64)
    got = norm_act_conv(x, weight, bias, activation="silu")
    expected = convolved(activated(x, "silu"), weight, bias, 1, 0, 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stage", ["1x1", "3", "down", "groups of two", "1x1 glu"])
def test_gradcheck(stage: str, training: bool) -> None:
    channels, (out, within, kernel), options = STAGES[stage]
    options = options | ({"stride": 2} if stage == "down" else {})
    shapes = (2, channels, 5), (out, within, min(kernel, 4)), (out,)
    ours = norm(channels)
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes] + [t.clone() for t in ours[:2]]
    tensors = [t.requires_grad_() for t in tensors]

    def function(x, weight, bias, scale, shift):
        used = copied(Norm(scale, shift, *ours[2:]))
        return norm_act_conv(x, weight, bias, norm=used, training=training, **options)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("training", [False, True])
def test_norm_act_gradcheck(training: bool) -> None:
    first, second = norm(2), norm(2)
    tensors = [torch.randn(2, 2, 3, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)]
    tensors = [t.requires_grad_() for t in (*tensors, *first[:2], *second[:2])]

    def function(x, shortcut, scale, shift, scale2, shift2):
        norms = Norm(scale, shift, *first[2:]), Norm(scale2, shift2, *second[2:])
        return norm_act(x, norms[0], "silu", shortcut=shortcut, shortcut_norm=norms[1], training=training)

    assert torch.autograd.gradcheck(function, tensors)


def test_empty_batch() -> None:
    x = torch.zeros(0, 4, 9, requires_grad=True)
    for kernel in (1, 3):
        y = norm_act_conv(x, torch.randn(2, 4, kernel), torch.randn(2), norm=norm(4, torch.float32), activation="silu")
        y.sum().backward()
        assert y.shape == (0, 2, 10 - kernel)
    assert norm_act(x, norm(4, torch.float32), "glu").shape == (0, 2, 9)


def test_silence_and_extremes() -> None:
    weight = torch.randn(2, 4, 3)
    assert not norm_act_conv(torch.zeros(1, 4, 9), weight).any()
    ours = Norm(torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4))
    assert not norm_act_conv(torch.zeros(2, 4, 9), weight, norm=ours, activation="silu", training=True).any()
    for scale in (1e-20, 1e15):
        x = (scale * torch.randn(2, 4, 59)).requires_grad_()
        y = norm_act_conv(x, weight, norm=copied(ours), activation="silu", training=True)
        y.sum().backward()
        assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", ["1x1", "depthwise", "down"])
def test_half_precision_features_under_autocast(stage: str, dtype: torch.dtype, training: bool) -> None:
    channels, shape, options = STAGES[stage]
    x, weight = torch.randn(2, channels, 59).to(dtype).requires_grad_(), torch.randn(shape)
    ours = norm(channels, torch.float32)
    exact = norm_act_conv(x.detach().float(), weight, norm=copied(ours), training=training, **options)
    with torch.autocast("cpu", dtype):
        y = norm_act_conv(x, weight, norm=ours, training=training, **options)
        z = norm_act(x, ours, "relu", shortcut=x, shortcut_norm=ours, training=training)
    (y.sum() + z.sum()).backward()
    assert y.dtype == z.dtype == x.grad.dtype == dtype and ours.running_var.dtype == torch.float32
    assert (y - exact).norm() <= 0.02 * exact.norm()


def test_compile() -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(2, 6, 59, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)
    first, second = norm(6), norm(4)

    def chain(x: Tensor, weight: Tensor, first: Norm, second: Norm) -> Tensor:
        y = norm_act_conv(x, weight, norm=first, activation="glu", padding=1, training=True)
        return norm_act(y, second, "relu", training=True)

    norms = copied(first), copied(second)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    got = torch.autograd.grad(compiled(x, weight, first, second).square().sum(), leaves)
    expected = torch.autograd.grad(chain(x, weight, *norms).square().sum(), leaves)
    for a, b in zip((*got, first.running_var, second.running_mean), (*expected, norms[0][3], norms[1][2]), strict=True):
        torch.testing.assert_close(a, b)


def test_one_value_a_channel_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_act(torch.zeros(1, 4, 1), norm(4, torch.float32), training=True)


X, W, N = torch.zeros(2, 4, 9), torch.zeros(6, 4, 3), norm(4, torch.float32)


@pytest.mark.parametrize(
    "x, weight, options, error, message",
    [
        (None, W, {}, TypeError, "x must be a tensor, got NoneType"),
        (X[0], W, {}, ValueError, r"x must have shape \[B, C, T\], got \[4, 9\]"),
        (X.long(), W, {}, TypeError, "x must have a floating dtype, got torch.int64"),
        (X, [1.0], {}, TypeError, "weight must be a tensor, got list"),
        (X, W[0], {}, ValueError, r"weight must have shape \[out, in / groups, K\], got \[4, 3\]"),
        (X, W.double(), {}, TypeError, "weight must have the input's dtype torch.float32, got torch.float64"),
        (X, W.to("meta"), {}, ValueError, "weight must be on the input's device cpu, got meta"),
        (X, W[:, :3], {}, ValueError, r"weight must have shape \[6, 4, 3\], got \[6, 3, 3\]"),
        (X, W, {"transposed": True}, ValueError, r"weight must have shape \[4, 4, 3\], got \[6, 4, 3\]"),
        (X, W, {"activation": "glu"}, ValueError, r"weight must have shape \[6, 2, 3\], got \[6, 4, 3\]"),
        (X[:, :3], W, {"activation": "glu"}, ValueError, "glu needs an even number of channels, got 3"),
        (X, W, {"activation": "gelu"}, ValueError, "activation must be one of identity, relu, silu, glu, got 'gelu'"),
        (X, W, {"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[6\], got \[4\]"),
        (X, W, {"stride": 0}, ValueError, "stride must be an integer of at least 1, got 0"),
        (X, W, {"padding": -1}, ValueError, "padding must be an integer of at least 0, got -1"),
        (X, W, {"groups": 0}, ValueError, "groups must be an integer of at least 1, got 0"),
        (X, W[:, :1], {"groups": 3}, ValueError, "groups must divide 4 channels in and 6 out, got 3"),
        (X, W[:5, :2], {"groups": 2}, ValueError, "groups must divide 4 channels in and 5 out, got 2"),
        (X[..., :2], W, {}, ValueError, r"x \[2, 4, 2\] is too short for weight \[6, 4, 3\]"),
        (X[..., :0], W, {}, ValueError, r"x \[2, 4, 0\] is too short"),
        (X, W[:, :, :0], {}, ValueError, r"weight must not be empty, got \[6, 4, 0\]"),
        (X, W[:0], {}, ValueError, r"weight must not be empty, got \[0, 4, 3\]"),
        (X[:, :0], W[:, :0], {}, ValueError, r"weight must not be empty, got \[6, 0, 3\]"),
        (X, W, {"norm": N, "statistics": X[0]}, ValueError, r"the statistics for norm must have shape \[2, 4\], got"),
        (X, W, {"norm": N[:4]}, TypeError, "norm must be a tuple .*, got tuple"),
        (X, W, {"norm": N._replace(weight=torch.zeros(6))}, ValueError, r"norm.weight must have .* \[4\], got \[6\]"),
    ],
)
def test_bad_input_is_named(x: object, weight: object, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^norm_act_conv: .*{message}"):
        norm_act_conv(x, weight, **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"norm": None}, TypeError, "norm must be a tuple"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"shortcut": torch.zeros(2, 4, 8)}, ValueError, r"shortcut must have shape \[2, 4, 9\], got \[2, 4, 8\]"),
        ({"shortcut_norm": N, "shortcut_statistics": X[0]}, ValueError, "the statistics for shortcut_norm"),
        ({"shortcut": X, "shortcut_norm": norm(3)}, ValueError, r"shortcut_norm.weight must have shape \[4\]"),
    ],
)
def test_norm_act_bad_input_is_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^norm_act: .*{message}"):
        norm_act(X, **{"norm": N, **options})


def test_a_depthwise_kernel_is_a_correlation_and_not_flipped() -> None:
    x = torch.zeros(1, 1, 5, dtype=torch.float64)
    x[0, 0, 2] = 1
    kernel = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64)
    assert norm_act_conv(x, kernel, padding=1)[0, 0].tolist() == [0, 3, 2, 1, 0]
    assert norm_act_conv(x, kernel, padding=1, transposed=True)[0, 0].tolist() == [0, 1, 2, 3, 0]


def test_a_stride_beyond_the_signal() -> None:
    x, weight = torch.randn(2, 3, 9), torch.randn(4, 3, 5)
    assert torch.equal(norm_act_conv(x, weight, stride=10**9), norm_act_conv(x[..., :5], weight))


def test_silu_is_the_plain_one() -> None:
    x = torch.tensor([[[math.log(3.0)]]], dtype=torch.float64)
    eye = torch.ones(1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(norm_act_conv(x, eye, activation="silu"), 0.75 * x)
