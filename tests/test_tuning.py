"""Tuned choices, with a clock that is told the times: measured once, kept, validated, cleared."""

import importlib.util
import json
import threading
from dataclasses import replace

import pytest
import torch
from ptxsim.launcher import PtxLauncher
from test_heuristics import nat
from test_plan import problem, random_problem

from natcupy import backends, cache
from natcupy.arguments import neighborhood
from natcupy.cuda import heuristics, jit, ops, plan, run, small_tiles, tuning
from natcupy.cuda.arch import Target
from natcupy.cuda.heuristics import BOTH, FORWARD, KEYS, QUERIES, SIDES
from natcupy.cuda.launch import LaunchError
from natcupy.warmup import Call, warmup

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="NVRTC comes with CuPy, which is not installed"
)
CPU = torch.device("cpu")
HOOD = neighborhood(2, 5)


class FakeClock:
    """Runs what it is to time once, and tells the time given for that many measurements ago."""

    def __init__(self, seconds=lambda number: 1.0):
        self.times, self.measured, self.capturing = seconds, 0, False

    def device_name(self, device):
        return "a GPU"

    def busy(self, device):
        return self.capturing

    def seconds(self, run, device):
        run()
        self.measured += 1
        return self.times(self.measured - 1)


class Driver:
    """A launcher with a clock that runs nothing."""

    device_type = "cpu"

    def __init__(self, clock):
        self.clock, self.launched = clock, []

    def target(self, device):
        return Target("90a")

    def launch(self, recipe, device):
        self.launched.append(recipe)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A fake GPU: the third choice of every class is twice as fast."""
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(tuning.VARIABLE, "1")
    new_process()
    with jit.use_launcher(Driver(FakeClock(lambda n: 0.5 if n == 2 else 1.0))) as launcher:
        launcher.clock.launcher = launcher
        yield launcher.clock
    new_process()


def new_process():
    """Forget what this process settled, not what is stored."""
    for kept in (small_tiles.ranked, small_tiles.joint_tile, small_tiles.joint_tiles):
        kept.cache_clear()
    tuning._forget(lambda choice: True)


def ask(p, side=FORWARD, trial=lambda part: None):
    return tuning.choice(p, side, False, CPU, trial)


P = nat((56, 56), 90)
CHOICES = plan.choices(P, FORWARD)


# ------------------------------------------------------------------------------------------------
# choices


def test_every_choice_of_a_plan_is_legal():
    """The default is first; each passes the check that a stored one must pass, and plans."""
    import random

    rng = random.Random(7)
    problems = [random_problem(rng) for _ in range(60)]
    problems += [nat(shape, arch) for shape in ((7, 7), (30, 41)) for arch in (75, 86, 100)]
    for p in problems:
        for side in (*SIDES, BOTH):
            found = plan.choices(p, side)
            assert 1 <= len(found) <= 9 and len(set(found)) == len(found)
            assert plan.part(p, side) == plan.part(p, side, False, found[0])
            for choice in found:
                assert plan.legal(p, side, choice), (p, choice)
                made = plan.part(p, side, False, choice)
                assert made.recipes and all(r.shared <= 232448 for r in made.recipes)


BAD = (
    (), ("small",), ("portable",), ("small", 7, 8, 1), ("small", 7, 8, 1, 1, 1),
    ("small", 7, 8, 1, 2), ("small", 7.0, 8, 1, 1), ("small", True, 8, 1, 1),
    ("small", 7, 7, 1, 1), ("small", -1, 8, 1, 1), ("small", 2**40, 8, 1, 1),
    ("portable", 8), ("portable", 8, 8, 8), ("portable", 0, 8), ("portable", 56, 57),
    ("portable", 40, 40), ("portable", "8", 8), ("other", 8, 8), ("", 8, 8), (3, 8, 8),
)  # fmt: skip


def test_a_stored_joint_choice_serves_its_whole_class():
    """Of any batch of the class, though each has its own few that are worth measuring."""
    few, more = nat((56, 56), 90, batch=3), nat((56, 56), 90, batch=4)
    assert tuning.problem_class(few, BOTH, True) == tuning.problem_class(more, BOTH, True)
    for choice in plan.choices(few, BOTH):
        assert plan.legal(more, BOTH, choice) and plan.part(more, BOTH, True, choice).recipes


def test_only_what_can_join_is_joined():
    joint, *_, last = plan.choices(P, BOTH)
    assert joint[0] == "joint" and last == plan.APART
    joint_tile = joint[1:]
    for bad in (
        ("joint",),
        joint[:-1],
        ("small", *joint_tile),
        ("apart", 1),
        ("joint", 7, 7, 1, 1),
    ):
        assert not plan.legal(P, BOTH, bad), bad
    assert not plan.legal(P, KEYS, joint) and not plan.legal(P, QUERIES, plan.APART)
    long, dense = nat((56, 56), 90, head_dim=64), nat((7, 7), 90)
    for p in (long, dense, replace(P, kv_heads=1), replace(P, dtype="F32")):
        assert plan.choices(p, BOTH) == (plan.APART,) and not plan.legal(p, BOTH, joint)
    with plan.use_family("apart"):
        assert plan.choices(P, BOTH) == (plan.APART,)
        entries = [r.spec.entry for r in plan.backward(P, True, True, False).recipes]
    assert entries == ["na2d_small_bwd_dq", "reduce_partials", "na2d_small_bwd_dkv"]
    entries = [r.spec.entry for r in plan.backward(P, True, True, False).recipes]
    assert entries == ["na2d_small_bwd", "reduce_partials"]
    entries = [r.spec.entry for r in plan.backward(P, False, False, False).recipes]
    assert entries == ["na2d_small_bwd_dq"]


@pytest.mark.parametrize("choice", BAD, ids=str)
def test_other_choices_are_refused(choice):
    assert not plan.legal(P, FORWARD, choice)
    with pytest.raises(ValueError, match="runs as one of"):
        plan.part(P, FORWARD, False, choice)


# ------------------------------------------------------------------------------------------------
# measuring


def test_the_fastest_is_measured_once_and_kept(clock):
    tried = []
    assert ask(P, trial=tried.append) == CHOICES[2]
    assert clock.measured == len(CHOICES)
    assert tried == [plan.part(P, FORWARD, False, choice) for choice in CHOICES]
    assert ask(P) == CHOICES[2] and clock.measured == len(CHOICES)
    new_process()
    assert ask(P) == CHOICES[2] and clock.measured == len(CHOICES), "another process reads it"


def test_a_small_gain_is_noise(clock):
    clock.times = lambda n: 1.0 - 0.9 * tuning.MARGIN * (n > 0)
    assert ask(P) == CHOICES[0]


@pytest.mark.parametrize("said", ["", "1", "0"])
def test_the_variable(clock, monkeypatch, said):
    """Unset: what is stored is used and nothing measured. 0: not even that."""
    ask(P)
    new_process()
    monkeypatch.setenv(tuning.VARIABLE, said)
    clock.measured = 0
    other = nat((28, 28), 90)
    assert ask(P) == (None if said == "0" else CHOICES[2])
    assert (ask(other) is None) == (said != "1")
    assert clock.measured == (len(plan.choices(other, FORWARD)) if said == "1" else 0)


def test_a_value_that_says_nothing_is_told_once(monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "banana")
    tuning._wish.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="NATCUPY_AUTOTUNE must be 1 or 0, got 'banana'"
    ) as told:
        assert [tuning.mode(), tuning.mode()] == ["use", "use"]
    assert len(told) == 1


@pytest.mark.parametrize("when", ["captured", "traced", "family"])
def test_nothing_is_measured_at_the_wrong_moment(clock, monkeypatch, when):
    """And the class keeps the default in this process: results do not change under a graph."""
    if when == "captured":
        clock.capturing = True
    if when == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with plan.use_family("small" if when == "family" else "auto"):
        assert ask(P) is None
    assert clock.measured == 0 and tuning.describe() == []
    if when != "family":
        clock.capturing = False
        monkeypatch.undo()
        monkeypatch.setenv(tuning.VARIABLE, "1")
        assert ask(P) is None and clock.measured == 0


def test_a_stored_choice_serves_a_captured_call(clock):
    ask(P)
    new_process()
    clock.capturing = True
    assert ask(P) == CHOICES[2]


def test_a_choice_the_driver_refuses_is_left_out(clock):
    def trial(part):
        if part == plan.part(P, FORWARD, False, CHOICES[1]):
            raise LaunchError("too much shared memory")

    clock.times = lambda n: 0.5 if n == 1 else 1.0  # of those that ran
    assert ask(P, trial=trial) == CHOICES[2]


@pytest.mark.parametrize("lost", [False, True])
def test_a_failure_that_matters_is_raised(clock, lost):
    """The default must run, and a lost context is the end; nothing is stored then."""
    failing = CHOICES[1 if lost else 0]

    def trial(part):
        if part == plan.part(P, FORWARD, False, failing):
            error = LaunchError("gone")
            error.lost = lost
            raise error

    with pytest.raises(LaunchError, match="gone"):
        ask(P, trial=trial)
    assert tuning.describe() == []


def test_threads_measure_a_class_once(clock):
    found, start = [], threading.Barrier(8)

    def work():
        start.wait()
        found.append(ask(P))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CHOICES[2]] * 8 and clock.measured == len(CHOICES)


# ------------------------------------------------------------------------------------------------
# classes and their names


def test_what_makes_another_class():
    """One change each; the batch counts in powers of two, strides and scale not at all."""
    base = tuning.problem_class(P, FORWARD, False)
    same = (nat((56, 56), 90, batch=100), nat((56, 56), 90, scale=0.1))
    assert {tuning.problem_class(p, FORWARD, False) for p in same} == {base}
    dilated = problem((112, 112), (7, 7), (1, 1), (2, 2), (False, False), dtype="F16", rpb=True,
                      heads=2, kv_heads=2, batch=32)  # fmt: skip
    assert tuning.problem_class(dilated, FORWARD, False) == base
    others = [
        nat((56, 56), 90, batch=200), nat((56, 55), 90), nat((56, 56), 90, heads=4),
        nat((56, 56), 90, head_dim=64), nat((56, 56), 90, dtype="BF16"),
        problem((56, 56), (7, 7), (2, 1), (1, 1), (False, False), heads=2, kv_heads=2, batch=128),
        problem((56, 56), (7, 7), (1, 1), (1, 1), (True, False), heads=2, kv_heads=2, batch=128),
        problem((56, 56), (7, 7), (1, 1), (1, 1), (False, False), heads=2, kv_heads=2, batch=128),
    ]  # fmt: skip
    names = {tuning.problem_class(p, FORWARD, False) for p in others}
    names |= {tuning.problem_class(P, QUERIES, rpb) for rpb in (False, True)}
    assert len(names) == len(others) + 2 and base not in names
    assert all(len(name) <= 200 for name in names), "shown by the doctor"


def test_an_entry_is_bound_to_all_that_decides(monkeypatch):
    keys = {cache.key_of(tuning.ingredients("a GPU", "90a", "class"))}
    keys.add(cache.key_of(tuning.ingredients("another GPU", "90a", "class")))
    keys.add(cache.key_of(tuning.ingredients("a GPU", "100a", "class")))
    keys.add(cache.key_of(tuning.ingredients("a GPU", "90a", "another class")))
    monkeypatch.setattr(tuning, "_kernels", lambda: "edited")
    keys.add(cache.key_of(tuning.ingredients("a GPU", "90a", "class")))
    assert len(keys) == 5


# ------------------------------------------------------------------------------------------------
# what is read back

ENTRIES = [
    b"", b"\xff\x00", b"{", b"[]", b"3", b"null", b'{"choice": 3}', b'{"choice": null}',
    b'{"choice": ["small"]}', b'{"choice": [["small"], 7, 8, 1, 1]}', b"[" * 100_000,
    b'{"choice": ["portable", 1e400, 8]}', b'{"choice": ["portable", 8, 8, 8, 8, 8, 8]}',
    *(json.dumps({"choice": choice}).encode() for choice in BAD),
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: repr(entry)[:40])
def test_a_bad_entry_is_not_there(clock, monkeypatch, entry):
    """It is never used, and measured anew where that is wanted."""
    told = tuning.ingredients("a GPU", "90a", tuning.problem_class(P, FORWARD, False))
    cache.default_store().get_or_build(told, lambda: entry or b" ")
    tuning.describe()
    monkeypatch.setenv(tuning.VARIABLE, "")
    assert ask(P) is None and clock.measured == 0
    new_process()
    monkeypatch.setenv(tuning.VARIABLE, "1")
    assert ask(P) == CHOICES[2]
    new_process()
    assert ask(P) == CHOICES[2] and clock.measured == len(CHOICES)


def test_a_choice_of_the_class_that_a_call_cannot_run(clock, monkeypatch):
    """Members of a class may differ; what does not fit one gets the default."""
    assert ask(P) == CHOICES[2]
    monkeypatch.setattr(plan, "legal", lambda *_: False)
    assert ask(P) is None


def test_describe_and_clear(clock):
    ask(P)
    ask(P, KEYS)
    lines = tuning.describe()
    assert [line["device"] for line in lines] == ["a GPU"] * 2
    assert lines[0]["class"].startswith("forward, F16 32/32, heads 2/2, window 7x7, on 128 x 56x56")
    assert (lines[0]["seconds"], lines[0]["default"], lines[0]["current"]) == (0.5, 1.0, True)
    assert lines[0]["choice"] == list(map(str, CHOICES[2]))
    cache.default_store().get_or_build({"engine": "cuda"}, lambda: b"a cubin")
    assert tuning.clear() == 2 and tuning.describe() == [] and tuning.clear() == 0
    assert cache.default_store().get({"engine": "cuda"}) == b"a cubin"
    clock.measured = 0
    ask(P)
    assert clock.measured == len(CHOICES)


# ------------------------------------------------------------------------------------------------
# in calls


SHAPE = (1, 9, 18, 1, 32)


def tensors(grad=True):
    make = torch.Generator().manual_seed(0)
    rows = [torch.randn(SHAPE, generator=make, dtype=torch.float64) for _ in range(3)]
    found = [*rows, torch.randn(1, 9, 9, generator=make, dtype=torch.float64)]
    return [x.to(torch.float16).requires_grad_(grad) for x in found]


def attend(query, key, value, rpb):
    return ops.attention(query, key, value, HOOD, 0.2, rpb, None, None)[0]


def test_calls_run_what_was_chosen(clock):
    """Each side measures on the call's own tensors, then runs the choice; later calls only run."""
    leaves = tensors()
    d_out = torch.ones(SHAPE, dtype=torch.float16)

    def call():
        clock.launcher.launched.clear()
        torch.autograd.grad(attend(*leaves), leaves, d_out)
        return [(r.spec, r.grid, r.block, r.shared) for r in clock.launcher.launched]

    first, measured = call(), clock.measured
    assert measured > 6 and len(first) > measured
    again = call()
    assert clock.measured == measured and again[1:] == first[-2:]
    assert len(tuning.describe()) == 2
    new_process()
    assert call() == again and clock.measured == measured


