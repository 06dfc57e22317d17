"""`mvat.enhance`: kinds, shapes, rates and refusals; that it gives what the model gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mvat
from mvat import audio

RATES = (8000, 11025, 16000, 22050, 44100, 48000, 192000)


@pytest.fixture(scope="module")
def model() -> mvat.Manner:
    torch.manual_seed(0)
    return mvat.Manner(hidden=6, depth=2).eval()


def noise(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def test_an_array_gets_what_the_model_gives_each_channel(model: mvat.Manner) -> None:
    x = noise(2, 1000)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)[:, None])[:, 0].numpy()
    y = mvat.enhance(x, model)
    assert isinstance(y, np.ndarray) and y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(mvat.enhance(x[1], model), y[1])


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 3000), rate=st.sampled_from(RATES), channels=st.sampled_from([None, 1, 3]))
def test_shape_and_length_stay_at_any_rate(model: mvat.Manner, length: int, rate: int, channels: int | None) -> None:
    x = noise(length) if channels is None else noise(channels, length)
    y = mvat.enhance(x, model, rate)
    assert y.shape == x.shape and np.isfinite(y).all()


@pytest.mark.parametrize("rate", RATES)
def test_resampling_there_and_back_keeps_time_and_level(rate: int) -> None:
    t = np.arange(rate) / rate
    x = 0.5 * np.sin(2 * np.pi * 440 * t) * np.hanning(rate)
    y = mvat.enhance(x, nn.Identity().eval(), rate)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, x, atol=0 if rate == 16000 else 2e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.dtype(">f4")])
def test_an_array_keeps_its_dtype_and_is_not_written_to(dtype: type) -> None:
    x = noise(2, 99, dtype=dtype)[:, ::-1]
    x.flags.writeable = False
    y = mvat.enhance(x, nn.Identity().eval())
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_stays_a_tensor_that_autograd_accepts(model: mvat.Manner, dtype: torch.dtype) -> None:
    x = torch.from_numpy(noise(2, 500)).to(dtype).requires_grad_()
    y = mvat.enhance(x, model)
    assert y.dtype == dtype and y.shape == x.shape and y.device == x.device
    assert not y.requires_grad and not y.is_inference()
    (x * y).sum().backward()
    torch.testing.assert_close(x.grad, y)


@pytest.mark.cuda
def test_the_audio_goes_to_the_model_and_comes_back() -> None:
    model = mvat.Manner(hidden=6, depth=2).eval().cuda()
    y = mvat.enhance(torch.from_numpy(noise(500)), model)
    assert y.device.type == "cpu"
    assert mvat.enhance(torch.from_numpy(noise(500)).cuda(), model).is_cuda


def test_a_model_in_float64_computes_in_float64() -> None:
    model = mvat.Manner(hidden=6, depth=2).double().eval()
    x = noise(700, dtype=np.float64)
    with torch.no_grad():
        np.testing.assert_array_equal(mvat.enhance(x, model), model(torch.from_numpy(x)[None, None])[0, 0].numpy())


def test_channels_do_not_meet(model: mvat.Manner) -> None:
    x = noise(2, 800)
    louder = x * np.array([[1.0], [3.0]], np.float32)
    np.testing.assert_array_equal(mvat.enhance(x, model, 8000)[0], mvat.enhance(louder, model, 8000)[0])


@pytest.mark.parametrize("rate", [16000, 44100])
def test_silence_stays_silence(model: mvat.Manner, rate: int) -> None:
    assert not mvat.enhance(np.zeros((2, 1000), np.float32), model, rate).any()


def test_a_path_gives_an_array_at_the_rate_of_the_file(model: mvat.Manner, tmp_path: Path) -> None:
    path = tmp_path / "stereo.wav"
    audio.write(path, noise(2, 3001), 44100, "PCM_24")
    samples, rate = audio.read(path)
    y = mvat.enhance(path, model)
    assert y.shape == (2, 3001) and y.dtype == np.float32
    np.testing.assert_array_equal(y, mvat.enhance(samples, model, rate))
    np.testing.assert_array_equal(y, mvat.enhance(str(path), model))
    with pytest.raises(ValueError, match="sample_rate must not be given with a path"):
        mvat.enhance(path, model, 44100)
    with pytest.raises(audio.AudioError, match="absent.wav: no such file"):
        mvat.enhance(tmp_path / "absent.wav", model)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (np.zeros(9, np.int16), TypeError, r"got int16; scale it \(int16: audio / 32768\)"),
        (torch.zeros(9, dtype=torch.int16), TypeError, r"got torch.int16; scale it"),
        (np.zeros(9, np.complex64), TypeError, "got complex64"),
        ([0.0, 0.1], TypeError, "an array, a tensor or a path, got list"),
        (np.zeros(0, np.float32), ValueError, r"not empty, got shape \[0\]"),
        (np.zeros((0, 9), np.float32), ValueError, r"not empty, got shape \[0, 9\]"),
        (np.zeros((48000, 2), np.float32), ValueError, r"got \[48000, 2\]: 48000 channels; transpose it"),
        (np.zeros((100, 2), np.float32), ValueError, "100 channels; transpose it"),
        (np.zeros((1, 1, 9), np.float32), ValueError, r"\[T\] or \[channels, T\]"),
        (torch.zeros(()), ValueError, r"\[T\] or \[channels, T\]"),
        (np.array([0, np.nan], np.float32), ValueError, "holds NaN or infinity"),
        (torch.tensor([0, torch.inf]), ValueError, "holds NaN or infinity"),
        (np.array([3e38, -3e38] * 9, np.float32), ValueError, "output holds NaN or infinity"),
    ],
)
def test_audio_that_is_none_is_refused(
    model: mvat.Manner, samples: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mvat.enhance(samples, model)


@pytest.mark.parametrize(
    ("rate", "error"), [(0, ValueError), (-1, ValueError), (16000.0, TypeError), (True, TypeError), ("16k", TypeError)]
)
def test_a_rate_that_is_none_is_refused(model: mvat.Manner, rate: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="sample_rate"):
        mvat.enhance(noise(9), model, rate)


def test_a_model_that_cannot_enhance_is_refused() -> None:
    x = noise(100)
    with pytest.raises(TypeError, match="model must be a module, got str; mvat.Manner.from_pretrained"):
        mvat.enhance(x, "runs/demo")
    with pytest.raises(ValueError, match="training mode"):
        mvat.enhance(x, mvat.Manner(hidden=6, depth=1))
    with pytest.raises(ValueError, match=r"must give \[1, 1, 100\] for \[1, 1, 100\], it gave \[1, 1, 50\]"):
        mvat.enhance(x, nn.AvgPool1d(2).eval())
    with pytest.raises(ValueError, match=r"\[B, 2, T >= 1\]"):
        mvat.enhance(x, mvat.Manner(in_channels=2, hidden=6, depth=1).eval())


def test_the_package_names_its_parts_at_first_use() -> None:
    assert {"Manner", "enhance", "use_backend", "kernels", "losses"} <= set(dir(mvat))
    assert mvat.kernels.attention_map is not None
    with pytest.raises(AttributeError, match="no attribute 'enhence'"):
        mvat.enhence  # noqa: B018
