import pytest
import torch

from benchmarks import floors


@pytest.fixture
def rates() -> floors.Rates:
    rates = floors.Rates("cpu", repeats=1)
    rates._peaks[torch.float32] = {"product": 1e9, "fma": 4e9}
    rates._bandwidths[4096] = 2e9
    return rates


def test_the_floor_is_the_slower_of_products_and_bytes(rates: floors.Rates) -> None:
    assert rates.floor(8e9, 0, 4096, torch.float32) == pytest.approx(2.0)
    assert rates.floor(0.0, 6 * 10**9, 4096, torch.float32) == pytest.approx(3.0)
    assert rates.floor(8e9, 6 * 10**9, 5000, torch.float32) == pytest.approx(3.0)


def test_bandwidth_belongs_to_a_working_set(rates: floors.Rates) -> None:
    assert rates.bandwidth(3000) == rates.bandwidth(10) == 2e9
    assert rates.bandwidth(70_000) > 0
    assert set(rates.as_dict()["bandwidth"]) == {"4096", "65536"}


def test_multiply_adds_stay_in_registers() -> None:
    # Not a time: what memory could feed is a hundredth of it, so a peak below says that the loop was taken apart.
    assert floors._fma_peak(1, 1) > 1e9
