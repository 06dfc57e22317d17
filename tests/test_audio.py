"""Audio files: what is read, written and refused."""

import os

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from mvat import audio


def tone(frames: int, channels: int = 1) -> np.ndarray:
    """Float32 [channels, frames]."""
    time = np.arange(frames) / 16000
    return np.stack([0.5 * np.sin(2 * np.pi * 440 * (c + 1) * time) for c in range(channels)]).astype(np.float32)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
@pytest.mark.parametrize("channels", [1, 2])
def test_read_write(tmp_path, suffix, channels):
    path = tmp_path / f"a{suffix}"
    samples = tone(4001, channels)
    audio.write(path, samples, 44100)
    found, rate = audio.read(path)
    assert rate == 44100 and found.dtype == np.float32 and found.shape == (channels, 4001)
    assert np.abs(found - samples).max() <= 0.5 / 32768 + 1e-7
    assert audio.info(path) == (path, 44100, channels, 4001, suffix[1:].upper(), "PCM_16")
    assert np.array_equal(audio.read(path, start=1000, frames=7)[0], found[:, 1000:1007])
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("subtype", "bits"), [("PCM_U8", 8), ("PCM_16", 16), ("PCM_24", 24), ("PCM_32", 32)])
def test_integer_formats_are_rounded_and_limited(tmp_path, subtype, bits):
    path = tmp_path / "a.wav"
    samples = np.array([0.0, 1.0, -1.0, 1.5, -7.0, 0.3, -0.3])
    audio.write(path, samples, 16000, subtype)
    found = audio.read(path)[0][0]
    steps = 2.0 ** (bits - 1)
    expected = np.clip(np.rint(samples * steps), -steps, steps - 1) / steps
    assert np.array_equal(found, expected.astype(np.float32))
    again = tmp_path / "b.wav"
    audio.write(again, found, 16000, subtype)
    assert np.array_equal(audio.read(again)[0][0], found)


def test_float_keeps_what_is_above_full_scale(tmp_path):
    audio.write(tmp_path / "a.wav", np.array([1.5, -3.25], np.float32), 16000, "FLOAT")
    assert audio.read(tmp_path / "a.wav")[0].tolist() == [[1.5, -3.25]]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.wav", None, "no such file"),
        ("zero.wav", b"", "is empty"),
        ("text.wav", b"this is no audio at all" * 10, "no readable audio"),
        ("headerless.raw", b"\0" * 100, "no readable audio"),
    ],
)
def test_unreadable(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for function in (audio.info, audio.read):
        with pytest.raises(audio.AudioError) as error:
            function(path)
        assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)