def test_sides_are_measured_where_they_stay_apart(clock):
    leaves = tensors()
    slow = {"na2d_small_bwd"}

    def seconds(run, device):
        clock.launcher.launched.clear()
        run()
        return 1.0 + len(slow & {r.spec.entry for r in clock.launcher.launched})

    clock.seconds = seconds
    for _ in range(2):
        clock.launcher.launched.clear()
        torch.autograd.grad(attend(*leaves), leaves, torch.ones(SHAPE, dtype=torch.float16))
    entries = [r.spec.entry for r in clock.launcher.launched]
    assert entries[1:] == ["na2d_small_bwd_dq", "reduce_partials", "na2d_small_bwd_dkv"]
    classes = [line["class"].split(",")[0] for line in tuning.describe()]
    assert classes == ["both with bias gradient", "forward", "keys", "queries with bias gradient"]


def test_choices_give_the_same_numbers(monkeypatch):
    """Every tile of the small kernels gives the same bits, the bias gradient excepted."""
    leaves, d_out = tensors(), torch.randn(SHAPE).half()
    results = []

    def pick(p, side, rpb, device, trial):
        found = [c for c in plan.choices(p, side) if c[0] != "portable"]
        return found[len(results) * (len(found) - 1)]

    monkeypatch.setattr(tuning, "choice", pick)
    for _ in range(2):
        plan.forget()
        with PtxLauncher("86").active() as launcher:
            out = attend(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, d_out)])
        shapes = [record.recipe.block for record in launcher.records]
        results[-1].append(tuple(shapes))
    plan.forget()
    assert len({made.pop() for made in results}) > 1, "the tiles must differ"
    for made in results[1:]:
        for name, a, b in zip(("out", "query", "key", "value"), results[0], made, strict=False):
            assert torch.equal(a, b), name
        assert torch.allclose(results[0][4].float(), made[4].float(), rtol=2e-3, atol=2e-2)


