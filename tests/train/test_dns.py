"""Speech and noise mixed while they are read: preparation of the DNS challenge's folders, mixtures, a training run."""

import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from mvat import audio
from train import command, dns, manifest, mixtures, prepare, teacher
from train.config import MixConfig, ModelConfig, RunConfig
from train.data import EpochSampler
from train.dns import find_folders, prepare_dns
from train.manifest import ManifestError, Recording
from train.mixing import active_rms, reverberate
from train.mixtures import PAUSE, PEAK, Mixer, Mixtures

REPO = Path(__file__).parents[2]
READERS = [f"reader_{i:05d}" for i in range(12)]


def write(path: Path, samples: np.ndarray, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples.T, rate)
    return path


def miniature(folder: Path) -> Path:
    """The challenge's folders with a few recordings of a second or so, and one of every kind that makes trouble."""
    rng = np.random.default_rng(0)
    data = folder / "datasets"
    clean, noise, rooms = data / "clean", data / "noise", data / "impulse_responses"
    speech = 0.1 * rng.standard_normal(8 * 16000) * (1 + np.sin(np.arange(8 * 16000) / 3000))
    for i, reader in enumerate(READERS):
        write(clean / f"book_00001_chp_0002_{reader}_{i}.wav", speech[i * 4000 : i * 4000 + 19200])
    write(clean / "book_00001_chp_0002_reader_00001_long.flac", speech)
    write(clean / "book_00001_chp_0002_reader_00002_stereo.wav", np.stack([speech[:24000], speech[:24000]]))
    write(clean / "book_00001_chp_0002_reader_00003_48k.wav", audio.resample(speech[:32000], 16000, 48000), 48000)
    write(clean / "book_00001_chp_0002_reader_00004_silent.wav", np.zeros(16000))
    write(clean / "book_00001_chp_0002_reader_00005_short.wav", speech[:400])
    (clean / "book_00001_chp_0002_reader_00006_corrupt.wav").write_bytes(b"RIFF, but no more of it")
    (clean / "Readme.md").write_text("not audio")
    (clean / os.fsdecode(b"latin-\xe9.wav")).write_bytes(b"RIFF")
    for i in range(11):
        write(noise / f"traffic_{i:06d}_0.wav", 0.05 * rng.standard_normal(16000))
    write(noise / "bus_84241_1.ogg", 0.05 * rng.standard_normal(32000))
    response = rng.standard_normal(4000) * np.exp(-np.arange(4000) / 500)
    response[:30] = 0
    response[30] = 9
    for i in range(3):
        write(rooms / f"SLR26/simulated_rirs_16k/smallroom/Room{i:03d}/Room{i:03d}-00001.wav", response / 10)
    real = rooms / "SLR28/RIRS_NOISES/real_rirs_isotropic_noises"
    write(real / "RVB2014_type1_rir_largeroom1_near_angla.wav", np.stack([response, response[::-1]]) / 10)
    write(real / "RVB2014_type1_noise_largeroom1_1.wav", rng.standard_normal(16000) / 10)
    for reverb in ("no_reverb", "with_reverb"):
        test = data / "test_set" / "synthetic" / reverb
        for name, number in (("clnsp1_train_69005_1_snr15_tl-21", 158), ("clnsp104_G3hs6PFniM0_snr-4_tl-27", 13)):
            write(test / "clean" / f"clean_fileid_{number}.wav", speech[:16000])
            write(test / "noisy" / f"{name}_fileid_{number}.wav", speech[:16000] + speech[16000:32000])
        write(test / "noisy" / "clnsp7_bus_84241_6_snr7_tl-24_fileid_20.wav", speech[:16000])
    return folder


def arguments(**options: object) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return miniature(tmp_path_factory.mktemp("dns") / "DNS-Challenge")


@pytest.fixture(scope="module")
def data(source) -> manifest.Manifest:
    return prepare_dns(find_folders(source), source.parent / "data", valid_minutes=0.34, progress=False)


@pytest.fixture(scope="module")
def recordings(data) -> dict[str, list[Recording]]:
    return manifest.recordings(data)