def test_folder_and_no_samples(tmp_path):
    with pytest.raises(audio.AudioError, match="is a folder"):
        audio.read(tmp_path)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    with pytest.raises(audio.AudioError, match="holds no samples"):
        audio.read(tmp_path / "none.wav")


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_cut_in_the_middle(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    rng = np.random.default_rng(0)
    audio.write(path, rng.uniform(-0.5, 0.5, 60000), 16000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(audio.AudioError, match="cut short"):
        audio.read(path)


def test_wav_written_to_a_pipe_is_not_cut(tmp_path):
    path = tmp_path / "a.wav"
    audio.write(path, tone(1000), 16000)
    content = bytearray(path.read_bytes())
    for place in (4, content.index(b"data") + 4):  # lengths that the writer did not know
        content[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert audio.read(path)[0].shape == (1, 1000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan(tmp_path, value):
    samples = tone(100)[0]
    samples[50] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(audio.AudioError, match="NaN or infinite"):
        audio.read(tmp_path / "a.wav")
    with pytest.raises(audio.AudioError, match="NaN or infinity"):
        audio.write(tmp_path / "b.wav", samples, 16000)
    assert not (tmp_path / "b.wav").exists()


@pytest.mark.parametrize(("start", "frames"), [(-1, 5), (0, 101), (100, -1), (5, 0)])
def test_part_outside_the_file(tmp_path, start, frames):
    audio.write(tmp_path / "a.wav", tone(100), 16000)
    with pytest.raises(audio.AudioError, match="the file has 100"):
        audio.read(tmp_path / "a.wav", start, frames)


def test_write_refuses(tmp_path):
    samples = tone(10)
    for path, subtype, values, reason in (
        ("a.mp3", "PCM_16", samples, ".wav and .flac only"),
        ("a.flac", "FLOAT", samples, "FLAC cannot hold FLOAT"),
        ("a.wav", "PCM_16", samples[:, :0], "not empty"),
        ("a.wav", "PCM_16", samples[None], r"not \[1, 1, 10\]"),
        ("missing/a.wav", "PCM_16", samples, "does not exist"),
    ):
        with pytest.raises(audio.AudioError, match=reason):
            audio.write(tmp_path / path, values, 16000, subtype)
    with pytest.raises(TypeError, match="int16"):
        audio.write(tmp_path / "a.wav", np.zeros(10, np.int16), 16000)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("suffix", "subtype"), [(".wav", "PCM_16"), (".flac", "PCM_24"), (".wav", "FLOAT")])
def test_blocks_written_and_read_are_the_whole(tmp_path, suffix, subtype):
    samples = tone(10001, 2)
    audio.write(tmp_path / f"whole{suffix}", samples, 16000, subtype)
    path = tmp_path / f"blocks{suffix}"
    with audio.writing(path, 16000, 2, 10001, subtype) as put:
        for begin in range(0, 10001, 3000):
            put(samples[:, begin : begin + 3000])
        assert not path.exists()
    if subtype != "FLOAT":  # whose header holds the time
        assert path.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    found = list(audio.blocks(path, 4000))
    assert [block.shape for block in found] == [(2, 4000), (2, 4000), (2, 2001)]
    assert np.array_equal(np.concatenate(found, 1), audio.read(path)[0])


def test_what_a_wav_cannot_hold_becomes_rf64(tmp_path, monkeypatch):
    for frames, expected in ((2**31 - 2**15, "WAV"), (2**31 - 2**15 + 1, "RF64")):
        with audio.writing(tmp_path / "a.wav", 16000, 1, frames) as put:
            put(tone(100))
        assert audio.info(tmp_path / "a.wav")[1:] == (16000, 1, 100, expected, "PCM_16")


@pytest.mark.parametrize(("rate_in", "rate_out"), [(44100, 16000), (16000, 48000), (8000, 16000), (16000, 11025)])
@pytest.mark.parametrize("frames", [1, 5, 20011])
def test_resampled_blocks_are_the_whole(rate_in, rate_out, frames):
    samples = tone(frames, 2)
    whole = audio.resample(samples, rate_in, rate_out)
    for length in (whole.shape[1], whole.shape[1] + 3, max(1, whole.shape[1] - 3)):
        parts = (samples[:, begin : begin + 3000] for begin in range(0, frames, 3000))
        found = np.concatenate(list(audio.resample_blocks(parts, rate_in, rate_out, length)), 1)
        assert found.dtype == np.float32 and found.shape == (2, length)
        common = min(length, whole.shape[1])
        assert np.array_equal(found[:, :common], whole[:, :common]) and not found[:, common:].any()


def test_failed_write_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    audio.write(path, tone(10), 16000)
    before = path.read_bytes()

    def full(file, samples):
        raise OSError("no space left on device")

    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    with pytest.raises(audio.AudioError, match="no space left"):
        audio.write(path, tone(20), 16000)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.wav"]


def test_unwritable_folder():
    with pytest.raises(audio.AudioError, match="cannot be written"):
        audio.write("/proc/a.wav", tone(10), 16000)  # root cannot either


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 5000), rate=st.sampled_from([8000, 16000, 22050, 44100, 48000]))
def test_resample_length(frames, rate):
    result = audio.resample(tone(frames, 2), rate, 16000)
    assert result.dtype == np.float32 and result.shape == (2, int(frames * 16000 / rate + 0.5))


def test_resample_keeps_a_tone():
    time = np.arange(48000) / 48000
    found = audio.resample(np.sin(2 * np.pi * 1000 * time), 48000, 16000)
    error = found - np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(error[500:-500]).max() < 1e-4
    assert audio.resampler_name().startswith("soxr VHQ ")


def test_missing_package_says_how_to_install():
    with pytest.raises(ModuleNotFoundError, match="pip install no_such_package"):
        audio.require("no_such_package")