def test_the_interpreter_measures_and_runs(clock, monkeypatch):
    """The whole way on real kernels: trials overwrite results only, never inputs."""
    monkeypatch.setattr(small_tiles, "RANKED", 1)  # and the portable kernel
    new_process()
    launcher = PtxLauncher("86")
    launcher.clock = FakeClock(lambda n: 0.5 if n in (1, 3) else 1.0)  # portable, apart
    leaves = tensors()
    launcher.protect(*leaves)
    with launcher.active():
        out = attend(*leaves)
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert launcher.clock.measured == 8 and len(tuning.describe()) == 4
        tuning.clear()
    with plan.use_family("portable"), PtxLauncher("86").active():
        expected = attend(*leaves)
        true = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
    for a, b in zip((out, *found), (expected, *true), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=5e-2)


def test_graphs_and_shapes_are_kept_apart(clock):
    """The plans that `run` keeps do not outlive a cleared or re-measured choice."""
    query, key, value, rpb = tensors(False)
    attend(query, key, value, rpb)
    chosen = clock.launcher.launched[-1]
    tuning.clear()
    clock.times = lambda n: 1.0
    attend(query, key, value, rpb)
    assert clock.launcher.launched[-1].block != chosen.block or (
        clock.launcher.launched[-1].shared != chosen.shared
    )
    assert len(run._plans) <= run.LAYOUTS and heuristics.FORWARD == FORWARD


