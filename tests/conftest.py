"""What every test shares. Triton decides at its import whether it interprets, so this file comes before everything."""

import contextlib
import os
from pathlib import Path

# Threads that wait sleep instead of spinning, or the suite crawls on a machine with other work. Read by the OpenMP
# runtime when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A GPU machine that runs the CUDA tests alone need not have hypothesis.
with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import settings

    # No deadline: a machine may be busy. The same examples every time: a change, not chance, makes a test fail.
    settings.register_profile("mvat", deadline=None, derandomize=True)
    settings.load_profile("mvat")

REPO = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a GPU; skipped where there is none")
    # Beside another process of tests, `pytest -n 2`, one thread each.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden files beside the checkout; the test is skipped where it is absent."""
    folder = REPO.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder
