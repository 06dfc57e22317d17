import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mvat.kernels import attention_map, use_backend
from mvat.models import Manner, Views
from mvat.models.manner import valid_length

TINY = {"hidden": 6, "depth": 2, "segment_len": 8}
SMALLEST = {"hidden": 6, "depth": 1, "segment_len": 8}
EVALUATED = {
    "tiny": Manner(**TINY).eval(),
    "n not divisible by 3": Manner(hidden=7, depth=2, segment_len=8).eval(),
    "deepest, two heads": Manner(hidden=4, depth=2, head=2, segment_len=6, attention_layers="deepest").eval(),
    "stereo in": Manner(in_channels=2, hidden=6, depth=1, kernel_size=5, stride=3, segment_len=8).eval(),
}


@settings(max_examples=40)
@given(st.sampled_from(sorted(EVALUATED)), st.sampled_from([0, 1, 3]), st.integers(1, 3000))
def test_any_batch_and_length(name: str, batch: int, length: int) -> None:
    model = EVALUATED[name]
    x = torch.randn(batch, model.config["in_channels"], length)
    with torch.no_grad():
        y, views = model(x, return_views=True)
    assert y.shape == (batch, 1, length) and torch.isfinite(y).all()
    for block in views:
        assert block.channel.shape == block.global_.shape == block.local.shape


@settings(max_examples=60)
@given(st.integers(1, 10_000), st.integers(1, 5), st.integers(1, 9), st.data())
def test_a_valid_length_survives_the_encoders_and_decoders(length: int, depth: int, kernel: int, data) -> None:
    stride = data.draw(st.integers(1, kernel))
    valid = valid_length(length, depth, kernel, stride)
    assert valid >= length
    deep = valid
    for _ in range(depth):
        assert deep >= kernel and (deep - kernel) % stride == 0
        deep = (deep - kernel) // stride + 1
    if deep > 1:  # one step less at the bottom would be too short
        shorter = deep - 1
        for _ in range(depth):
            shorter = (shorter - 1) * stride + kernel
        assert shorter < length


