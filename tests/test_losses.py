import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pesq
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mvat import audio
from mvat.kernels import attention_map, attention_transfer_loss
from mvat.losses import (
    ENHANCEMENT_LOSSES,
    AttentionTransferLoss,
    block_pairs,
    block_transfer_loss,
    disturbance,
    mrstft_distance,
    multi_view_transfer_loss,
    output_distillation_loss,
    perceptual_loss,
    weighted_mrstft_loss,
)
from mvat.models import Views

GOLDEN = Path(__file__).parent / "golden"
spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.fixture(params=["own", "shared"])
def golden(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], float]:
    """The arrays and the tolerance of the gradient: the shared file's windows were rounded to float32."""
    if request.param == "own":
        path, tolerance = GOLDEN / "loss.npz", 1e-7
    else:
        path, tolerance = request.getfixturevalue("shared") / "golden/weighted_mrstft_loss.npz", 5e-5
    return {k: torch.from_numpy(np.asarray(v)).double() for k, v in np.load(path).items()}, tolerance


def test_golden(golden: tuple[dict[str, Tensor], float]) -> None:
    g, tolerance = golden
    estimate = g["estimate"].requires_grad_()
    loss = weighted_mrstft_loss(estimate, g["clean"], g["noisy"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), g["loss"], rtol=1e-6, atol=0)
    assert (estimate.grad - g["grad_estimate"]).norm() <= tolerance * g["grad_estimate"].norm()
    estimate = estimate.detach()
    speech = mrstft_distance(estimate, g["clean"])
    torch.testing.assert_close(speech, g["clean_loss"], rtol=1e-6, atol=0)
    absolute = (estimate - g["clean"]).abs().mean(1)
    torch.testing.assert_close(speech - absolute, g["clean_sc"] + g["clean_mag"], rtol=1e-6, atol=0)
    noise = mrstft_distance(g["noisy"] - estimate, g["noisy"] - g["clean"])
    torch.testing.assert_close(noise, g["noise_loss"], rtol=1e-6, atol=0)


def test_golden_in_single_precision_and_three_dimensions(golden: tuple[dict[str, Tensor], float]) -> None:
    g, _ = golden
    signals = [g[name].float()[:, None] for name in ("estimate", "clean", "noisy")]
    loss = weighted_mrstft_loss(*signals)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), g["loss"], rtol=1e-5, atol=0)


def test_the_second_specification_gives_the_golden_parts(golden: tuple[dict[str, Tensor], float]) -> None:
    g, _ = golden
    for name, value in make.weighted_loss(g["estimate"], g["clean"], g["noisy"]).items():
        torch.testing.assert_close(value, g[name], rtol=1e-6, atol=0)


def test_the_perceptual_loss_is_its_formula() -> None:
    """The ratio and the compressed spectra in NumPy, frame by frame."""
    clean, noisy, estimate = np.random.default_rng(0).standard_normal((3, 2, 1700)) * [[[1.0], [0.01]]]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    parts = []
    for i in range(2):
        x, y, n = (signal[i] / np.sqrt(np.square(noisy[i]).mean() + 1e-8) for signal in (estimate, clean, noisy))
        error = np.square(x - y).sum() / (np.square(y).sum() + 0.01 * np.square(n).sum() + 1700e-8)
        heard = disturbance(*(torch.from_numpy(signal[i])[None] for signal in (estimate, clean))).item()
        padded = [np.pad(signal, 256, mode="reflect") for signal in (x, y)]
        x, y = (np.array([np.fft.rfft(window * s[k : k + 512]) for k in range(0, 1701, 128)]) for s in padded)
        (a, u), (b, v) = (((np.abs(s) ** 2 + 1e-6) ** 0.15, s * (np.abs(s) ** 2 + 1e-6) ** -0.35) for s in (x, y))
        spectra = 0.9 * np.square(a - b).mean() + 0.2 * np.square(np.abs(u - v)).mean()
        parts.append(0.4 * np.log10(1 + 1000 * error) + spectra + 0.4 * heard)
    loss = perceptual_loss(*(torch.from_numpy(signal) for signal in (estimate, clean, noisy)))
    assert loss.item() == pytest.approx(np.mean(parts), rel=1e-6)


def test_the_perceptual_loss_does_not_depend_on_the_level() -> None:
    signals = [torch.randn(2, 1500, dtype=torch.float64) for _ in range(3)]
    quiet = perceptual_loss(*(0.1 * signal for signal in signals))
    torch.testing.assert_close(quiet, perceptual_loss(*signals), rtol=1e-5, atol=0)


