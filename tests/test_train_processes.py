"""Runs in processes of their own: killed and continued, and several that train together."""

import json
import os
import signal

import pytest
import torch
from runs import (
    LONG,
    a_run,
    draw_stripes,
    in_children,
    same,
    settled,
    together,
    weights,
)  # fmt: skip

from natcupy.data import find

pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'natcupy[train]'")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp("data") / "stripes")


def test_killed_and_continued(stripes, tmp_path):
    """kill -9 at three moments: each time the run goes on, to the same bits."""
    settings, output = {**LONG, "resume": True}, tmp_path / "run"
    moments = (0, 5, 8)
    results = in_children(
        *([a_run(stripes, output, settings, kill=step)] for step in moments),
        [a_run(stripes, output, settings), a_run(stripes, tmp_path / "whole", settings)],
    )
    for group in results[: len(moments)]:
        assert group[0][0] == -signal.SIGKILL, group
    assert [code for code, _ in results[-1]] == [0, 0], results[-1]
    same(weights(output), weights(tmp_path / "whole"))
    assert settled(output / "log.csv") == settled(tmp_path / "whole" / "log.csv")


@pytest.fixture(scope="module")
def shared(stripes, tmp_path_factory):
    """Runs of one and of two processes, and what they ended with."""
    place = tmp_path_factory.mktemp("shared")
    settings = {"epochs": 4, "ema_decay": 0.9, "checkpoint_steps": 3}
    pieces = {**settings, "batch_size": 4, "channels_last": False}
    odd = five_held_out(stripes, place / "odd")
    (place / "taken").mkdir()
    (place / "taken" / "mine.txt").write_text("keep")
    results = in_children(
        together(1, stripes, place / "1", {**settings, "batch_size": 8}),
        together(2, stripes, place / "2", {**settings, "batch_size": 4}),
        together(2, odd, place / "five", {"epochs": 1}),
        together(2, stripes, place / "taken", {}),
        together(2, stripes, place / "sharded", pieces, sharded=True, kill=7),
        together(2, stripes, place / "sharded", {**pieces, "resume": True}, sharded=True),
        together(2, stripes, place / "fewer", {**settings, "batch_size": 4}, kill=7),
        together(1, stripes, place / "fewer", {**settings, "batch_size": 8, "resume": True}),
    )
    return place, results


def five_held_out(stripes, data):
    split = find(stripes)
    for part, source in (("train", split.train), ("val", split.val)):
        for index in range(5 if part == "val" else len(source)):
            folder = data / part / source.classes[source.label(index)]
            folder.mkdir(parents=True, exist_ok=True)
            source.open(index).save(folder / f"{index}.png")
    return data


def test_two_processes_train_as_one(shared):
    """20 steps of two processes with batches of 4 are 20 steps of one with batches of 8."""
    place, results = shared
    assert [code for group in results[:2] for code, _ in group] == [0, 0, 0], results[:2]
    one, two = (settled(place / name / "log.csv") for name in "12")
    assert [row["step"] for row in two] == ["5", "10", "15", "20"]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert float(b[name]) == pytest.approx(float(a[name]), rel=1e-4, abs=1e-6), name
    first, second = (weights(place / name) for name in "12")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    assert "2 processes" in (place / "2" / "model" / "README.md").read_text()


def test_a_sharded_run(shared):
    """Killed and continued on shards, two processes reach what two with whole copies reach."""
    place, results = shared
    assert all(code for code, _ in results[4])
    assert [code for code, _ in results[5]] == [0, 0], results[5]
    whole, pieces = (weights(place / name) for name in ("2", "sharded"))
    for name, tensor in whole.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_continued_on_fewer_processes(shared):
    """Begun by two with batches of 4, ended by one with batches of 8, which sees the same."""
    place, results = shared
    assert all(code for code, _ in results[6])
    assert [code for code, _ in results[7]] == [0], results[7]
    one, other = (weights(place / name) for name in ("1", "fewer"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_odd_number_of_held_out_pictures(shared):
    """Two processes count each of five held-out pictures once."""
    place, results = shared
    assert [code for code, _ in results[2]] == [0, 0], results[2]
    facts = json.loads((place / "five" / "run.json").read_text())["facts"]
    assert facts["held-out items"] == 5
    (row,) = settled(place / "five" / "log.csv")
    assert float(row["val_accuracy"]) in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def test_an_error_on_the_first_process_ends_all(shared):
    assert all(code == 1 and "files that are not of a run" in text for code, text in shared[1][3])
