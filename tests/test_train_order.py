"""Which pictures a process sees when, what chance they are drawn with, and who reads them."""

import os
import random
import warnings

import numpy as np
import pytest
import torch

from natcupy.train import TrainConfig, TrainError, loaders, randomness


def config(**changes):
    return TrainConfig(**{"output": "somewhere", **changes})


def test_plan():
    assert loaders.Plan.of(100, config(batch_size=8, accumulate=2), 3) == loaders.Plan(8, 2, 3, 2)
    assert loaders.Plan.of(7, config(batch_size=8), 2) == loaders.Plan(3, 1, 2, 1)
    assert loaders.Plan.of(7, config(batch_size=8, mixup=1.0), 1).batch_size == 6
    with pytest.raises(TrainError, match="an item for each of 4 processes"):
        loaders.Plan.of(3, config(), 4)
    with pytest.raises(
        TrainError, match=r"at least 2 pictures, got 1 \(batch_size 1;.*: why\. Set"
    ):
        loaders.Plan.of(9, config(batch_size=1), 1, 2, "why")
    with pytest.raises(TrainError, match=r"got 1 \(batch_size 32; 5 pictures for 3.*Add pictures"):
        loaders.Plan.of(5, config(), 3, 2, "why")
    assert loaders.Plan.of(9, config(batch_size=3), 1, 2, "why").batch_size == 3
    with pytest.raises(TrainError, match=r"a pair to mix for .* got 1 items.* cutmix to 0"):
        loaders.Plan.of(1, config(cutmix=1.0), 1)


class Numbers:
    """Items that say which they are and what they drew."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def batches(processes, process, epoch=3, first=0, workers=0):
    made = config(batch_size=12 // processes // 2, accumulate=2, seed=5, workers=workers)
    plan = loaders.Plan.of(23, made, processes)
    loader = loaders.training(
        Numbers(), plan, made, process, epoch, first, list, torch.device("cpu")
    )
    return plan, list(loader)


def test_processes_share_every_batch():
    """Two processes see, together and in order, what one process sees; so does a continuation."""
    plan, alone = batches(1, 0)
    assert plan.steps == 1 and len({item[0] for batch in alone for item in batch}) == 12
    shared = [batches(2, process)[1] for process in (0, 1)]
    assert [a + b for a, b in zip(*shared, strict=True)] == alone
    assert batches(1, 0, workers=2)[1] == alone
    assert batches(1, 0, epoch=4)[1] != alone
    small = config(batch_size=3, seed=5, workers=0)
    plan = loaders.Plan.of(23, small, 1)
    cut = [loaders.training(Numbers(), plan, small, 0, 1, first, list, torch.device("cpu"))
           for first in (0, 4)]  # fmt: skip
    whole, rest = map(list, cut)
    assert whole[4:] == rest and len(whole) == 7


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_examination_counts_every_item_once(processes):
    seen, sizes = [], []
    for process in range(processes):
        made = config(workers=0)
        loader = loaders.examination(
            Numbers(), 4, made, process, processes, list, torch.device("cpu")
        )
        shares = list(loader)
        seen += [item[0] for batch, count in shares for item in batch[:count]]
        sizes.append([len(batch) for batch, _ in shares])
    assert seen == list(range(23))
    assert all(each == sizes[0] for each in sizes)


def test_generators_go_on_as_before():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with randomness.drawn_from(1, 2):
        first = random.random(), np.random.rand(), torch.rand(())
    with randomness.restored():
        randomness.set_all(1, 2)
        assert (random.random(), np.random.rand(), torch.rand(())) == first
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_generators_of_several_gpus_go_on_as_before(monkeypatch):
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    set_again = {}
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: set_again.update({device: state})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with randomness.restored():
            pass
    assert set_again == {0: "state of 0", 1: "state of 1"}


def test_workers_of_a_run(monkeypatch):
    monkeypatch.setattr(loaders, "usual_workers", lambda processes: 10 + processes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    gpu = torch.device("cuda")
    assert loaders._workers(config(), gpu) == 12 and loaders._workers(config(workers=0), gpu) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_read_on_one_thread(workers):
    class Threads:
        def __len__(self):
            return 6

        def __getitem__(self, index):
            if index == 5 and refuses:
                raise ValueError("unreadable")
            return torch.get_num_threads()

    before, made = torch.get_num_threads(), config(batch_size=2, workers=workers)
    plan = loaders.Plan.of(6, made, 1)
    torch.set_num_threads(3)
    try:
        for refuses in (False, True):
            loader = loaders.training(Threads(), plan, made, 0, 0, 0, list, torch.device("cpu"))
            if refuses:
                with pytest.raises(ValueError, match="unreadable"):
                    list(loader)
            else:
                assert list(loader) == [[1, 1]] * 3
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "processes", "threads", "wanted"),
    [(2, 1, 2, 0), (2, 1, 1, 1), (64, 1, 32, 8), (16, 4, 1, 3), (16, 1, 14, 2), (1, 1, 4, 0)],
)
def test_workers_beside_training_on_a_cpu(monkeypatch, cores, processes, threads, wanted):
    """They get the processors that torch's threads leave free; those that are asked for, always."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    cpu = torch.device("cpu")
    assert loaders._workers(config(), cpu) == wanted
    assert loaders._workers(config(workers=5), cpu) == 5
    assert loaders._workers(config(), torch.device("cuda")) == max(min(cores // processes, 8), 1)