def test_the_perceptual_loss_trains_after_inference_and_on_the_meta_device() -> None:
    """Nothing is kept from an inference mode or a default device."""
    signals = [torch.randn(1, 1500) for _ in range(3)]
    with torch.inference_mode(), torch.device("meta"):
        perceptual_loss(*signals)
    estimate = signals[0].requires_grad_()
    perceptual_loss(estimate, *signals[1:]).backward()
    assert estimate.grad.isfinite().all()


def speech_like(seed: int = 0, frames: int = 48000) -> np.ndarray:
    rng, t = np.random.default_rng(seed), np.arange(frames) / 16000
    voice = sum(np.sin(2 * np.pi * 140 * k * t + rng.uniform(0, 6)) / k for k in range(1, 20))
    return 0.05 * voice * (np.sin(3 * np.pi * t) > -0.3)


def mean_opinion(clean: np.ndarray, estimate: np.ndarray) -> float:
    heard = disturbance(*(torch.from_numpy(signal)[None] for signal in (estimate, clean))).item()
    return 0.999 + 4 / (1 + np.exp(1.3669 * (heard - 4.5) + 3.8224))


@pytest.mark.parametrize("snr", [0, 10, 20, 30])
def test_the_disturbance_is_that_of_pesq(snr: int) -> None:
    """Nearly: PESQ aligns in time and leaves out what lies before and after the speech."""
    speech = speech_like(snr)
    noise = np.random.default_rng(snr).standard_normal(speech.size)
    noisy = speech + noise * speech.std() * 10 ** (-snr / 20)
    assert mean_opinion(speech, noisy) == pytest.approx(pesq.pesq(16000, speech, noisy, "wb"), abs=0.05)


def test_the_disturbance_of_recordings_is_that_of_pesq(shared: Path) -> None:
    pairs = shared / "corpus" / "vbd16k"
    for path in sorted((pairs / "clean_testset_wav").iterdir())[::8]:
        clean, noisy = (audio.read(pairs / f"{kind}_testset_wav" / path.name)[0][0] for kind in ("clean", "noisy"))
        assert mean_opinion(clean, noisy) == pytest.approx(pesq.pesq(16000, clean, noisy, "wb"), abs=0.06), path.name


def test_every_part_of_a_clip_is_heard() -> None:
    speech = np.tile(speech_like(frames=4000), 4)
    heard = []
    for start in range(0, 16000, 1000):
        estimate = speech.copy()
        estimate[start : start + 1000] += 0.3 * np.random.default_rng(0).standard_normal(1000)
        heard.append(mean_opinion(speech, estimate))
    assert max(heard) < 4.3


def test_where_the_speech_is_silent_the_disturbance_fades_out() -> None:
    estimate, clean = torch.randn(2, 1, 16000, dtype=torch.float64)
    assert disturbance(estimate, 0 * clean) == 0
    quiet, loud = (disturbance(level * estimate, level * clean).item() for level in (1e-6, 0.1))
    assert 0 < quiet < 1e-3 * loud


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(enhancement_loss, dtype: torch.dtype) -> None:
    clean = torch.from_numpy(speech_like()).float()[None]
    noisy = clean + 0.05 * torch.randn_like(clean)
    estimate = (0.5 * (clean + noisy)).requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = enhancement_loss(estimate, clean, noisy)
    assert loss == enhancement_loss(estimate, clean, noisy)
    assert torch.autograd.grad(loss, estimate)[0].isfinite().all()


def test_signals_of_several_dtypes_are_compared_in_the_widest(enhancement_loss) -> None:
    signals = [torch.randn(1, 1500).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    expected = enhancement_loss(*(signal.double() for signal in signals))
    assert enhancement_loss(*signals) == expected


def test_it_can_be_compiled_and_traced_without_data(enhancement_loss) -> None:
    signals = [torch.randn(2, 1500) for _ in range(3)]
    with FakeTensorMode():
        assert enhancement_loss(*(torch.empty(2, 1500) for _ in range(3))).shape == ()
    compiled = torch.compile(enhancement_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*signals), enhancement_loss(*signals))