def tone(path: Path, rate: int, seconds: float, frequency: float = 440.0) -> Recording:
    t = np.arange(round(seconds * rate)) / rate
    write(path, 0.3 * np.sin(2 * np.pi * frequency * t), rate)
    return Recording(str(path), len(t), rate, 1, path.stem)


# Preparation


def test_the_challenges_folders_are_listed_and_speakers_held_out(source, data, recordings, capsys):
    assert data.source == "dns" and data.train == () and manifest.load(data.path.parent) == data
    speakers = {entry.speaker for entry in data.valid}
    listed = {recording.group for recording in recordings["clean"]}
    assert speakers and not speakers & listed and speakers | listed <= set(READERS) and 9 < len(listed) < 12
    held = {entry.noise for entry in data.valid}
    assert held and not held & {recording.group for recording in recordings["noise"]}
    shapes = {Path(r.path).stem.rpartition("_")[2]: (r.frames, r.sample_rate, r.channels) for r in recordings["clean"]}
    assert (shapes["long"], shapes["stereo"], shapes["48k"]) == (
        (128000, 16000, 1),
        (24000, 16000, 2),
        (96000, 48000, 1),
    )
    assert len(recordings["noise"]) == 11 and len(recordings["rir"]) == 3
    assert {entry.name: (entry.speaker, entry.noise, entry.snr, entry.frames) for entry in data.test} == {
        "clnsp104_G3hs6PFniM0_snr-4_tl-27_fileid_13": ("clnsp104", "G3hs6PFniM0", -4.0, 16000),
        "clnsp1_train_69005_1_snr15_tl-21_fileid_158": ("clnsp1", "train_69005_1", 15.0, 16000),
    }
    assert {entry.clean.name for entry in data.test} == {"clean_fileid_13.wav", "clean_fileid_158.wav"}
    assert prepare.main(["dns", *arguments(source=source, out=data.path.parent, valid_minutes=0.34)]) == 0
    told = capsys.readouterr().out
    for reason in (
        "silent.wav: is silent",
        "short.wav: too short",
        "corrupt.wav: no readable",
        "fileid_20.wav: has no",
        "UTF-8",
    ):
        assert reason in told
    assert "largeroom1_1.wav: is noise" in told and "6 files left out" in told


def test_the_folders_of_every_edition_are_found(tmp_path):
    def made(edition: str, *names: str) -> Path:
        for name in names:
            (tmp_path / edition / name).mkdir(parents=True)
        return tmp_path / edition

    full = made("full", "datasets_fullband/clean_fullband/read_speech", "datasets_fullband/noise_fullband")
    (full / "datasets/impulse_responses/SLR26").mkdir(parents=True)
    found = find_folders(full)
    assert found.clean == (full / "datasets_fullband/clean_fullband",) and found.test is None
    assert found.noise == (full / "datasets_fullband/noise_fullband",)
    assert found.rir == (full / "datasets/impulse_responses",)
    assert find_folders(full / "datasets_fullband")[:2] == found[:2]
    fourth = made("fourth", "datasets/noise", "datasets/read_speech", "datasets/german_speech", "datasets/dev_testset")
    assert find_folders(fourth).clean == (fourth / "datasets/german_speech", fourth / "datasets/read_speech")


def test_a_preparation_is_reproducible_and_done_once(source, data, tmp_path):
    folders = find_folders(source)
    same = prepare_dns(folders, tmp_path / "same", valid_minutes=0.34, progress=False)
    assert (tmp_path / "same/recordings.csv").read_bytes() == data.recordings.read_bytes()
    for a, b in zip(same.valid, data.valid, strict=True):
        assert a.noisy.read_bytes() == b.noisy.read_bytes() and a.clean.read_bytes() == b.clean.read_bytes()
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "same").rglob("*")}
    assert prepare_dns(folders, tmp_path / "same", valid_minutes=0.34, progress=False) == same
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "same").rglob("*")} == stamps
    with pytest.raises(ManifestError, match="other settings .*seed 0, now 1"):
        prepare_dns(folders, tmp_path / "same", valid_minutes=0.34, seed=1, progress=False)
    other = prepare_dns(folders, tmp_path / "other", valid_minutes=0.34, seed=1, progress=False)
    assert other.valid[0].noisy.read_bytes() != data.valid[0].noisy.read_bytes()