@pytest.mark.parametrize("attention_layers, channels", [("all", [12, 24, 48, 24, 12, 6]), ("deepest", [48, 24])])
def test_views_maps_and_blocks(attention_layers: str, channels: list[int]) -> None:
    model = Manner(hidden=6, depth=3, segment_len=8, attention_layers=attention_layers).eval()
    x = torch.randn(2, 1, 777)
    with torch.no_grad():
        y = model(x)
        with_views, views = model(x, return_views=True)
        maps = model(x, return_maps=True)
        with_blocks, blocks = model(x, return_blocks=True)
    assert torch.equal(y, with_views) and torch.equal(y, with_blocks)
    # Encoders outside in, then decoders, the deepest first.
    valid = valid_length(777, 3, 8, 4)
    steps = [(valid - 8) // 4 + 1]
    steps += [(steps[0] - 8) // 4 + 1]
    steps += [(steps[1] - 8) // 4 + 1]
    lengths = [*steps, steps[1], steps[0], valid] if attention_layers == "all" else [steps[2], steps[1]]
    assert [tuple(v.channel.shape) for v in views] == [(2, c // 3, t) for c, t in zip(channels, lengths, strict=True)]
    assert [tuple(b.shape) for b in blocks] == [(2, c, t) for c, t in zip(channels, lengths, strict=True)]
    assert len(maps) == len(views)
    for block_maps, block_views in zip(maps, views, strict=True):
        assert isinstance(block_maps, Views) and isinstance(block_views, Views)
        for q, view in zip(block_maps, block_views, strict=True):
            assert torch.equal(q, attention_map(view))


def test_maps_of_another_power() -> None:
    model, x = EVALUATED["tiny"], torch.randn(1, 1, 300)
    with torch.no_grad():
        maps, (_, views) = model(x, return_maps=True, p=1.0), model(x, return_views=True)
    torch.testing.assert_close(maps[0].local, views[0].local.abs().sum(1))
    with pytest.raises(ValueError, match="p must be finite and at least 1, got 0.5"):
        model(x, return_maps=True, p=0.5)


def test_maps_alone_skip_what_comes_after_the_last() -> None:
    model, x = EVALUATED["tiny"], torch.randn(1, 1, 300)
    called = []
    hooks = [
        module.register_forward_hook(lambda *_: called.append(1))
        for module in (model.manner_block.mask_gate, model.manner_block.decoder[-1].attn_block.out_branch0)
    ]
    try:
        with torch.no_grad():
            model(x, return_maps=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def test_gradients_reach_every_parameter_and_the_input() -> None:
    model = Manner(**TINY)
    x = torch.randn(2, 1, 300, requires_grad=True)
    y, views = model(x, return_views=True)
    (y.square().sum() + sum(v.square().sum() for block in views for v in block)).backward()
    assert x.grad.any() and all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_training_counts_batches_and_moves_every_running_statistic() -> None:
    model = Manner(**TINY)
    before = {k: v.clone() for k, v in model.named_buffers()}
    model(torch.randn(2, 1, 300))
    model(torch.randn(2, 1, 300))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 2
        else:
            assert not torch.equal(buffer, before[name]), name


def test_momenta_are_the_official_ones() -> None:
    for name, module in Manner(**TINY).named_modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.momentum == (0.01 if name.endswith(".bn") else 0.1) and module.eps == 1e-5


def test_rescaling_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = Manner(**TINY)
    monkeypatch.setattr("mvat.models.manner._rescale", lambda module: None)
    torch.manual_seed(1)
    raw = dict(Manner(**TINY).named_parameters())
    scaled = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            factor = torch.sqrt(raw[f"{name}.weight"].std() / 0.1)
            torch.testing.assert_close(module.weight, raw[f"{name}.weight"] / factor)
            if module.bias is not None:
                torch.testing.assert_close(module.bias, raw[f"{name}.bias"] / factor)
            scaled += 1
        elif isinstance(module, nn.Linear):
            assert torch.equal(module.weight, raw[f"{name}.weight"])
    assert scaled > 50


def test_the_output_follows_the_level_of_the_input() -> None:
    model, x = EVALUATED["tiny"].double(), torch.randn(1, 1, 500, dtype=torch.float64)
    try:
        with torch.no_grad():
            # The divisor is 1e-3 + s and the factor s, so far above 1e-3 the network is linear in level.
            torch.testing.assert_close(model(1e6 * x) / 1e8, model(1e8 * x) / 1e10, rtol=1e-6, atol=1e-9)
            assert not model(torch.zeros_like(x)).any()
            assert not model(torch.ones_like(x)).any()  # no deviation
            assert not model(torch.ones(2, 1, 1, dtype=torch.float64)).any()  # one sample deviates from nothing
            assert torch.isfinite(model(1e-30 * x)).all()
    finally:
        model.float()


def test_it_is_deterministic_and_clips_do_not_mix_in_evaluation() -> None:
    model, x = EVALUATED["tiny"], torch.randn(3, 1, 400)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.no_grad():
            y = model(x)
            assert torch.equal(y, model(x))
            torch.testing.assert_close(torch.cat([model(clip[None]) for clip in x]), y, rtol=1e-5, atol=1e-6)
        gradients = []
        for _ in range(2):
            torch.manual_seed(0)
            trained = Manner(**SMALLEST)
            trained(x).square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in trained.parameters()]))
        assert torch.equal(*gradients)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:attention_map runs the plain PyTorch reference")
@pytest.mark.parametrize("mode, dtype", [("eager", torch.bfloat16), ("auto", torch.float32)])
def test_autocast(mode: str, dtype: torch.dtype) -> None:
    # The fused kernels of a CPU keep float32 features float32.
    model, x = Manner(**TINY), torch.randn(2, 1, 800)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16), use_backend(mode):
        mixed, views = model(x, return_views=True)
        maps = model(x, return_maps=True)
    assert views[0].channel.dtype == dtype and maps[0].channel.dtype == torch.float32
    assert (mixed - y).norm() <= 0.2 * y.norm()
    mixed.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_compiled_training() -> None:
    torch._dynamo.reset()
    model, twin = Manner(**SMALLEST), Manner(**SMALLEST)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 100)
    outputs = []
    for function in (torch.compile(model, fullgraph=True, backend="aot_eager"), twin):
        y, views = function(x, return_views=True)
        (y.square().sum() + sum(v.square().sum() for v in views[0])).backward()
        outputs.append(y.detach())
    torch.testing.assert_close(*outputs)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4 * float(b.grad.abs().max()) + 1e-5)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_maps_of_a_teacher() -> None:
    torch._dynamo.reset()
    model, x = Manner(**SMALLEST).eval(), torch.randn(2, 1, 100)
    with torch.no_grad():
        maps = torch.compile(model, fullgraph=True, backend="aot_eager")(x, return_maps=True)
        torch.testing.assert_close(maps, model(x, return_maps=True))


