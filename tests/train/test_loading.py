"""Batches: order, place, unreadable files, processes that die, time spent waiting."""

import os
import signal
import time

import pytest
import torch
from accelerate import Accelerator

from train.data import EpochSampler
from train.loading import Batches, Loader
from train.processes import RunError, clear_errors


class Numbers:
    """Examples whose samples are their index; some cannot be read."""

    def __init__(self, count, bad=(), act=None):
        self.count, self.bad, self.act = count, bad, act

    def __len__(self):
        return self.count

    def __getitem__(self, item):
        if self.act is not None:
            self.act()
        if item[1] in self.bad:
            raise ValueError(f"{item[1]}.wav: damaged")
        return (torch.full((1, 4), float(item[1])),) * 2


def loader(examples, size=2, workers=0):
    return Loader(examples, 0, size, workers, Accelerator(), "data/x")


def test_processes_share_an_epoch_and_each_goes_on_at_its_place():
    order = EpochSampler(23, 0)
    shares = [Batches(order, 3, process, 2) for process in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    taken = [list(share) for share in shares]
    flat = [item for step in zip(*taken, strict=True) for batch in step for item in batch]
    assert flat == list(order)[:18]
    for share, all_batches in zip(shares, taken, strict=True):
        share.start = 2
        assert list(share) == all_batches[2:]
        assert len(share) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_gone_on_with_draws_nothing_from_the_generators(workers):
    data = loader(Numbers(8), workers=workers)
    state = torch.get_rng_state()
    whole = [clean[:, 0, 0].tolist() for clean, _ in data.epoch(1)]
    rest = [clean[:, 0, 0].tolist() for clean, _ in data.epoch(1, 3)]
    assert rest == whole[3:] and len(whole) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unreadable_example_is_replaced_and_counted(capsys):
    data = loader(Numbers(400, bad=(7, 9)))
    values = [int(v) for clean, _ in data.epoch(1) for v in clean[:, 0, 0]]
    assert len(values) == 400 and not {7, 9} & set(values) and set(values) >= set(range(400)) - {7, 9}
    assert data.unreadable in (2, 3, 4)  # one may be drawn to take another's place
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(": ", 1)[1] for line in lines) == ["7.wav: damaged", "9.wav: damaged"]
    again = [int(v) for clean, _ in data.epoch(1) for v in clean[:, 0, 0]]
    assert again == values


def test_too_many_unreadable_examples_end_the_run_with_their_names():
    with pytest.raises(RunError, match=r"data/x: 5 of 400 examples of epoch 2 cannot be read, more than 1%: .*\d.wav"):
        list(loader(Numbers(400, bad=range(0, 400, 40))).epoch(2))
    with pytest.raises(RunError, match="examples in a row cannot be read"):
        list(loader(Numbers(4, bad=range(4))).epoch(1))


def test_a_reading_process_that_dies_is_named():
    examples = Numbers(8, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
    with (
        pytest.raises(RunError, match=r"data/x: a process that reads training data died \(DataLoader worker \(pid"),
        clear_errors("run", "data/x"),
    ):
        list(loader(examples, workers=1).epoch(1))


def test_the_time_spent_waiting_is_counted():
    data = loader(Numbers(8, act=lambda: time.sleep(0.005)))
    assert len(list(data.epoch(1))) == 4
    assert data.waited >= 8 * 0.005
