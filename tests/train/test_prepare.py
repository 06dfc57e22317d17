"""Preparation of data: VoiceBank-DEMAND's folders, voices from packages, the manifest, the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mvat import audio
from train import manifest, sources, voices
from train.manifest import ManifestError
from train.prepare import main
from train.sources import SOURCES, SourceUnavailable, fetch
from train.synthetic import make_pair, make_speech, voice
from train.voicebank import noisy_scores, prepare_voicebank
from train.voices import prepare_voices, speech_pieces

REPO = Path(__file__).parents[2]
NAMES = {"train": ("p226_001", "p226_002", "p287_001"), "test": ("p232_001", "p232_002")}


def corpus(folder: Path, rate: int = 48000, suffix: str = ".wav", variant: str = "trainset_28spk") -> Path:
    """A tiny VoiceBank-DEMAND."""
    rng = np.random.default_rng(0)
    for split, names in NAMES.items():
        for index, name in enumerate(names):
            sides = make_pair(rng, 0.5 + 0.1 * index)
            for side, samples in zip(("clean", "noisy"), sides, strict=True):
                place = folder / f"{side}_{variant if split == 'train' else 'testset'}_wav"
                place.mkdir(parents=True, exist_ok=True)
                audio.write(place / f"{name}{suffix}", audio.resample(samples, 16000, rate), rate)
    return folder


def prepare(source: Path, out: Path) -> manifest.Manifest:
    return prepare_voicebank(source, out, workers=0, progress=False)


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) if folder.exists() else []


def test_voicebank_48k(tmp_path):
    source, out = corpus(tmp_path / "vbd"), tmp_path / "data"
    (source / "log_testset.txt").write_text("p232_001 bus 17.5\np232_002 cafe 2.5\n")
    data = prepare(source, out)
    assert {split: tuple(e.name for e in data.split(split)) for split in NAMES} == NAMES
    assert data.source == "voicebank" and data.valid == () and data.resampler == audio.resampler_name()
    assert [(e.speaker, e.noise, e.snr) for e in data.test] == [("p232", "bus", 17.5), ("p232", "cafe", 2.5)]
    assert [(e.speaker, e.noise, e.snr) for e in data.train] == [(s, None, None) for s in ("p226", "p226", "p287")]
    for entry in (*data.train, *data.test):
        folder = "testset" if entry in data.test else "trainset_28spk"
        for side in ("clean", "noisy"):
            samples, rate = audio.read(getattr(entry, side))
            original = audio.read(source / f"{side}_{folder}_wav" / f"{entry.name}.wav")[0]
            assert rate == 16000 and samples.shape == (1, entry.frames)
            assert np.abs(samples - audio.resample(original, 48000, 16000)).max() < 1.1 / 32768
    rows = json.loads((out / "manifest.json").read_text())
    assert rows["train"][0]["clean"] == "train/clean/p226_001.wav" and "snr" not in rows["train"][0]


def test_voicebank_16k_stays_in_place(tmp_path):
    source, out = corpus(tmp_path / "vbd", 16000, ".flac", "trainset"), tmp_path / "data"
    before = {file: file.stat().st_mtime_ns for file in source.rglob("*")}
    data = prepare(source, out)
    assert listing(out) == ["manifest.json", "prepare.json"] and data.resampler is None
    assert data.train[0].clean == source / "clean_trainset_wav" / "p226_001.flac" and data.train[0].clean.is_absolute()
    assert {file: file.stat().st_mtime_ns for file in source.rglob("*")} == before


def test_voicebank_continues(tmp_path):
    source, out = corpus(tmp_path / "vbd"), tmp_path / "data"
    first = prepare(source, out)
    kept, cut, lost = (entry.noisy for entry in first.train)
    (out / "manifest.json").unlink()
    audio.write(cut, audio.read(cut)[0][:, :-100], 16000)
    lost.unlink()
    kept_stamp, cut_stamp = kept.stat().st_mtime_ns, cut.stat().st_mtime_ns
    assert prepare(source, out) == first
    assert kept.stat().st_mtime_ns == kept_stamp and cut.stat().st_mtime_ns != cut_stamp
    assert audio.info(cut).frames == first.train[1].frames
    with pytest.raises(ManifestError, match="other settings"):
        prepare(corpus(tmp_path / "other"), out)


def spoil_unmatched(source: Path) -> str:
    for number in range(12):
        shutil.copy(source / "clean_trainset_wav/p226_001.wav", source / f"clean_trainset_wav/p300_{number:03d}.wav")
    (source / "clean_testset_wav/p232_001.wav").unlink()
    return r"(?s)13 problems.*p300_009.wav: has no noisy file\n  and 3 more$"


def spoil_missing_clean(source: Path) -> str:
    (source / "clean_testset_wav/p232_001.wav").unlink()
    return "p232_001.wav: has no clean file"


def spoil_length(source: Path) -> str:
    path = source / "noisy_testset_wav/p232_001.wav"
    audio.write(path, audio.read(path)[0][:, :-1], 48000)
    return "p232_001.wav: has 23999 frames, its clean file 24000"


def spoil_rate_of_one(source: Path) -> str:
    path = source / "noisy_testset_wav/p232_001.wav"
    audio.write(path, audio.read(path)[0], 44100)
    return "p232_001.wav: has 44100 Hz, its clean file 48000"


def spoil_rate_of_pair(source: Path) -> str:
    for side in ("clean", "noisy"):
        path = source / f"{side}_testset_wav/p232_001.wav"
        audio.write(path, audio.read(path)[0], 44100)
    return "must have one sample rate, found 8 files at 48000 Hz, 2 files at 44100 Hz"


def spoil_stereo(source: Path) -> str:
    path = source / "clean_trainset_wav/p226_002.wav"
    audio.write(path, np.tile(audio.read(path)[0], (2, 1)), 48000)
    return "p226_002.wav: has 2 channels, expected mono"


def spoil_corrupt(source: Path) -> str:
    (source / "clean_trainset_wav/p226_002.wav").write_bytes(b"no audio" * 100)
    return "p226_002.wav: no readable audio"


def spoil_cut(source: Path) -> str:
    path = source / "clean_trainset_wav/p226_002.wav"
    path.write_bytes(path.read_bytes()[:-1000])
    return "p226_002.wav: cut short"


def spoil_empty(source: Path) -> str:
    (source / "noisy_testset_wav/p232_002.wav").write_bytes(b"")
    return "p232_002.wav: is empty"


def spoil_twice(source: Path) -> str:
    shutil.copy(source / "clean_testset_wav/p232_001.wav", source / "clean_testset_wav/p232_001.WAV")
    return "two files of one name"


def spoil_folder(source: Path) -> str:
    shutil.rmtree(source / "noisy_testset_wav")
    return "has clean_testset_wav but no folder noisy_testset_wav"


def spoil_variants(source: Path) -> str:
    (source / "clean_trainset_56spk_wav").mkdir()
    return "must have only one of the folders"


def spoil_all(source: Path) -> str:
    shutil.rmtree(source)
    source.mkdir()
    return "has none of the folders clean_trainset_wav"


def spoil_log(source: Path) -> str:
    (source / "log_trainset.txt").write_text("p226_001 cafe 5\np226_002 cafe loud\n")
    return "log_trainset.txt:2: expected a name, a noise and an SNR, found 'p226_002 cafe loud'"


SPOILERS = [value for key, value in list(globals().items()) if key.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_voicebank_refuses_and_writes_nothing(tmp_path, spoil):
    source, out = corpus(tmp_path / "vbd", variant="trainset"), tmp_path / "data"
    with pytest.raises(ManifestError, match=spoil(source)):
        prepare(source, out)
    assert not out.exists()


def test_voicebank_nan_leaves_no_manifest(tmp_path):
    source, out = corpus(tmp_path / "vbd", variant="trainset"), tmp_path / "data"
    path = source / "clean_testset_wav/p232_002.wav"
    samples = audio.read(path)[0][0]
    samples[10] = np.nan
    soundfile.write(path, samples, 48000, subtype="FLOAT")
    with pytest.raises(ManifestError, match=r"p232_002.wav: holds NaN"):
        prepare(source, out)
    assert not (out / "manifest.json").exists() and not (out / "test/clean/p232_002.wav").exists()
    soundfile.write(path, np.nan_to_num(samples), 48000)
    assert len(prepare(source, out).test) == 2


def test_noisy_scores(tmp_path):
    data = prepare(corpus(tmp_path / "vbd", 16000), tmp_path / "data")
    scores = noisy_scores(data, progress=False)
    assert list(scores) == ["pesq_wb", "stoi", "csig", "cbak", "covl", "segsnr"] and 1 <= scores["pesq_wb"] < 4.65


def test_command_line(tmp_path, capfd):
    source, out = corpus(tmp_path / "vbd"), tmp_path / "data"
    command = [sys.executable, "-m", "train.prepare", "voicebank", "--source", str(source), "--out", str(out)]
    done = subprocess.run([*command, "--no-score"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train      3 pairs" in done.stdout and "p226, p287" in done.stdout
    assert done.stderr == ""  # the progress bars are for terminals
    assert len(manifest.load(out).test) == 2

    assert main(["voicebank", "--source", str(tmp_path / "none"), "--out", str(tmp_path / "new"), "--no-score"]) == 2
    assert "has none of the folders" in capfd.readouterr().err and not (tmp_path / "new").exists()
    assert main(["voices", "--out", str(tmp_path / "new"), "--packages", "bash"]) == 2
    assert "bash: not among the sources of voices" in capfd.readouterr().err
    amounts = ["--train-minutes", "0.1", "--valid-minutes", "0", "--test-minutes", "0.1", "--seed", "3"]
    assert main(["synthetic", "--out", str(tmp_path / "new"), *amounts]) == 0
    assert "speakers: voice00" in capfd.readouterr().out
    for wrong in (
        ["synthetic", "--out", "x", "--minutes", "3"],
        ["voicebank", "--sou", "x", "--out", "y"],
        ["radio"],
        [],
    ):
        assert main(wrong) == 2
        error = capfd.readouterr().err
        assert error.startswith("train.prepare: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.update(format="other"), "no manifest of format"),
        (lambda data: data.update(sample_rate=8000), "sample_rate must be 16000, not 8000"),
        (lambda data: data.update(source="radio"), "source must be one of"),
        (lambda data: data.pop("test"), "'test' must be a list"),
        (lambda data: data["train"].append(3), r"train\[3\] must be an object"),
        (lambda data: data["train"][1].pop("speaker"), r"train\[1\]: 'speaker' must be a text"),
        (lambda data: data["train"][1].update(frames="3"), r"train\[1\]: 'frames' must be a positive integer"),
        (lambda data: data["train"].append(data["train"][0]), "names 'p226_001' more than once"),
        (lambda data: data["test"][0].update(clean="gone.wav"), "1 files are missing, the first is .*gone.wav"),
    ],
)
def test_manifest_refuses(tmp_path, change, reason):
    prepare(corpus(tmp_path / "vbd", 16000), tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=reason):
        manifest.load(tmp_path / "data")


def test_manifest_missing_or_no_json(tmp_path):
    with pytest.raises(ManifestError, match="no such manifest"):
        manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="cannot be read as JSON"):
        manifest.load(tmp_path)


def test_manifest_moves_with_its_folder(tmp_path):
    data = prepare(corpus(tmp_path / "vbd"), tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = manifest.load(tmp_path / "moved" / "manifest.json")
    assert moved.train[0].clean == tmp_path / "moved" / "train/clean/p226_001.wav"
    with pytest.raises(ValueError, match="train, valid, test"):
        data.split("dev")


def test_other_packages_are_refused(tmp_path):
    for function in (
        lambda: prepare_voices(tmp_path / "data", packages=["asterisk-core-sounds-xx-g722"], cache=tmp_path / "cache"),
        lambda: fetch(["asterisk-moh-opsound-g722", "fillets-ng-data-nl"], tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match="not among the sources of voices"):
            function()
    with pytest.raises(ValueError, match="hold no voice for: test, valid"):
        prepare_voices(tmp_path / "data", packages=["asterisk-core-sounds-en-g722"], cache=tmp_path / "cache")
    assert listing(tmp_path) == []


def test_no_speaker_and_no_recording_in_two_splits():
    places: dict[str, set[str]] = {}
    for source in SOURCES.values():
        for spoken in source.voices:
            places.setdefault(spoken.speaker, set()).add(spoken.split)
    assert places.pop("june") == {"test"} and places.pop("carlo") == {"valid"}
    assert len(places) == 10 and all(place == {"train"} for place in places.values())
    files = [pattern for source in SOURCES.values() for noise in source.noises for pattern in noise.files]
    assert len(set(files)) == len(files)
    assert {split for source in SOURCES.values() for noise in source.noises for split in [noise.split]} == set(
        manifest.SPLITS
    )


def test_what_is_kept_for_testing_is_never_trained_on():
    kept = {"tuxpaint-stamps-default", "kajongg", "ktuberling-data", "torcs-data", "flightgear-data-base"}
    kept |= {"unknown-horizons", "btanks-data"}
    assert not kept & set(SOURCES)
    patterns = {
        pattern: noise.split for source in SOURCES.values() for noise in source.noises for pattern in noise.files
    }
    assert patterns["samples/loop_3d_printer.flac"] == "test"
    used = [pattern for pattern, split in patterns.items() if split != "test"]
    assert not [
        pattern
        for pattern in used
        for file in ("samples/loop_3d_printer.flac", "ambience/distant_cars.ogg")
        if Path(file).match(pattern)
    ]


def test_speakers_share_the_time_by_the_square_root_of_their_speech():
    second = np.ones(16000, np.float32)
    rng = np.random.default_rng(0)
    utterances = voices._utterances(rng, {"much": [second] * 90, "little": [second] * 10})
    spoken = {"much": 0, "little": 0}
    for _ in range(200):
        speaker, samples = next(utterances)
        spoken[speaker] += len(samples)
    assert spoken["much"] / spoken["little"] == pytest.approx(3, rel=0.05)


@pytest.fixture
def fake_apt(tmp_path, monkeypatch):
    """An apt-get that knows all packages but minetest-data, and notes its calls; nothing comes from the network."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "apt-get"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        f'if [ -e {tmp_path}/offline ]; then echo "E: no network" >&2; exit 100; fi\n'
        'for last in "$@"; do :; done\n'
        'case "$last" in update) ;; minetest-data) echo "E: Unable to locate package" >&2; exit 100 ;;\n'
        '*) echo deb > "${last}_1.0_all.deb" ;; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_fetch(fake_apt, caplog):
    cache, calls = fake_apt / "cache", fake_apt / "calls"
    names = ["minetest-data", "asterisk-moh-opsound-g722", "asterisk-core-sounds-en-g722"]
    files = fetch(names, cache, progress=False)
    assert list(files) == ["asterisk-core-sounds-en-g722", "asterisk-moh-opsound-g722"]
    assert all(file.parent == cache and file.read_text() == "deb\n" for file in files.values())
    assert "minetest-data cannot be downloaded (E: Unable to locate package); left out" in caplog.text
    lines = calls.read_text().splitlines()
    assert len(lines) == 4 and all(f"Dir::State::Lists={cache}/apt/lists" in line for line in lines)
    # What is in the cache needs no network.
    (fake_apt / "offline").touch()
    assert fetch(names[1:], cache, progress=False) == files and len(calls.read_text().splitlines()) == 4
    with pytest.raises(SourceUnavailable, match="asterisk-core-sounds-fr-g722 cannot be downloaded .*no network"):
        fetch(["asterisk-core-sounds-fr-g722"], cache, progress=False)
    assert [file for file in listing(cache) if not file.startswith("apt")] == sorted(f.name for f in files.values())


