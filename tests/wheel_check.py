"""Installs a wheel into an empty environment and uses it there: `make wheel-check`."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

MAKE = """
import numpy as np, soundfile, torch, mvat

torch.manual_seed(0)
mvat.Manner(hidden=6, depth=1, segment_len=8).save_pretrained("model")
soundfile.write("noisy.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 16000)
"""
RUN = """
import torch, mvat
import mvat.kernels  # registers the operators

model = mvat.Manner.from_pretrained("model")
programs = {
    "torch.export": torch.export.load("pt2.pt2").module(),
    "AOTInductor": torch._inductor.aoti_load_package("aoti.pt2"),
}
for name, program in programs.items():
    for batch, samples in ((1, 5000), (2, 16001)):
        x = 0.1 * torch.randn(batch, 1, samples)
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-5)
    print(f"wheel: the program of {name} computes what the model does")
"""


def main() -> None:
    (wheel,) = (Path(name).resolve() for name in sys.argv[1:])
    if not re.fullmatch(r"mvat-[\d.]+-cp311-abi3-\w+\.whl", wheel.name):
        raise SystemExit(f"wheel: expected a name such as mvat-0.1.0-cp311-abi3-linux_x86_64.whl, got {wheel.name}")
    with tempfile.TemporaryDirectory() as folder:
        check(wheel, Path(folder))
    print(f"wheel: {wheel.name} works in an empty environment")


def check(wheel: Path, folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MVAT_"))}

    def run(*command: str | Path) -> str:
        print("wheel:", *(str(word).strip().partition("\n")[0] for word in command), flush=True)
        result = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        print(result.stdout, end="")
        if result.returncode:
            raise SystemExit(f"wheel: the command failed with status {result.returncode}")
        return result.stdout

    # Pip takes no extras in a constraint.
    pins = re.sub(r"\[.*?\]", "", (REPO / "requirements.txt").read_text())
    (folder / "pins.txt").write_text(pins)
    run(sys.executable, "-m", "venv", "venv")
    binaries = folder / "venv" / "bin"
    python, mvat = binaries / "python", binaries / "mvat"
    run(python, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", "pins.txt", wheel)

    report = run(mvat, "doctor")
    if f"loaded from {folder / 'venv'}" not in report or not re.search(r"^attention_map +fused", report, re.MULTILINE):
        raise SystemExit("wheel: the fused kernels of the wheel are not in use")
    run(python, "-c", MAKE)
    run(mvat, "enhance", "noisy.wav", "-o", "shipped.wav")
    run(mvat, "enhance", "noisy.wav", "-o", "enhanced.wav", "--checkpoint", "model")
    for form in ("pt2", "aoti"):
        run(mvat, "export", "--checkpoint", "model", "--format", form, "-o", f"{form}.pt2")
    run(python, "-c", RUN)


if __name__ == "__main__":
    main()