def test_ones_own_folders_that_are_split_already(tmp_path):
    rng = np.random.default_rng(0)
    for split in manifest.SPLITS:
        for i in range(2):
            write(tmp_path / "speech" / split / f"anna_{split}" / f"{i}.flac", 0.1 * rng.standard_normal(16000))
            write(tmp_path / "noises" / split / "rain" / f"{i}.wav", 0.1 * rng.standard_normal(44100), 44100)
    (tmp_path / "speech" / "train" / "loop").symlink_to(tmp_path / "speech", target_is_directory=True)
    options = arguments(clean=tmp_path / "speech", noise=tmp_path / "noises", out=tmp_path / "data", test_minutes=0.2)
    assert prepare.main(["dns", *options, *arguments(valid_minutes=0.2)]) == 0
    made = manifest.load(tmp_path / "data")
    assert [(entry.speaker, entry.noise, entry.frames) for entry in made.valid] == [("anna_valid", "rain", 160000)]
    assert [entry.speaker for entry in made.test] == ["anna_test"]
    listed = manifest.recordings(made)
    assert {r.sample_rate for r in listed["noise"]} == {44100} and len(listed["noise"]) == 2 and not listed["rir"]


def test_a_noise_named_train_is_no_split(tmp_path):
    for kind in ("train", "bus"):
        for i in range(2):
            write(tmp_path / kind / f"{i}.wav", np.ones(8000) / 10)
    found = dns._index("noise", [tmp_path], [], False)
    assert set(found) == {None} and {recording.group for recording in found[None].values()} == {"train", "bus"}


def test_a_test_set_at_another_rate_is_resampled(tmp_path, source):
    for side in ("clean", "noisy"):
        write(tmp_path / "pairs" / side / "a.wav", 0.1 * np.ones(48000), 48000)
    folders = find_folders(source)._replace(rir=(), test=tmp_path / "pairs")
    made = prepare_dns(folders, tmp_path / "data", valid_minutes=0.17, progress=False)
    (entry,) = made.test
    assert (entry.name, entry.frames, entry.noise) == ("a", 16000, None) and audio.info(entry.noisy).frames == 16000
    assert manifest.recordings(made)["rir"] == []


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ({"a": 1, "b": 1, "c": 1}, {"files": 1}),  # three speakers: one
        ({f"s{i}": 1 for i in range(40)}, {"files": 2}),
        ({"german": 60, **{f"s{i}": 2 for i in range(20)}}, {"not": "german"}),
        ({"a": 20}, {"files": 1}),  # one speaker: files
        ({"a": 2}, {"files": 1}),
    ],
)
def test_what_is_held_out(sizes, held):
    files = [Recording(f"{group}{i}", 100, 10, 1, group) for group, n in sizes.items() for i in range(n)]
    out = dns._hold_out(files, np.random.default_rng(0))
    assert 0 < len(out) <= max(1, 0.15 * len(files))
    assert len(out) == held.get("files", len(out))
    assert not any(path.startswith(held.get("not", "none")) for path in out)
    groups = {file.group for file in files if file.path in out}
    if len(sizes) > 1:
        assert all(file.path in out for file in files if file.group in groups)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"clean": "none", "noise": "noise"}, "none: no such folder .--clean"),
        ({"source": "none"}, "none: no such folder"),
        ({"source": "noise"}, "has none of the folders datasets/clean, .*name yours with --clean"),
        ({"clean": "clean"}, "needs --source, or --clean and --noise"),
        ({"clean": "empty", "noise": "noise"}, "empty: holds no .wav, .flac, .ogg files"),
        ({"clean": "damaged", "noise": "noise"}, "damaged: none of its files can be used, the first: .*a.wav"),
        ({"clean": "one", "noise": "noise"}, "one: leaves no clean recordings for valid; it takes two files at least"),
        ({"clean": "split", "noise": "noise"}, "split: leaves no clean recordings for train"),
        ({"clean": "clean", "noise": "clean"}, "roles need folders apart"),
        ({"clean": "clean", "noise": "noise", "out": "clean/data"}, "lies in .*clean .--clean"),
        ({"clean": "clean", "noise": "noise", "test": "clean"}, "has no folder 'clean'"),
        ({"clean": "clean", "noise": "noise", "test": "unpaired"}, "no clean file has its noisy one"),
        ({"clean": "clean", "noise": "noise", "valid_minutes": "0"}, "minutes of valid"),
        ({"clean": "clean", "noise": "noise", "valid_minutes": "nan"}, "minutes of valid"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_and_writes_nothing(tmp_path, source, capsys, options, reason):
    shutil.copytree(source / "datasets/noise", tmp_path / "noise")
    for folder, names in {"empty": (), "damaged": ("a.wav",), "clean": "ab", "one": "a", "unpaired": ()}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            write(tmp_path / folder / f"{name}.flac", np.ones(16000) / 10)
    for file in (tmp_path / "damaged").iterdir():
        file.write_bytes(b"RIFF")
    (tmp_path / "damaged/a.wav").write_bytes(b"RIFF")
    write(tmp_path / "split/valid/a.wav", np.ones(16000) / 10)
    (tmp_path / "split/train").mkdir()
    (tmp_path / "split/train/a.wav").write_bytes(b"RIFF")
    for side, name in (("clean", "clean_fileid_1"), ("noisy", "x_fileid_2")):
        write(tmp_path / "unpaired" / side / f"{name}.wav", np.ones(16000) / 10)
    given = {"out": "out", **options}
    given = {key: value if key == "valid_minutes" else tmp_path / value for key, value in given.items()}
    before = sorted(tmp_path.rglob("*"))
    assert prepare.main(["dns", *arguments(**given)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(reason, error), error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_list_of_recordings_is_named(data, tmp_path):
    shutil.copytree(data.path.parent, tmp_path / "data")
    copy = manifest.load(tmp_path / "data")
    lines = copy.recordings.read_text().splitlines(keepends=True)
    for line in ("clean,x.wav,many,16000,1,a\n", "song,x.wav,1,16000,1,a\n", "clean,x.wav\n"):
        copy.recordings.write_text("".join([*lines[:3], line]))
        with pytest.raises(ManifestError, match="recordings.csv:4: expected role, path, frames"):
            manifest.recordings(copy)
    copy.recordings.unlink()
    with pytest.raises(ManifestError, match="recordings.csv is missing"):
        manifest.load(tmp_path / "data")


# Mixtures


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
def test_items_depend_on_seed_epoch_and_index_alone(recordings):
    def items(workers: int, epoch: int = 1, seed: int = 0) -> list[torch.Tensor]:
        examples = Mixtures(Mixer(*(recordings[role] for role in manifest.ROLES)), 12000, 8, seed)
        sampler = EpochSampler(len(examples), 5)
        sampler.epoch = epoch
        loader = DataLoader(examples, 4, sampler=sampler, num_workers=workers)
        return [torch.stack(batch) for batch in loader]

    once = items(0)
    assert len(once) == 2 and all(batch.shape == (2, 4, 1, 12000) and batch.dtype == torch.float32 for batch in once)
    for workers in (0, 1, 3):
        assert all(map(torch.equal, once, items(workers)))
    for other in (items(0, epoch=2), items(0, seed=1)):
        assert not any(map(torch.equal, once, other))
    flat = torch.cat([batch[0] for batch in once])
    assert len({tuple(clip.flatten().tolist()) for clip in flat}) == 8


def decibels(ratio: float) -> float:
    return 20 * math.log10(ratio)


def test_ratio_and_level_are_those_drawn(recordings):
    mixer = Mixer(recordings["clean"], recordings["noise"], snr=(-5, 20), level=(-30, -25))
    ratios = []
    for seed in range(20):
        clean, noisy, _, _, snr = mixer.draw(np.random.default_rng(seed), 40000)
        assert clean.dtype == noisy.dtype == np.float32 and clean.shape == noisy.shape == (40000,)
        reached = decibels(active_rms(clean) / active_rms(noisy.astype(np.float64) - clean))
        assert reached == pytest.approx(snr, abs=1e-3)
        assert -30.001 <= decibels(math.sqrt(np.mean(noisy.astype(np.float64) ** 2))) <= -24.999
        ratios.append(snr)
    assert min(ratios) < 0 < 15 < max(ratios)


def test_loud_mixtures_are_turned_down_together(recordings):
    mixer = Mixer(recordings["clean"], recordings["noise"], level=(-3, -3))
    clean, noisy, _, _, snr = mixer.draw(np.random.default_rng(0), 16000)
    assert max(np.abs(clean).max(), np.abs(noisy).max()) == pytest.approx(PEAK, rel=1e-6)
    assert decibels(active_rms(clean) / active_rms(noisy - clean)) == pytest.approx(snr, abs=1e-3)


def test_pauses_and_intermittence_do_not_lower_the_active_level():
    loud = np.ones(16000, np.float32)
    quiet = np.full(16000, 1e-3, np.float32)
    assert active_rms(np.concatenate([loud, quiet, 0 * loud])) == pytest.approx(1)
    assert active_rms(np.concatenate([loud, 0.5 * loud])) == pytest.approx(math.sqrt(0.625))
    assert active_rms(loud[:100]) == 1 and active_rms(0 * loud) == 0


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    read: dict[str, int] = {}
    original = soundfile.SoundFile.read

    def spy(self, frames=-1, *args, **kwargs):
        assert frames > 0
        read[Path(self.name).stem] = read.get(Path(self.name).stem, 0) + frames
        return original(self, frames, *args, **kwargs)

    long = [tone(tmp_path / "speech.flac", 16000, 30), tone(tmp_path / "noise.wav", 48000, 30)]
    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    mixer = Mixer(long[:1], long[1:])
    for seed in range(3):
        read.clear()
        mixer.draw(np.random.default_rng(seed), 8001)
        assert read == {"speech": 8001, "noise": 24003}


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("frames", [1601, 16000])
def test_another_rate_keeps_length_and_pitch(tmp_path, rate, frames):
    recording, part = mixtures._excerpt(np.random.default_rng(0), [tone(tmp_path / "a.wav", rate, 2.0)], frames)
    assert len(part) == frames and active_rms(part) == pytest.approx(1, rel=1e-5)
    place = np.argmax(np.abs(np.fft.rfft(part * np.hanning(frames), 160000)))
    assert place / 10 == pytest.approx(440, abs=0.5)
    short = mixtures._excerpt(np.random.default_rng(0), [recording], 40000)[1]
    assert len(short) == 32000


def test_short_speech_is_joined_with_pauses_and_short_noise_starts_over(tmp_path):
    speech = [tone(tmp_path / f"s{i}.wav", 16000, 0.6, 300 + 50 * i)._replace(group=f"s{i % 2}") for i in range(4)]
    mixer = Mixer(speech, [tone(tmp_path / "n.wav", 16000, 0.7, 97)])
    row, speaker = mixer._speech(np.random.default_rng(0), 40000)
    pause = round(PAUSE * 16000)
    for k in range(3):
        start = k * (9600 + pause)
        piece = row[start : start + 9600]
        assert active_rms(piece) == pytest.approx(1, rel=1e-5) and not row[start + 9600 : start + 9600 + pause].any()
        heard = np.argmax(np.abs(np.fft.rfft(piece * np.hanning(9600)))) * 16000 / 9600
        assert round((heard - 300) / 50) % 2 == int(speaker[1])  # the same voice goes on
    assert not row[3 * (9600 + pause) :].any()  # too little is left for another one
    noise, _ = mixer._noise(np.random.default_rng(0), 40000)
    assert np.array_equal(noise[:11200], noise[11200:22400]) and noise[-100:].any()


def test_silent_and_damaged_recordings_are_passed_over(tmp_path):
    good, silent = tone(tmp_path / "good.wav", 16000, 1), tone(tmp_path / "silent.wav", 16000, 1)
    write(tmp_path / "silent.wav", np.zeros(16000))
    damaged = tone(tmp_path / "damaged.flac", 16000, 1)
    Path(damaged.path).write_bytes(Path(damaged.path).read_bytes()[:6000])
    with pytest.warns(UserWarning, match="damaged.flac: .*another recording is drawn"):
        for seed in range(8):
            mixture = Mixer([silent, damaged, good], [good]).draw(np.random.default_rng(seed), 16000)
            assert mixture.speaker == "good"
    with pytest.raises(ValueError, match="20 recordings drawn in a row .*silent.wav: is silent"):
        Mixer([silent], [good]).draw(np.random.default_rng(0), 16000)
    with pytest.raises(ValueError, match="20 recordings .*none.wav: no such file"), pytest.warns(UserWarning):
        Mixer([good], [good._replace(path=str(tmp_path / "none.wav"))]).draw(np.random.default_rng(0), 16000)


@pytest.mark.parametrize("direct", [0, 37, 700])
def test_reverberation_is_a_convolution_without_delay(direct):
    rng = np.random.default_rng(0)
    speech = rng.standard_normal(5000).astype(np.float32)
    response = (0.1 * rng.standard_normal(direct + 3000) * np.exp(-np.arange(direct + 3000) / 900)).astype(np.float32)
    response[direct] = 1
    whole, early = reverberate(speech, response)
    assert whole.dtype == early.dtype == np.float32
    exact = np.convolve(speech.astype(np.float64), response.astype(np.float64))[direct : direct + 5000]
    assert np.abs(whole - exact).max() < 1e-5 * np.abs(exact).max()
    cut = np.convolve(speech.astype(np.float64), response[: direct + 801].astype(np.float64))[direct : direct + 5000]
    assert np.abs(early - cut).max() < 1e-5 * np.abs(cut).max()
    pulse = np.zeros(2000, np.float32)
    pulse[1000] = 1
    assert [int(np.argmax(np.abs(track))) for track in reverberate(pulse, response)] == [1000, 1000]


def test_the_target_of_a_reverberant_mixture_is_its_early_part(tmp_path, recordings):
    echo = np.zeros(8000)
    echo[50], echo[50 + 400], echo[50 + 4000] = 0.8, 0.4, 0.2  # the second comes after 25 ms, the third after 250
    room = Recording(str(write(tmp_path / "room.flac", echo)), 8000, 16000, 1, "room")
    sources = recordings["clean"], recordings["noise"]
    dry = Mixer(*sources).draw(np.random.default_rng(3), 24000)
    wet = Mixer(*sources, [room], reverb_share=1).draw(np.random.default_rng(3), 24000)
    early = np.convolve(dry.clean, [1, *[0] * 399, 0.5])[:24000]
    assert np.allclose(wet.clean / np.abs(wet.clean).max(), early / np.abs(early).max(), atol=1e-4)
    late = np.convolve(dry.clean, [1, *[0] * 399, 0.5, *[0] * 3599, 0.25])[:24000]
    noise = wet.noisy - late * (np.abs(wet.clean).max() / np.abs(early).max())
    gain = active_rms(late) * np.abs(wet.clean).max() / np.abs(early).max()
    assert decibels(gain / active_rms(noise)) == pytest.approx(wet.snr, abs=0.01)
    assert Mixer(*sources, [room]).reverb_share == 0.5 and Mixer(*sources).reverb_share == 0


def test_tempo_changes_the_speech_alone(tmp_path, recordings):
    sources = recordings["clean"], recordings["noise"]
    for tempo in (0.8, 1.25):
        mixture = Mixer(*sources, tempo=(tempo, tempo), tempo_share=1).draw(np.random.default_rng(0), 16001)
        assert len(mixture.clean) == len(mixture.noisy) == 16001 and np.isfinite(mixture.noisy).all()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"clean": []}, "no clean speech"),
        ({"noise": []}, "no noise"),
        ({"snr": (5, -5)}, "snr must be a range"),
        ({"snr": (0, float("nan"))}, "snr must be a range"),
        ({"level": (-10, 3)}, "level must be at most 0 dB"),
        ({"tempo": (0, 1)}, "tempo must be a positive range"),
        ({"reverb_share": 1.5}, "reverb_share must be between 0 and 1"),
        ({"rirs": [], "reverb_share": 0.5}, "needs impulse responses"),
    ],
)
def test_a_mixer_refuses(recordings, settings, reason):
    given = {"clean": recordings["clean"], "noise": recordings["noise"], "rirs": recordings["rir"], **settings}
    with pytest.raises(ValueError, match=reason):
        Mixer(**given)