def test_voices_unavailable_leaves_nothing(fake_apt, monkeypatch):
    out = fake_apt / "data"
    (fake_apt / "offline").touch()
    with pytest.raises(SourceUnavailable, match="no network"):
        prepare_voices(out, cache=fake_apt / "cache", progress=False)
    (fake_apt / "offline").unlink()
    with pytest.raises(SourceUnavailable, match="cannot be unpacked|dpkg-deb is not installed"):
        prepare_voices(out, cache=fake_apt / "cache", progress=False)
    monkeypatch.setattr(sources.shutil, "which", lambda name: None)
    with pytest.raises(SourceUnavailable, match="apt-get is not installed"):
        prepare_voices(out, cache=fake_apt / "empty", progress=False)
    assert not out.exists()


def test_unwritable_folders():
    folder = Path("/proc/mvat")  # root cannot write there either
    with pytest.raises(ManifestError, match="/proc/mvat: cannot be written"):
        manifest.claim(folder, {"source": "synthetic"})
    if shutil.which("apt-get"):
        with pytest.raises(SourceUnavailable, match="/proc/mvat cannot be written"):
            fetch(["minetest-data"], folder, progress=False)


def test_speech_pieces():
    speech = make_speech(np.random.default_rng(0), 2.0, voice(1))
    gap = np.zeros(8000, np.float32)
    pieces = speech_pieces(np.concatenate([gap, speech, gap, speech, gap]))
    assert len(pieces) >= 2 and all(0.15 * 16000 <= len(p) <= 6 * 16000 for p in pieces)
    assert 3.0 < sum(map(len, pieces)) / 16000 < 5.0
    assert all(abs(p[0]) < 1e-3 and abs(p[-1]) < 1e-3 for p in pieces)
    for silence in (np.zeros(0), np.zeros(100), np.zeros(16000)):
        assert speech_pieces(silence.astype(np.float32)) == []