CALLS = (
    Call((9, 18), 2, 32, 5, rpb=True, dtype=torch.float16),
    Call((9, 18), 2, 32, 5, rpb=True, dtype=torch.float16),
    Call((11,), 2, 16, 3),
)


def test_a_warm_up_measures(clock, monkeypatch):
    """Each kind of call once, on random numbers; the kernels made ready are those chosen."""
    monkeypatch.setenv(tuning.VARIABLE, "")
    monkeypatch.setattr(backends, "choose", lambda *_: Cuda)
    prepared = set()
    clock.launcher.prepare = lambda spec, device, shared=0: prepared.add(spec)
    plain = warmup(CALLS, backward=True, device="cpu", quiet=True)
    assert plain.measured == clock.measured == 0
    state = torch.get_rng_state()
    done = warmup(CALLS, backward=True, device="cpu", quiet=True, autotune=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert done.measured == len(tuning.describe()) == 5 and clock.measured > 12
    prepared.clear()
    measured = clock.measured
    again = warmup(CALLS, backward=True, device="cpu", quiet=True, autotune=True)
    assert again.measured == 0 and clock.measured == measured
    clock.launcher.launched.clear()
    leaves = [x.repeat(1, 1, 1, n, 1) for x, n in zip(tensors(False)[:3], (2, 2, 2), strict=True)]
    rpb = torch.zeros(2, 9, 9)
    attend(*leaves, rpb)
    assert {launch.spec for launch in clock.launcher.launched} <= prepared


class Cuda:
    @staticmethod
    def attention(*args):
        return ops.attention(*args[:8])
