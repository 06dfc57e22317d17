import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data import ArrayPairs, EpochSampler, FilePairs, Segments
from train.tempo import change_speed, change_tempo


def ramp_pairs(*lengths: int) -> ArrayPairs:
    """Recordings whose samples count up, so that a segment tells where it was taken."""
    return ArrayPairs(
        [(f"r{i}", np.arange(1, n + 1, dtype=np.float32), np.zeros(n, np.float32)) for i, n in enumerate(lengths)]
    )


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.integers(1, 120), st.integers(1, 120))
def test_segments_reach_every_sample_at_the_stated_stride(lengths, length, stride):
    segments = Segments(ramp_pairs(*lengths), length, stride)
    starts = [int(segments[(1, i)][0][0, 0]) for i in range(len(segments))]
    hops = [max(-(-(n - length) // stride), 0) + 1 for n in lengths]
    assert starts == [
        1 + k * stride for n, hop in zip(lengths, hops, strict=True) for k in range(hop) if k * stride < n
    ]
    if stride <= length:
        last = max(int(segments[(1, i)][0].max()) for i in range(len(segments)))
        assert last == max(lengths)
    for clean, noisy in (segments[(1, i)] for i in range(len(segments))):
        assert clean.shape == noisy.shape == (1, length)
        assert clean.dtype == torch.float32


def test_a_short_recording_is_padded_with_zeros():
    (clean, _) = Segments(ramp_pairs(3), 5, 5)[(1, 0)]
    assert clean.tolist() == [[1, 2, 3, 0, 0]]


def test_order_and_augmentation_are_functions_of_seed_and_epoch():
    rng = np.random.default_rng(0)
    pairs = ArrayPairs([("a", *rng.standard_normal((2, 9000)).astype(np.float32))])
    first, again = (Segments(pairs, 2000, 500, (0.8, 1.2), 0.7, seed=3) for _ in range(2))
    other = Segments(pairs, 2000, 500, (0.8, 1.2), 0.7, seed=4)
    assert all(torch.equal(a, b) for i in range(len(first)) for a, b in zip(first[(2, i)], again[(2, i)], strict=True))
    assert any(not torch.equal(first[(2, i)][0], first[(5, i)][0]) for i in range(len(first)))
    assert any(not torch.equal(first[(2, i)][0], other[(2, i)][0]) for i in range(len(first)))
    sampler, twin = EpochSampler(50, 1), EpochSampler(50, 1)
    sampler.epoch = twin.epoch = 2
    order = list(sampler)
    assert order == list(twin) and sorted(i for _, i in order) == list(range(50)) and {e for e, _ in order} == {2}
    twin.epoch = 3
    assert [i for _, i in order] != [i for _, i in twin]


def test_tempo_changes_the_clean_track_and_keeps_the_noise():
    t = np.arange(32000) / 16000
    clean = np.sin(2 * np.pi * (100 + 80 * t) * t).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    segments = Segments(ArrayPairs([("a", clean, clean + noise)]), 16000, 16000, (1.1, 1.1), 1.0)
    slow = Segments(ArrayPairs([("a", clean, clean + noise)]), 16000, 16000, (0.9, 0.9), 1.0)
    for example in (segments[(1, 0)], slow[(1, 0)]):
        changed, noisy = (x[0].numpy() for x in example)
        assert not np.allclose(changed, clean[:16000], atol=1e-3)
        assert np.allclose(noisy - changed, noise[:16000], atol=1e-5)


def test_a_remixed_segment_has_another_noise_at_its_own_level():
    tones = {name: np.sin(2 * np.pi * hertz / 16000 * np.arange(16000)) for name, hertz in (("a", 500), ("b", 3000))}
    speech = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    pairs = [
        (name, speech, speech + np.float32(level) * tone.astype(np.float32))
        for (name, tone), level in zip(tones.items(), (0.1, 2.0), strict=True)
    ]
    segments = Segments(ArrayPairs(pairs), 16000, 16000, remix_share=1.0)
    seen = set()
    for epoch in range(8):
        clean, noisy = (track.numpy()[0] for track in segments[(epoch, 0)])
        noise = noisy - clean
        assert np.array_equal(clean, speech) and np.sqrt(2 * np.square(noise).mean()) == pytest.approx(0.1, rel=1e-3)
        seen.add(max(tones, key=lambda name: abs(noise @ tones[name])))
    assert seen == {"a", "b"}
    assert np.array_equal(segments[(3, 0)][1], segments[(3, 0)][1])


@pytest.mark.parametrize("case", ["shorter", "silent", "a step of 16 bits", "about to vanish"])
def test_a_remixed_segment_keeps_its_noise_where_the_other_is_no_use(case):
    speech, noise = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    click = np.zeros_like(speech)
    click[500] = 2**-15
    others = {"shorter": noise[:10], "silent": 0 * noise, "a step of 16 bits": click, "about to vanish": noise * 1e-22}
    other = np.zeros_like(others[case])
    segments = Segments(
        ArrayPairs([("a", speech, speech + noise), ("b", other, others[case])]), 800, 1000, remix_share=1
    )
    for epoch in range(8):
        clean, noisy = (track.numpy()[0] for track in segments[(epoch, 0)])
        np.testing.assert_allclose(noisy - clean, noise[:800], atol=1e-6)


def test_hiss_is_in_both_tracks_and_the_noise_stays():
    speech, noise = np.random.default_rng(0).standard_normal((2, 2000)).astype(np.float32)
    pairs = ArrayPairs([("a", 0.1 * speech, 0.1 * speech + 0.01 * noise), ("b", 0 * speech, noise)])
    segments = Segments(pairs, 2000, 2000, hiss_share=1.0)
    levels = []
    for epoch in range(32):
        clean, noisy = (track.numpy()[0] for track in segments[(epoch, 0)])
        np.testing.assert_allclose(noisy - clean, 0.01 * noise, atol=1e-6)
        hiss = clean - 0.1 * speech
        levels.append(10 * np.log10(np.square(hiss).mean() / np.square(0.1 * speech).mean()))
        assert not segments[(epoch, 1)][0].any()  # a hiss would be all there is
    assert -60 <= min(levels) < -50 and -40 < max(levels) <= -30
    drawn = [Segments(pairs, 2000, 2000, hiss_share=0.5)[(epoch, 0)][0].numpy()[0] for epoch in range(32)]
    assert 8 <= sum(np.array_equal(clean, 0.1 * speech) for clean in drawn) <= 24


@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_speed_changes_pitch_and_length(speed):
    x = np.sin(2 * np.pi * 400 / 16000 * np.arange(16000)).astype(np.float32)
    y = change_speed(x, speed)
    assert y.dtype == np.float32 and abs(len(y) - 16000 / speed) <= 1
    peak = np.argmax(np.abs(np.fft.rfft(y[:8000] * np.hanning(8000)))) * 2
    assert peak == pytest.approx(400 * speed, abs=2)
    pairs = ArrayPairs([("a", x, x + 0.01)])
    with_pitch = Segments(pairs, 8000, 16000, (speed, speed), 1.0, pitch_share=1.0)[(0, 0)][0].numpy()[0]
    assert np.corrcoef(with_pitch[1000:7000], change_speed(x[: len(with_pitch) * 2], speed)[1000:7000])[0, 1] > 0.999
    with pytest.raises(ValueError, match="speed must be positive"):
        change_speed(x, 0.0)


def test_another_microphone_filters_both_tracks_alike():
    speech, noise = np.random.default_rng(0).standard_normal((2, 16000)).astype(np.float32)
    segments = Segments(ArrayPairs([("a", speech, speech + 0.1 * noise)]), 16000, 16000, filter_share=1.0)
    for epoch in range(4):
        clean, noisy = (track.numpy()[0] for track in segments[(epoch, 0)])
        by_speech = np.fft.rfft(clean) / np.fft.rfft(speech)
        by_noise = np.fft.rfft(noisy - clean) / np.fft.rfft(0.1 * noise)
        np.testing.assert_allclose(by_speech[10:-10], by_noise[10:-10], rtol=0.02)
        gain = 20 * np.log10(np.abs(by_speech[100:]))
        assert 0.5 < gain.std() < 8 and np.abs(np.diff(gain)).max() < 0.5


@pytest.mark.parametrize("tempo", [0.8, 1.2])
def test_a_segment_of_another_tempo_can_be_remixed(tempo):
    speech, noise = np.random.default_rng(0).standard_normal((2, 2000)).astype(np.float32)
    segments = Segments(
        ArrayPairs([("a", speech, speech + 0.5 * noise)]), 800, 1000, (tempo, tempo), 1.0, remix_share=1.0
    )
    for epoch in range(4):
        clean, noisy = (track.numpy()[0] for track in segments[(epoch, 1)])
        assert clean.dtype == noisy.dtype == np.float32
        assert np.square(noisy - clean).mean() == pytest.approx(0.25, rel=0.2)


@pytest.mark.parametrize("tempo", [0.8, 0.9, 1.0, 1.1, 1.25])
def test_change_tempo_keeps_pitch_and_level_and_scales_length(tempo):
    t = np.arange(32000) / 16000
    x = np.sin(2 * np.pi * 220 * t).astype(np.float32)
    y = change_tempo(x, tempo)
    assert len(y) == round(32000 / tempo)
    inner = y[2000:-2000]
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    assert np.argmax(spectrum) * 16000 / len(inner) == pytest.approx(220, abs=2)
    assert np.sqrt(np.mean(inner**2)) == pytest.approx(np.sqrt(0.5), rel=0.03)


@given(st.integers(0, 3000), st.floats(0.5, 2.0))
def test_change_tempo_takes_any_length(length, tempo):
    y = change_tempo(np.ones(length, np.float32), tempo)
    assert len(y) == round(length / tempo) and np.isfinite(y).all()


@pytest.mark.parametrize("tempo", [0.0, -1.0, float("nan")])
def test_change_tempo_refuses_what_is_not_positive(tempo):
    with pytest.raises(ValueError, match="tempo must be positive"):
        change_tempo(np.ones(10, np.float32), tempo)


def test_file_pairs_read_parts_and_refuse_another_rate(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    samples = (np.arange(100) / 200).astype(np.float32)
    for name, rate in (("clean", 16000), ("noisy", 16000), ("fast", 8000)):
        soundfile.write(tmp_path / f"{name}.wav", samples, rate, subtype="FLOAT")
    pairs = FilePairs([("a", tmp_path / "clean.wav", tmp_path / "noisy.wav", 100)])
    assert np.array_equal(pairs.read(0, 20, 30).clean, samples[20:50])
    with pytest.raises(ValueError, match="fast.wav: expected 16000 Hz mono, got 8000 Hz"):
        FilePairs([("a", tmp_path / "clean.wav", tmp_path / "fast.wav", 100)]).read(0)