MORE_PACKAGES = ("gcin-voice", "bucklespring-data")


def g722(path: Path, samples: np.ndarray) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A cache with packages of the real names that hold generated speech and noise."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb builds the packages of this test")
    cache = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    for number, name in enumerate([*voices.DEMO_PACKAGES, *MORE_PACKAGES]):
        root = tmp_path_factory.mktemp("package")
        if name == "gcin-voice":
            for index in range(4):
                file = root / f"usr/share/gcin-voice/ogg/{index}/5.ogg"
                file.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(file, make_speech(rng, 2, voice(number)), 16000)
        elif name == "bucklespring-data":
            for index in range(5):
                file = root / f"usr/share/buckle/wav/{index:02d}-0.wav"
                file.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(file, 0.1 * rng.standard_normal(4410), 44100)
        elif SOURCES[name].voices:
            for index in range(10):
                spoken = make_speech(rng, 1 + 0.3 * index, voice(number))
                g722(root / f"usr/share/asterisk/sounds/xx/prompt-{index}.g722", spoken)
            g722(root / "usr/share/asterisk/sounds/xx/beep.g722", 0.5 * np.sin(np.arange(16000) / 4))
            g722(root / "usr/share/asterisk/sounds/xx/silence/1.g722", np.zeros(16000))
        elif name.startswith("asterisk-moh"):
            for artist in ("macroform-a", "manolo_camp-b", "reno_project-c"):
                g722(root / f"usr/share/asterisk/moh/{artist}.g722", 0.1 * rng.standard_normal(5 * 16000))
        else:
            place = root / "usr/share/games/minetest/mods/env_sounds/sounds"
            place.mkdir(parents=True)
            noise = 0.1 * rng.standard_normal((48000 * 3, 2))
            soundfile.write(place / "env_sounds_water.1.ogg", noise, 48000)
        notice = root / f"usr/share/doc/{name}/copyright"
        notice.parent.mkdir(parents=True)
        notice.write_text(f"The terms of {name}\n")
        (root / "DEBIAN").mkdir()
        (root / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 9.{number}~x\nArchitecture: all\nMaintainer: nobody\nDescription: none\n"
        )
        subprocess.run(["dpkg-deb", "--build", root, cache / f"{name}_9_all.deb"], check=True, capture_output=True)
    return cache