# Training


def test_two_steps_of_training_through_the_command(tmp_path, data, capsys):
    config = ["--config", str(REPO / "train/configs/dns_teacher.yaml")]
    options = ["--out", str(tmp_path / "run"), "--data.path", str(data.path.parent), "--model.preset", "null"]
    options += ["--model.arguments", "{hidden: 6, depth: 2}", "--data.segment_seconds", "0.25", "--data.workers", "1"]
    options += ["--data.mix.examples", "4", "--optim.batch_size", "2", "--optim.epochs", "1", "--data.valid_limit", "1"]
    options += ["--valid.metrics", "[]", "--valid.select", "loss"]
    assert teacher.main([*config, *options]) == 0
    (row,) = json.loads((tmp_path / "run/history.json").read_text())["epochs"]
    assert row["step"] == 2 and math.isfinite(row["valid"]["loss"])
    assert teacher.main([*config, *options, "--data.mix.snr", "[0, 10]"]) == 2
    assert "data.mix.snr" in capsys.readouterr().err


def test_the_configurations_mix_alike():
    first, second = (
        command.parse(["--config", str(REPO / f"train/configs/dns_{name}.yaml")], "") for name in ("teacher", "mvat")
    )
    assert first.data == second.data and first.optim == second.optim and first.valid == second.valid
    assert first.data.mix == MixConfig(20000, mixtures.SNR, mixtures.LEVEL) and MixConfig().snr == mixtures.SNR
    assert second.transfer.teacher == f"{first.out}/best.pt"


