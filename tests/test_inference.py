"""`mvat.enhance`: kinds, shapes, rates and refusals; that it gives what the model gives."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mvat
from mvat import audio, inference
from mvat.windows import starts

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
        ([0.0, 0.1], TypeError, r"audio\[0\] must be an array, a tensor or a path, got float"),
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


def long_recording(path: Path, channels: int = 2, rate: int = 16000, seconds: float = 3.3) -> Path:
    time = np.arange(round(seconds * rate)) / rate
    samples = np.stack([0.2 * np.sin(2 * np.pi * 330 * (c + 1) * time) for c in range(channels)])
    samples += 0.05 * np.random.default_rng(rate).standard_normal(samples.shape)
    audio.write(path, samples * (1 + np.sin(2 * np.pi * 0.4 * time)), rate, "PCM_24")
    return path


class Echo(nn.Module):
    """A linear time-invariant module that looks a tenth of a second back and forth."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[-1]
        self.lengths.append(length)
        padded = nn.functional.pad(x, (1600, 1600))
        taps = ((0, 0.3), (1500, -0.2), (1600, 1.0), (3200, 0.4))
        return sum(gain * padded[..., at : at + length] for at, gain in taps)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("extra", [-1, 0, 1, 4001])
def test_windows_of_a_linear_module_give_the_whole(rate: int, extra: int) -> None:
    x = noise(2, 2 * rate + extra)
    whole, windowed = Echo().eval(), Echo().eval()
    expected = mvat.enhance(x, whole, rate, window=None)
    y = mvat.enhance(x, windowed, rate, window=2)
    assert y.shape == x.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    assert len(whole.lengths) == 2 and max(windowed.lengths) <= 32000
    assert len(windowed.lengths) == 2 * len(starts(round(x.shape[1] * 16000 / rate), 32000))


def test_a_recording_up_to_the_limit_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "WHOLE", 1.5)
    monkeypatch.setattr(inference, "WINDOW", 1.0)
    for length, lengths in ((24000, [24000]), (24001, [16000, 16000, 16000])):
        module = Echo().eval()
        mvat.enhance(noise(length), module)
        assert module.lengths == lengths


def test_windows_are_normalised_by_the_seconds_around_them(model: mvat.Manner, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[torch.Tensor] = []
    forward = mvat.Manner.forward

    def spy(self, x, scale=None):
        scales.append(scale)
        return forward(self, x, scale=scale)

    monkeypatch.setattr(mvat.Manner, "forward", spy)
    x = noise(2, 40000) * np.linspace(0.1, 3, 40000, dtype=np.float32) * np.array([[1], [5]], np.float32)
    windows = starts(40000, 16000)
    for whole, stretches in ((30, [(0, 40000)] * 4), (2, [(0, 32000)] * 2 + [(8000, 40000)] * 2)):
        monkeypatch.setattr(inference, "WHOLE", whole)
        assert len(windows) == len(stretches)
        mvat.enhance(x, model, window=1)
        expected = [x[:, a:b].astype(np.float64).std(1, ddof=1) for a, b in stretches]
        np.testing.assert_allclose(torch.cat(scales).flatten(), np.concatenate(expected), rtol=1e-6)
        scales.clear()
    monkeypatch.undo()
    monkeypatch.setattr(mvat.Manner, "forward", spy)
    mvat.enhance(x, model)
    assert scales == [None, None]


def test_a_window_with_the_scale_of_its_own_is_the_model_s_own_answer(model: mvat.Manner) -> None:
    x = torch.from_numpy(noise(3, 1, 900))
    scale = x.std(2, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x, scale=scale), model(x), rtol=0, atol=0)
        assert (model(x, scale=2 * scale) - model(x)).abs().max() > 1e-3 * model(x).abs().max()
    for wrong, named in ((scale[:2], r"\[2, 1, 1\]"), (1.0, "float")):
        with pytest.raises(ValueError, match=rf"scale must be a tensor \[3, 1, 1\], got {named}"):
            model(x, scale=wrong)