def test_voices(tmp_path, packages):
    amount = {"train_minutes": 0.6, "valid_minutes": 0.2, "test_minutes": 0.4, "progress": False}
    out = tmp_path / "data"
    data = prepare_voices(out, cache=packages, seed=1, **amount)
    assert [{e.speaker for e in data.split(split)} for split in manifest.SPLITS] == [{"allison"}, {"carlo"}, {"june"}]
    recorded = {split: {e.noise for e in data.split(split)} for split in manifest.SPLITS}
    assert recorded["train"] == {"babble", "speech-shaped", "white", "pink", "brown", "music", "water"}
    assert recorded["test"] == {"babble", "speech-shaped", "music"}
    for entry in (*data.train, *data.valid, *data.test):
        clean, noisy = (audio.read(file)[0].astype(np.float64) for file in (entry.clean, entry.noisy))
        assert clean.shape == noisy.shape == (1, entry.frames) and 2 * 16000 <= entry.frames <= 6 * 16000
        assert abs(10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2)) - entry.snr) < 0.1
    licences = (out / "LICENSES.md").read_text()
    for number, name in enumerate(voices.DEMO_PACKAGES):
        assert f"| {name} | 9.{number}~x | {SOURCES[name].licence} |" in licences
        assert (out / f"copyright-{name}.txt").read_text() == f"The terms of {name}\n"

    again = prepare_voices(tmp_path / "again", cache=packages, seed=1, **amount)
    for split in manifest.SPLITS:
        for one, two in zip(data.split(split), again.split(split), strict=True):
            assert one.noisy.read_bytes() == two.noisy.read_bytes()
    assert prepare_voices(out, cache=tmp_path / "no-cache", seed=1, **amount) == data


