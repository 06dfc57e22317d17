"""The command `mvat` on real files: what is written, what is refused, exit status and messages."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import mvat
from mvat import audio, cli
from mvat.kernels import native


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    mvat.Manner(hidden=6, depth=2).save_pretrained(folder)
    return folder


@pytest.fixture
def run(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    """run(*inputs, o=OUT, ...) is `mvat enhance` with the tiny model: (status, stdout, stderr)."""

    def enhance(*inputs: Path | str, o: Path | str, model: Path | None = None, overwrite: bool = False):
        options = ["--overwrite"] if overwrite else []
        command = ["enhance", *map(str, inputs), "-o", str(o), "--checkpoint", str(model or checkpoint), *options]
        status = cli.main(command)
        return status, *capsys.readouterr()

    return enhance


def record(path: Path, channels: int = 1, frames: int = 2000, rate: int = 16000, subtype: str = "PCM_16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(frames).standard_normal((frames, channels))
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(result: tuple[int, str, str], *parts: str) -> None:
    """The command ended with status 2, no output and one line on stderr that holds every part."""
    status, out, error = result
    assert status == 2 and out == "", result
    assert error.startswith("mvat: error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("name", "channels", "frames", "rate", "subtype"),
    [
        ("stereo.wav", 2, 5001, 44100, "PCM_24"),
        ("telephone.wav", 1, 3000, 8000, "ULAW"),
        ("six.flac", 6, 1500, 48000, "PCM_24"),
        ("mono.flac", 1, 2000, 16000, "PCM_16"),
        ("float.WAV", 2, 2000, 16000, "FLOAT"),
        ("double.wav", 1, 2000, 22050, "DOUBLE"),
        ("eight.wav", 1, 2000, 11025, "PCM_U8"),
        ("one.wav", 1, 1, 44100, "PCM_16"),
        ("five.wav", 2, 5, 96000, "PCM_32"),
    ],
)
def test_rate_channels_length_and_format_are_kept(
    run, checkpoint: Path, tmp_path: Path, name: str, channels: int, frames: int, rate: int, subtype: str
) -> None:
    source = record(tmp_path / name, channels, frames, rate, subtype)
    target = tmp_path / "out" / name
    status, out, error = run(source, o=target.parent)
    assert (status, error) == (0, "") and "enhanced 1 of 1 files" in out
    before, after = audio.info(source), audio.info(target)
    assert after[1:] == before[1:]
    expected = mvat.enhance(source, mvat.Manner.from_pretrained(checkpoint))
    step = {"PCM_24": 2**-23, "PCM_16": 2**-15, "PCM_U8": 2**-7, "ULAW": 2e-3}.get(subtype, 1e-6)
    np.testing.assert_allclose(audio.read(target)[0], np.clip(expected, -1, 1), atol=step)


def test_the_format_is_that_of_the_output_where_the_input_s_does_not_fit(run, tmp_path: Path) -> None:
    for subtype, expected in (("FLOAT", "PCM_24"), ("PCM_16", "PCM_16"), ("PCM_U8", "PCM_16")):
        source = record(tmp_path / "in.wav", subtype=subtype)
        target = tmp_path / "out.flac"
        assert run(source, o=target, overwrite=True)[0] == 0
        assert audio.info(target)[1:] == (16000, 1, 2000, "FLAC", expected)
    adpcm = record(tmp_path / "adpcm.wav", subtype="IMA_ADPCM")
    assert run(adpcm, o=tmp_path / "pcm.wav")[0] == 0
    after = audio.info(tmp_path / "pcm.wav")
    assert after.subtype == "PCM_16" and after.frames == audio.info(adpcm).frames


def test_a_folder_of_good_and_bad_files(run, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    record(source / "a.wav")
    record(source / "deep" / "er" / "b.flac", channels=2)
    record(source / ".hidden.wav")
    (source / "notes.txt").write_text("no recording")
    (source / "deep" / "text.wav").write_text("no recording either")
    (source / "empty.flac").touch()
    inputs = {name: (source / name).read_bytes() for name in files(source)}
    extra = record(tmp_path / "c.wav")

    status, stdout, error = run(source, extra, tmp_path / "absent.wav", o=out)
    assert status == 1 and "enhanced 3 of 6 files" in stdout
    assert files(out) == ["a.wav", "c.wav", "deep/er/b.flac"]
    lines = error.splitlines()
    assert lines[0] == "mvat: 3 of 6 files could not be enhanced:" and len(lines) == 4
    for name, reason in (("deep/text.wav", "no readable audio"), ("empty.flac", "empty"), ("absent.wav", "no such")):
        assert any(name in line and reason in line for line in lines[1:]), (name, lines)
    assert inputs == {name: (source / name).read_bytes() for name in files(source)}


def test_of_many_bad_files_none_is_enhanced(run, tmp_path: Path) -> None:
    status, out, error = run(tmp_path / "a.wav", tmp_path / "b.wav", o=tmp_path / "out")
    assert status == 2 and out == "" and not (tmp_path / "out").exists()
    first, *others = error.splitlines()
    assert first == "mvat: error: none of 2 files was enhanced:"
    assert all(line.startswith(f"  {tmp_path}/{name}.wav: no such") for line, name in zip(others, "ab", strict=True))


def cut(path: Path) -> None:
    record(path)
    path.write_bytes(path.read_bytes()[:-1000])


def nan(path: Path) -> None:
    soundfile.write(path, np.array([0.0, np.nan, 0.1]), 16000, subtype="FLOAT")


def header_only(path: Path) -> None:
    soundfile.write(path, np.zeros(0), 16000)


BAD = {
    "missing": (lambda path: None, "no such file"),
    "empty": (Path.touch, "empty"),
    "text": (lambda path: path.write_text("hello"), "no readable audio"),
    "cut": (cut, "cut short"),
    "nan": (nan, "NaN"),
    "no samples": (header_only, "no samples"),
    "empty folder": (Path.mkdir, "holds no .wav or .flac file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_single_bad_file_is_one_line(run, tmp_path: Path, kind: str) -> None:
    make, reason = BAD[kind]
    path = tmp_path / "bad.wav"
    make(path)
    refused(run(path, o=tmp_path / "out"), f"{path}: ", reason)
    assert files(tmp_path / "out") == []


def test_a_flac_cut_short_is_refused(run, tmp_path: Path) -> None:
    path = record(tmp_path / "cut.flac", frames=20000)
    path.write_bytes(path.read_bytes()[:9000])
    refused(run(path, o=tmp_path / "out"), str(path))
    assert files(tmp_path / "out") == []


def test_where_a_single_file_goes(run, tmp_path: Path) -> None:
    source = record(tmp_path / "in.wav")
    (tmp_path / "there.wav").mkdir()
    for out in ("new.wav", "made/new.flac", "folder", "v1.0/", "there.wav"):
        assert run(source, o=f"{tmp_path}/{out}")[0] == 0
    assert files(tmp_path) == ["folder/in.wav", "in.wav", "made/new.flac", "new.wav", "there.wav/in.wav", "v1.0/in.wav"]
    refused(run(source, o=tmp_path / "new.mp3"), "new.mp3", "only .wav and .flac")
    other = record(tmp_path / "other.wav")
    refused(run(source, other, o=tmp_path / "new.wav"), "several inputs need a folder")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "in.wav").mkdir()
    refused(run(source, o=tmp_path / "taken"), "in.wav is a folder")


def test_an_output_that_exists_is_replaced_only_when_asked(run, tmp_path: Path) -> None:
    first, second = record(tmp_path / "in" / "a.wav"), record(tmp_path / "in" / "b.wav")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.wav").write_text("precious")
    refused(run(first, o=out), f"{out / 'a.wav'} exists; --overwrite replaces it")
    status, _, error = run(first, second, o=out)
    assert status == 1 and "a.wav exists" in error
    assert (out / "a.wav").read_text() == "precious" and audio.info(out / "b.wav").frames == 2000
    assert run(first, o=out, overwrite=True)[0] == 0
    assert audio.info(out / "a.wav").frames == 2000


def test_an_input_is_never_overwritten(run, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    first, second = record(folder / "a.wav"), record(tmp_path / "b.wav")
    before = first.read_bytes()
    (tmp_path / "link.wav").symlink_to(first)
    for arguments, out in (([first], first), ([first], folder), ([folder], folder), ([first], tmp_path / "link.wav")):
        refused(run(*arguments, o=out, overwrite=True), "is an input and would be overwritten")
    (tmp_path / "b" / "a.wav").parent.mkdir()
    refused(run(second, first, folder, o=tmp_path / "b"), "would both be written to")
    assert files(tmp_path / "b") == [] and first.read_bytes() == before


def test_results_below_the_recordings_are_not_enhanced_again(run, tmp_path: Path) -> None:
    record(tmp_path / "a.wav")
    for overwrite in (False, True):
        assert run(tmp_path, o=tmp_path / "out", overwrite=overwrite)[0] == 0
        assert files(tmp_path) == ["a.wav", "out/a.wav"]


def test_recordings_below_the_results_are_enhanced(run, tmp_path: Path) -> None:
    record(tmp_path / "in" / "a.wav")
    assert run(tmp_path / "in", o=tmp_path)[0] == 0
    assert files(tmp_path) == ["a.wav", "in/a.wav"]


def test_a_folder_that_cannot_be_made(run, tmp_path: Path) -> None:
    source = record(tmp_path / "a.wav")
    (tmp_path / "file").touch()
    refused(run(source, o=tmp_path / "file" / "out"), f"{tmp_path / 'file' / 'out'}: this folder cannot be made")
    refused(run(source, o=tmp_path / "file" / "out.wav"), f"{tmp_path / 'file'}: this folder cannot be made")


def test_a_failed_or_interrupted_write_leaves_the_former_file(run, tmp_path: Path, monkeypatch) -> None:
    source, target = record(tmp_path / "in" / "a.wav"), tmp_path / "out" / "a.wav"
    assert run(source, o=target)[0] == 0
    before = target.read_bytes()

    for failure, status, message in ((OSError("disk full"), 2, "disk full"), (KeyboardInterrupt(), 130, "interrupted")):

        def failing(file, samples, failure=failure):
            assert files(target.parent) != ["a.wav"]
            raise failure

        monkeypatch.setattr(soundfile.SoundFile, "write", failing)
        result = run(source, o=target, overwrite=True)
        assert result[0] == status and message in result[2]
        assert files(target.parent) == ["a.wav"] and target.read_bytes() == before


def test_windows_and_progress_are_the_caller_s_choice(run, checkpoint: Path, tmp_path: Path) -> None:
    source = record(tmp_path / "a.wav", 2, 24000, 8000, "DOUBLE")
    model = mvat.Manner.from_pretrained(checkpoint)
    written = {}
    for window, seconds in (("1.5", 1.5), ("whole", None), ("auto", None)):
        target = tmp_path / f"{window}.wav"
        assert "3/3 s of audio" in run(source, "--window", window, "--progress", o=target)[2]
        written[window] = audio.read(target)[0]
        np.testing.assert_array_equal(written[window], mvat.enhance(source, model, window=seconds))
    np.testing.assert_array_equal(written["whole"], written["auto"])
    assert (written["whole"] != written["1.5"]).any()
    record(tmp_path / "b.wav")
    assert "2/2" in run(source, tmp_path / "b.wav", "--progress", o=tmp_path / "out")[2]
    assert run(source, "--no-progress", o=tmp_path / "silent.wav")[2] == ""


def test_a_failure_half_way_through_a_file_leaves_the_former_one(run, tmp_path: Path, monkeypatch) -> None:
    source, target = record(tmp_path / "in" / "a.wav", 1, 50000), tmp_path / "out" / "a.wav"
    target.parent.mkdir()
    target.write_text("precious")
    calls = []
    forward = mvat.Manner.forward
    for failure, status in ((RuntimeError("out of memory"), 2), (KeyboardInterrupt(), 130)):

        def failing(self, x, failure=failure, **options):
            calls.append(x)
            if len(calls) % 3 == 0:
                raise failure
            return forward(self, x, **options)

        monkeypatch.setattr(mvat.Manner, "forward", failing)
        result = run(source, "--window", "1", o=target, overwrite=True)
        assert result[0] == status and result[2].count("\n") == 1
        assert files(target.parent) == ["a.wav"] and target.read_text() == "precious"
    assert len(calls) == 6


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoints_that_cannot_be_loaded(run, checkpoint: Path, tmp_path: Path) -> None:
    source, out = record(tmp_path / "a.wav"), tmp_path / "out"
    marker = tmp_path / "was_run"
    torch.save({"state_dict": Evil(marker)}, tmp_path / "evil.pt")
    refused(run(source, o=out, model=tmp_path / "evil.pt"), "evil.pt", "Python objects")
    assert not marker.exists()

    shape = tmp_path / "shape"
    mvat.Manner(hidden=8, depth=2).save_pretrained(shape)
    (shape / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    refused(run(source, o=out, model=shape), f"{shape}", "do not fit the model", "of another shape")

    (tmp_path / "text.pt").write_text("no weights")
    refused(run(source, o=out, model=tmp_path / "text.pt"), "text.pt")
    refused(run(source, o=out, model=tmp_path / "absent.pt"), "absent.pt does not exist")
    (tmp_path / "nothing").mkdir()
    refused(run(source, o=out, model=tmp_path / "nothing"), "nothing", "config.json")
    assert not out.exists()


def test_a_run_folder_and_its_file_are_checkpoints(run, checkpoint: Path, tmp_path: Path) -> None:
    model = mvat.Manner.from_pretrained(checkpoint)
    source, folder = record(tmp_path / "a.wav"), tmp_path / "runs" / "student"
    folder.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, folder / "best.pt")
    assert run(source, o=tmp_path / "0.wav")[0] == 0
    assert run(source, o=tmp_path / "1.wav", model=folder)[0] == 0
    assert run(source, o=tmp_path / "2.wav", model=folder / "best.pt")[0] == 0
    assert len({(tmp_path / f"{i}.wav").read_bytes() for i in range(3)}) == 1


def test_presets_are_untrained_and_say_so(tmp_path: Path, capsys) -> None:
    source, out = record(tmp_path / "a.wav", frames=200), tmp_path / "out"
    command = ["enhance", str(source), "-o", str(out)]
    refused((cli.main([*command, "--preset", "huge"]), *capsys.readouterr()), "base, large, small", "'huge'")
    refused((cli.main([*command, "--preset", "base", "--checkpoint", "x"]), *capsys.readouterr()), "not allowed with")
    assert not out.exists()
    assert cli.main([*command, "--preset", "s-4.1gf"]) == 0
    assert "untrained weights" in capsys.readouterr().err and files(out) == ["a.wav"]


def test_a_gpu_that_is_not_there(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["enhance", str(record(tmp_path / "a.wav")), "-o", str(tmp_path / "out"), "--preset", "s-4.1gf"]
    refused((cli.main([*command, "--device", "cuda"]), *capsys.readouterr()), "--device cuda", "no GPU")


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ([], "info|enhance|export|doctor"),
        (["enhence"], "enhence"),
        (["enhance", "a.wav"], "-o"),
        (["enhance", "a.wav", "-o", "b.wav", "--device", "tpu"], "cuda"),
        (["enhance", "a.wav", "-o", "b.wav", "--check", "x"], "--check"),
        (["enhance", "a.wav", "-o", "b.wav", "--window", "0.5"], "seconds, 1 at least, or \"whole\", got '0.5'"),
        (["enhance", "a.wav", "-o", "b.wav", "--window", "nan"], "'nan'"),
        (["enhance", "a.wav", "-o", "b.wav", "--window", "long"], "'long'"),
        (["info", "--seconds", "nan"], "'nan'"),
        (["info", "--seconds", "-1"], "'-1'"),
        (["info", "--seconds", "soon"], "'soon'"),
        (["info", "--preset", "huge"], "s-8.1gf"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, command: list[str], part: str) -> None:
    refused((cli.main(command), *capsys.readouterr()), part)


def test_info_counts_from_the_code(capsys) -> None:
    assert cli.main(["info", "--preset", "s-8.1gf"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.endswith("GFLOPs on 4 s") and row.split() == ["s-8.1gf", "12", "all", "1.119", "8.06"]
    assert cli.main(["info", "--seconds", "0.5"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(mvat.models.PRESETS)


def test_doctor_tells_what_runs(capsys, monkeypatch) -> None:
    from mvat import doctor

    built = native.missing("attention_map") is None
    status = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert status == 0 and f"mvat         {mvat.__version__}" in out and f"PyTorch      {torch.__version__}" in out
    assert "loaded from" in out if built else "is not built" in out
    row = next(line for line in out.splitlines() if line.startswith("attention_map "))
    assert row.split()[1] == ("fused" if built else "(1)")
    with mvat.use_backend("eager"):
        cli.main(["doctor"])
        assert "back end     eager" in capsys.readouterr().out

    monkeypatch.setattr(native, "missing", lambda operator: "the C++ extension does not load (bad symbol); run x")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object.__new__(Path))
    assert cli.main(["doctor"]) == 1
    assert "does not load (bad symbol); run x" in capsys.readouterr().out
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["doctor"]) == 0

    def absent(name: str) -> str:
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    cli.main(["doctor"])
    assert "missing: pip install pesq pystoi" in capsys.readouterr().out


def test_help_and_version_need_neither_pytorch_nor_audio_packages() -> None:
    script = """
