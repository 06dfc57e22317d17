import pytest

from benchmarks import timing


def test_variants_are_interleaved() -> None:
    order = []

    def sampler(name: str, value: float):
        def sample() -> float:
            order.append(name)
            return value

        return sample

    samples = timing.interleave({"a": sampler("a", 1.0), "b": sampler("b", 2.0), "c": sampler("c", 3.0)}, 3)
    assert order == list("abcabcabc")
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}


def test_quartiles() -> None:
    assert timing.quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_machine_that_changes_its_speed_is_noticed() -> None:
    steady = [1.0, 1.2, 1.1, 1.3]
    assert not timing.drifts(steady * 4)
    assert timing.drifts(steady * 2 + [2 * s for s in steady] * 2)
    assert not timing.drifts([1.0] * 8 + [1.04] * 8)  # within what the clock rate may do
    assert not timing.drifts([1.0, 1.0, 9.0, 9.0])  # too few samples to tell


def test_a_busy_machine_is_noticed() -> None:
    assert timing.busy(0.02) == ""
    assert "50% of its processors' time" in timing.busy(0.5)
    assert 0 <= timing._share_in_use(0.05) <= 1


@pytest.mark.parametrize("seconds, budget, count", [(1.0, 0.0, 8), (1.0, 20.0, 20), (1e-6, 1.0, 60), (0.0, 1.0, 60)])
def test_rounds_stay_within_their_bounds(seconds: float, budget: float, count: int) -> None:
    assert timing.rounds(seconds, budget) == count


def test_a_short_call_is_repeated_in_a_sample() -> None:
    clock, called = timing.Clock("cpu"), []
    assert clock.calls(1e-4) == 20 and clock.calls(1.0) == 1
    assert clock(lambda: called.append(1), 20) > 0
    assert len(called) == 20