def test_mixing_belongs_to_data_of_its_kind(tmp_path, data):
    def run(path: Path, mix: MixConfig | None, **settings: object) -> RunConfig:
        from train.config import DataConfig

        return RunConfig(str(tmp_path / "run"), ModelConfig("s-4.1gf"), DataConfig(str(path), mix, **settings))

    pairs = manifest.save(tmp_path, "synthetic", {"train": data.valid, "valid": data.valid})
    for config, reason in (
        (run(data.path, None), "give data.mix.examples"),
        (run(pairs.path, MixConfig(4)), "has training pairs, nothing to mix; leave data.mix out"),
        (run(data.path, MixConfig(4, snr=(3.0, 1.0))), "data.mix: snr must be a range"),
        (run(data.path, MixConfig(4), tempo=(1.2, 0.9)), "data.tempo must be a positive range"),
        (run(data.path, MixConfig(4), stride_seconds=0.0), "data.stride_seconds must be positive"),
        (run(data.path, MixConfig(0)), "data.mix: mixtures need a positive length and number"),
        (run(data.path, MixConfig(4), valid_speakers=["reader_00001"]), "valid_speakers is for pairs"),
    ):
        with pytest.raises(ValueError, match=reason):
            command.run(config, "teacher")
    with pytest.raises(ManifestError, match="nothing to mix them from"):
        manifest.recordings(pairs)
    assert not (tmp_path / "run").exists()


def test_names_with_commas_survive_the_list(tmp_path):
    odd = Recording('/speech/a, "b"\nc.wav', 10, 16000, 1, "a, b")
    made = manifest.save(tmp_path, "dns", {}, recordings={"clean": [odd]})
    assert manifest.recordings(made) == {"clean": [odd], "noise": [], "rir": []}
    assert next(csv.reader(made.recordings.open(newline=""))) == list(manifest._COLUMNS)
