"""Recordings for the tests of training, and one count of operations for all of them."""

import functools

import numpy as np
import pytest

from mvat.models import count_flops
from train.data import ArrayPairs
from train.synthetic import make_pair


@pytest.fixture(scope="session")
def pairs():
    rng = np.random.default_rng(0)
    return ArrayPairs([(f"s{i}", *make_pair(rng, 0.5)) for i in range(4)])


@functools.cache
def flops(items) -> int:
    return count_flops(dict(items))


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Counting a model's operations takes longer than training it here: once is enough."""
    monkeypatch.setattr("train.solver.count_flops", lambda config: flops(tuple(config.items())))