def test_voices_of_several_speakers_and_short_sounds(tmp_path, packages, capsys):
    amount = ["--train-minutes", "1.2", "--valid-minutes", "0", "--test-minutes", "0", "--train-snrs", "7", "9.5"]
    command = [
        "voices",
        "--out",
        str(tmp_path),
        "--cache",
        str(packages),
        "--packages",
        "demo",
        *MORE_PACKAGES,
        *amount,
    ]
    assert main(command) == 0
    data = manifest.load(tmp_path)
    assert {entry.speaker for entry in data.train} == {"allison", "chulo"}
    assert {entry.snr for entry in data.train} == {7.0, 9.5}
    keyboard = [entry for entry in data.train if entry.noise == "keyboard"]
    assert keyboard
    for entry in keyboard:
        noise = audio.read(entry.noisy)[0][0] - audio.read(entry.clean)[0][0]
        blocks = noise[: len(noise) // 1600 * 1600].reshape(-1, 1600)
        assert blocks.std(1).min() > 0 and not np.array_equal(blocks[0], blocks[1])
    licences = (tmp_path / "LICENSES.md").read_text()
    assert "voice of train (chulo), babble" in licences
    capsys.readouterr()
    assert main([*command[:-2], "nan"]) == 2 and "signal-to-noise" in capsys.readouterr().err