@pytest.mark.parametrize(
    "x, error, message",
    [
        ([0.0], TypeError, "x must be a tensor, got list"),
        (torch.zeros(1, 1, 100, dtype=torch.int16), TypeError, "x must have a floating dtype, got torch.int16"),
        (torch.zeros(1, 100), ValueError, r"x must have shape \[B, in_channels, T\], got \[1, 100\]"),
        (torch.zeros(1, 2, 100), ValueError, r"x must have shape \[B, 1, T >= 1\], got \[1, 2, 100\]"),
        (torch.zeros(1, 1, 0), ValueError, r"x must have shape \[B, 1, T >= 1\], got \[1, 1, 0\]"),
    ],
)
def test_bad_input_is_named(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Manner: {message}"):
        EVALUATED["tiny"](x)


def test_another_dtype_than_the_models_is_refused() -> None:
    with pytest.raises(TypeError, match="the input's dtype torch.float64, got torch.float32"):
        EVALUATED["tiny"](torch.zeros(1, 1, 100, dtype=torch.float64))


@pytest.mark.parametrize("wants", [("return_views", "return_maps"), ("return_maps", "return_blocks")])
def test_two_requests_at_once_are_refused(wants: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="only one of return_views, return_maps, return_blocks can be asked for"):
        EVALUATED["tiny"](torch.zeros(1, 1, 100), **dict.fromkeys(wants, True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden": 5}, "an attention block needs at least 6 channels, got hidden = 5"),
        ({"hidden": 1, "attention_layers": "deepest"}, "hidden must be at least 2, got 1"),
        ({"hidden": 2, "depth": 2, "attention_layers": "deepest"}, "at least 6 channels, got hidden = 2"),
        ({"hidden": 6.0}, "hidden must be a positive integer, got 6.0"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"in_channels": -1}, "in_channels must be a positive integer, got -1"),
        ({"head": 0}, "head must be a positive integer, got 0"),
        ({"growth": 3}, "growth must be 2, got 3"),
        ({"stride": 9}, "stride must be at most kernel_size = 8, got 9"),
        ({"segment_len": 63}, "segment_len must be an even integer of at least 2, got 63"),
        ({"attention_layers": "none"}, 'attention_layers must be "all" or "deepest", got "?\'?none'),
    ],
)
def test_bad_configurations_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manner(**arguments)


def test_the_narrowest_models_are_finite() -> None:
    for arguments in ({"hidden": 6, "depth": 1, "kernel_size": 1, "stride": 1}, {"hidden": 2, "depth": 3}):
        model = Manner(**arguments, segment_len=2, attention_layers="deepest").eval()
        with torch.no_grad():
            y: Tensor = model(torch.randn(1, 1, 100))
        assert torch.isfinite(y).all() and all(torch.isfinite(p).all() for p in model.parameters())
        assert math.prod(y.shape) == 100


OPTIONAL = "soundfile soxr pesq pystoi triton safetensors huggingface_hub tqdm accelerate jsonargparse matplotlib av"

BLOCKED = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL.split()}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
import mvat, mvat.kernels, mvat.models, mvat.losses

model = mvat.models.Manner(hidden=6, depth=1, segment_len=8)
x = torch.randn(2, 1, 1025)
y, views = model(x, return_views=True)
loss = mvat.losses.weighted_mrstft_loss(y, x, 2 * x) + mvat.losses.multi_view_transfer_loss(views, views)
loss.backward()
assert torch.isfinite(loss)
print("done")
"""


def test_torch_and_numpy_are_enough() -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True)
    assert result.stdout == "done\n", result.stderr