import json, sys
from mvat.cli import main
for command in (["--help"], ["enhance", "--help"], ["export", "--help"], ["--version"]):
    try:
        main(command)
    except SystemExit as stop:
        assert not stop.code
print(json.dumps(sorted({"torch", "numpy", "soundfile", "soxr", "tqdm"} & set(sys.modules))))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert json.loads(lines[-1]) == [] and lines[-2] == f"mvat {mvat.__version__}"
    assert "mvat enhance noisy.wav -o enhanced.wav\n" in result.stdout


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mvat", "enhance", str(tmp_path / "absent.wav"), "-o", str(tmp_path / "out.wav")]
    result = subprocess.run(command, capture_output=True, text=True)
    refused((result.returncode, result.stdout, result.stderr), "absent.wav: no such file")


@pytest.mark.parametrize("inputs, out", [([""], "out.wav"), (["in.wav"], ""), (["a.wav", ""], "folder")])
def test_an_empty_name_is_not_the_folder_one_is_in(inputs: list[str], out: str) -> None:
    with pytest.raises(ValueError, match="a name is empty"):
        cli.plan(inputs, out)


def test_sigterm_cleans_up_as_an_exception_does() -> None:
    cleaned = []
    with pytest.raises(SystemExit) as left, cli._terminable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)
    assert left.value.code == 143 and cleaned