@pytest.fixture(params=sorted(ENHANCEMENT_LOSSES))
def enhancement_loss(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return ENHANCEMENT_LOSSES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_perfect_estimate_gives_zero_and_a_zero_gradient(enhancement_loss, noise: float, dtype: torch.dtype) -> None:
    clean = torch.randn(2, 1500, dtype=dtype)
    clean[1] = 0
    noisy = clean + noise * torch.randn_like(clean)
    # noisy - estimate equals noisy - clean to the last bit, as both are the same subtraction.
    estimate = clean.clone().requires_grad_()
    loss = enhancement_loss(estimate, clean, noisy)
    loss.backward()
    assert loss == 0 and not estimate.grad.any()


def test_silence_is_finite(enhancement_loss) -> None:
    silence, sound = torch.zeros(2, 1500), torch.randn(2, 1500)
    for estimate, target in ((silence, silence), (sound, silence), (silence, sound), (1e-30 * sound, silence)):
        estimate = estimate.clone().requires_grad_()
        distance = mrstft_distance(estimate, target)
        distance.sum().backward()
        assert distance.shape == (2,) and torch.isfinite(distance).all() and torch.isfinite(estimate.grad).all()
        for noisy in (target, silence, estimate.detach()):
            estimate.grad = None
            loss = enhancement_loss(estimate, target, noisy)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(estimate.grad).all()


def test_gradcheck(enhancement_loss) -> None:
    clean, noisy = torch.randn(1, 1025, dtype=torch.float64), torch.randn(1, 1025, dtype=torch.float64)
    estimate = torch.randn(1, 1025, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda e: enhancement_loss(e, clean, noisy), estimate, fast_mode=True, atol=1e-5, rtol=1e-4
    )


def test_the_weight_is_each_clips_own() -> None:
    """A clip without noise counts its speech alone, a clip without speech its residual noise alone."""
    signal, estimate = torch.randn(1, 1500, dtype=torch.float64), torch.randn(1, 1500, dtype=torch.float64)
    silence = torch.zeros_like(signal)
    speech_only = weighted_mrstft_loss(estimate, signal, signal)
    torch.testing.assert_close(speech_only, mrstft_distance(estimate, signal).mean(), rtol=1e-5, atol=0)
    noise_only = weighted_mrstft_loss(estimate, silence, signal)
    torch.testing.assert_close(noise_only, mrstft_distance(signal - estimate, signal).mean(), rtol=1e-5, atol=0)
    both = [torch.cat(pair) for pair in ((estimate, estimate), (signal, silence), (signal, signal))]
    torch.testing.assert_close(weighted_mrstft_loss(*both), (speech_only + noise_only) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(enhancement_loss, dtype: torch.dtype) -> None:
    signals = [(20 * torch.randn(2, 1500)).to(dtype) for _ in range(3)]  # energies beyond float16's largest number
    loss = enhancement_loss(*signals)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, enhancement_loss(*(s.float() for s in signals)))


A = torch.zeros(2, 1500)


@pytest.mark.parametrize(
    "signals, error, message",
    [
        ((A[:, :1024],) * 3, ValueError, r"at least one clip of 1025 samples, got \{'estimate': \[2, 1024\]"),
        ((A[:0],) * 3, ValueError, r"at least one clip of 1025 samples, got \{'estimate': \[0, 1500\]"),
        ((A, A, A[:, :1499]), ValueError, r"the signals must have one shape, got .*'noisy': \[2, 1499\]"),
        ((A, A[:1], A), ValueError, r"the signals must have one shape, got .*'clean': \[1, 1500\]"),
        ((A[0], A, A), ValueError, r"estimate must have shape .*, got \[1500\]"),
        ((A[None], A, A), ValueError, r"estimate must have shape \[B, T\] or \[B, 1, T\], got \[1, 2, 1500\]"),
        ((A.short(), A, A), TypeError, "estimate must have a floating dtype, got torch.int16"),
        ((A, None, A), TypeError, "clean must be a tensor, got NoneType"),
        ((A, A, A.to("meta")), ValueError, "the signals must be on one device, got .*'noisy': 'meta'"),
    ],
)
def test_bad_signals_are_named(enhancement_loss, signals: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{enhancement_loss.__name__}: .*{message}"):
        enhancement_loss(*signals)


def test_output_distillation() -> None:
    student = torch.randn(2, 1, 1500, requires_grad=True)
    teacher = torch.randn(2, 1, 1500, requires_grad=True)
    loss = output_distillation_loss(student, teacher)
    torch.testing.assert_close(loss, mrstft_distance(student, teacher).mean())
    loss.backward()
    assert student.grad.any() and teacher.grad is None
    same = student.detach().clone().requires_grad_()
    loss = output_distillation_loss(same, same.detach())
    loss.backward()
    assert loss == 0 and not same.grad.any()
    with pytest.raises(ValueError, match="^mrstft_distance: the signals must have one shape"):
        output_distillation_loss(student, teacher[..., 1:])


def blocks(channels: int, lengths: tuple[int, ...] = (9, 5, 5, 9)) -> list[Views]:
    return [Views(*(torch.randn(2, channels, n, dtype=torch.float64) for _ in range(3))) for n in lengths]


@pytest.mark.parametrize("form", ["paper", "code"])
def test_multi_view_transfer_sums_blocks_and_views(form: str) -> None:
    student, teacher = blocks(2), blocks(7)
    maps = [Views(*(attention_map(v) for v in views)) for views in teacher]
    total = sum(
        attention_transfer_loss([s], [t], form=form)
        for student_block, teacher_block in zip(student, teacher, strict=True)
        for s, t in zip(student_block, teacher_block, strict=True)
    )
    torch.testing.assert_close(multi_view_transfer_loss(student, teacher, form=form), total)
    torch.testing.assert_close(multi_view_transfer_loss(student, maps, form=form), total)
    pairs = [(0, 3), (2, 1)]
    chosen = multi_view_transfer_loss(student, maps, pairs=pairs, views=["local", "channel"], form=form)
    expected = sum(
        attention_transfer_loss([getattr(student[s], view)], [getattr(teacher[t], view)], form=form)
        for s, t in pairs
        for view in ("channel", "local")
    )
    torch.testing.assert_close(chosen, expected)


def test_the_power_reaches_the_maps() -> None:
    student, teacher = blocks(2), blocks(7)
    expected = sum(attention_transfer_loss(s, t, p=1.0) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(multi_view_transfer_loss(student, teacher, p=1.0), expected)
    with pytest.raises(ValueError, match="p must be finite and at least 1, got 0.5"):
        multi_view_transfer_loss(student, teacher, p=0.5)


def test_students_and_teachers_of_different_depth_need_pairs() -> None:
    student, teacher = blocks(2, (9, 9)), blocks(3, (9, 5, 5, 9))
    with pytest.raises(ValueError, match="the student has 2 multi-view blocks and the teacher 4: name the pairs"):
        multi_view_transfer_loss(student, teacher)
    assert torch.isfinite(multi_view_transfer_loss(student, teacher, pairs=[(0, 0), (1, 3)]))
    for pair in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match=rf"pair \({pair[0]}, {pair[1]}\) does not exist: 2 student and 4 teacher"):
            multi_view_transfer_loss(student, teacher, pairs=[pair])
    with pytest.raises(ValueError, match="pair 0 must agree in batch and time"):
        multi_view_transfer_loss(student, teacher, pairs=[(0, 1)])
    with pytest.raises(ValueError, match="not empty"):
        multi_view_transfer_loss(student, teacher, pairs=[])


@pytest.mark.parametrize("views", [["global"], [], ["channel", "all"], "channel"])
def test_unknown_views_are_refused(views: list[str] | str) -> None:
    expected = f"views must be a sequence of some of channel, global_, local, got {views!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        multi_view_transfer_loss(blocks(2), blocks(3), views=views)


def test_block_pairs_take_lists_as_configuration_files_give_them() -> None:
    assert block_pairs(2, 2, None) == [(0, 0), (1, 1)]
    assert block_pairs(2, 4, [[0, 1], [1, 3]]) == [(0, 1), (1, 3)]


def test_block_transfer() -> None:
    student, teacher = [b.channel.requires_grad_() for b in blocks(2)], [b.channel for b in blocks(5)]
    loss = block_transfer_loss(student, teacher)
    torch.testing.assert_close(loss, attention_transfer_loss(student, teacher))
    loss.backward()
    assert all(s.grad.any() for s in student)
    chosen = block_transfer_loss(student, [attention_map(t) for t in teacher], pairs=[(0, 3)], form="code")
    torch.testing.assert_close(chosen, attention_transfer_loss(student[:1], teacher[3:], form="code"))
    with pytest.raises(ValueError, match="the student has 4 multi-view blocks and the teacher 3"):
        block_transfer_loss(student, teacher[:3])


@pytest.mark.parametrize("p, form, reduction", [(2.0, "paper", "sum"), (1.5, "code", "none")])
def test_the_transfer_loss_as_a_module(p: float, form: str, reduction: str) -> None:
    module = AttentionTransferLoss(p, form, reduction)
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(module) == f"AttentionTransferLoss(p={p}, form={form!r}, reduction={reduction!r})"
    student = [torch.randn(2, c, 31, requires_grad=True) for c in (3, 5)]
    teacher = [torch.randn(2, 9, 31), torch.rand(2, 31)]
    loss = module(student, teacher)
    assert torch.equal(loss, attention_transfer_loss(student, teacher, p=p, form=form, reduction=reduction))
    loss.sum().backward()
    assert all(f.grad is not None and f.grad.any() for f in student)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"p": 0.5}, ValueError, "AttentionTransferLoss: p must be finite and at least 1, got 0.5"),
        ({"p": "2"}, TypeError, "AttentionTransferLoss: p must be a number, got str"),
        ({"form": "text"}, ValueError, "AttentionTransferLoss: form must be one of paper, code, got 'text'"),
        ({"reduction": "mean"}, ValueError, "AttentionTransferLoss: reduction must be one of sum, none, got 'mean'"),
    ],
)
def test_the_module_refuses_bad_arguments_when_it_is_made(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        AttentionTransferLoss(**arguments)
    assert str(raised.value) == message