def test_silence_stays_silence_between_and_around_windows(model: mvat.Manner) -> None:
    class Offset(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    x = np.zeros((2, 100000), np.float32)
    x[1, 70000:] = noise(30000)
    for module in (model, Offset().eval()):
        y = mvat.enhance(x, module, window=1)
        assert not y[0].any() and not y[1, :50000].any() and y[1, 70000:].any()


@pytest.mark.parametrize(("rate", "channels"), [(16000, 1), (44100, 2), (8000, 3)])
@pytest.mark.parametrize("window", [1, None])
def test_a_file_written_in_blocks_is_the_array_in_memory(
    model: mvat.Manner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, channels: int, window: float | None
) -> None:
    monkeypatch.setattr(audio, "blocks", partial(audio.blocks, frames=5000))
    source = long_recording(tmp_path / "in.wav", channels, rate, 2.3)
    samples, _ = audio.read(source)
    expected = mvat.enhance(samples, model, rate, window=window)
    np.testing.assert_array_equal(mvat.enhance(source, model, window=window), expected)
    target = tmp_path / "out.flac"
    assert mvat.enhance(source, model, out=str(target), window=window) == target
    audio.write(tmp_path / "expected.flac", expected, rate, "PCM_24")
    assert target.read_bytes() == (tmp_path / "expected.flac").read_bytes()


def test_a_list_gives_a_list(model: mvat.Manner, tmp_path: Path) -> None:
    x = noise(2, 700)
    path = long_recording(tmp_path / "a.wav", 1, seconds=0.1)
    y = mvat.enhance([x, torch.from_numpy(x[0]), path], model)
    np.testing.assert_array_equal(y[0], mvat.enhance(x, model))
    assert isinstance(y[1], torch.Tensor)
    np.testing.assert_array_equal(y[1], y[0][0])
    np.testing.assert_array_equal(y[2], mvat.enhance(path, model))
    assert mvat.enhance((), model) == []
    with pytest.raises(ValueError, match=r"audio\[1\] must be \[T\] or"):
        mvat.enhance([x, x[:, :0]], model)
    with pytest.raises(ValueError, match="sample_rate must not be given with a path"):
        mvat.enhance([x, path], model, 8000)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_the_folder_as_it_was(tmp_path: Path, failure: BaseException, existing: bool) -> None:
    source, target = long_recording(tmp_path / "in.wav"), tmp_path / "out.wav"
    if existing:
        target.write_text("precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Failing(Echo):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.lengths) == 3:
                # The temporary file lies beside.
                assert len(list(tmp_path.iterdir())) == len(before) + 1
                raise failure
            return super().forward(x)

    with pytest.raises(type(failure)):
        mvat.enhance(source, Failing().eval(), out=target, window=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_breaks_off_leaves_nothing(model: mvat.Manner, tmp_path: Path) -> None:
    source = long_recording(tmp_path / "in.flac", 1, seconds=20)
    source.write_bytes(source.read_bytes()[:-30000])
    with pytest.raises(audio.AudioError, match=f"{source}: "):
        mvat.enhance(source, model, out=tmp_path / "out.wav", window=1)
    assert list(tmp_path.iterdir()) == [source]


def test_outputs_that_cannot_be_are_refused(model: mvat.Manner, tmp_path: Path) -> None:
    source = long_recording(tmp_path / "in.wav", 1, seconds=0.1)
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "link.wav").symlink_to(source)
    before = source.read_bytes()
    for out, message in (
        ("in.wav", "out is the input"),
        ("link.wav", "out is the input"),
        ("out.mp3", "can write .wav and .flac only"),
        ("absent/out.wav", "absent does not exist"),
        ("folder.wav", "is a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            mvat.enhance(source, model, out=tmp_path / out)
    for several in (noise(9), [source]):
        with pytest.raises(TypeError, match="out needs the path of one file"):
            mvat.enhance(several, model, out=tmp_path / "out.wav")
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.wav", "in.wav", "link.wav"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0.5}, ValueError, "window must be 1 to 86400 seconds, got 0.5"),
        ({"window": float("nan")}, ValueError, "got nan"),
        ({"window": float("inf")}, ValueError, "got inf"),
        ({"window": True}, TypeError, "window must be seconds, None or .auto., got True"),
        ({"window": "10"}, TypeError, "got '10'"),
        ({"progress": 1}, TypeError, "progress must be True, False or None, got 1"),
    ],
)
def test_options_that_are_none_are_refused(
    model: mvat.Manner, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mvat.enhance(noise(9), model, **options)


def test_progress_is_shown_when_asked_for(model: mvat.Manner, capsys: pytest.CaptureFixture[str]) -> None:
    x = noise(40000)
    for progress in (None, False):
        mvat.enhance(x, model, window=1, progress=progress)
        assert capsys.readouterr() == ("", "")
    mvat.enhance([x, x], model, window=1, progress=True)
    out, error = capsys.readouterr()
    assert out == "" and "100%" in error and "5/5 s of audio" in error


def test_a_model_of_half_the_bits_enhances_arrays() -> None:
    model = mvat.Manner(hidden=6, depth=1).bfloat16().eval()
    with mvat.use_backend("eager"):
        y = mvat.enhance(noise(500), model)
    assert y.dtype == np.float32 and np.isfinite(y).all() and y.any()


@pytest.mark.cuda
def test_windows_in_batches_are_those_one_by_one(model: mvat.Manner) -> None:
    x = noise(2, 80000)
    on_cpu, on_gpu = mvat.enhance(x, model, window=1), mvat.enhance(x, copy.deepcopy(model).cuda(), window=1)
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-4)


def test_the_package_names_its_parts_at_first_use() -> None:
    assert {"Manner", "enhance", "use_backend", "kernels", "losses"} <= set(dir(mvat))
    assert mvat.kernels.attention_map is not None
    with pytest.raises(AttributeError, match="no attribute 'enhence'"):
        mvat.enhence  # noqa: B018
