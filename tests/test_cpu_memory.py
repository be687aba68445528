"""backend="cpu" asks for little memory and touches none but that of its tensors and buffers.

Every input, result and scratch buffer gets pages of its own between pages that may not be touched,
at the end of its pages in one run and at their start in the other: one element too far ends the
process. Scratch memory and results are filled with NaN first, so that whatever is read before it
was written shows in the results.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import oracle
import pytest
import torch
from cpu_problems import PROBLEMS, STRIPES, VIDEO, ask_oracle, attend, cpu_problems, run
from hypothesis import given, settings
from strategies import Problem, tensors
from tolerances import close

from natcupy.cpu import host, kernels, memory, plan, rounds
from natcupy.neighborhood import Neighborhood

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps pages as Linux does")

PAGE = mmap.PAGESIZE  # more than 4096 bytes on some 64-bit ARM systems
READ, WRITE, PRIVATE, ANONYMOUS = 1, 2, 2, 32


class Guarded:
    """Memory between forbidden pages; freed by `close`."""

    def __init__(self, at_end):
        self.at_end = at_end
        self.maps = []
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            *[ctypes.c_int] * 3,
            ctypes.c_long,
        ]
        for name in ("munmap", "mprotect"):
            getattr(self.libc, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int][
                : 2 if name == "munmap" else 3
            ]

    def pages(self, count):
        """Address of `count` pages, none of which may be touched yet."""
        address = self.libc.mmap(None, count * PAGE, 0, PRIVATE | ANONYMOUS, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value)
        self.maps.append((address, count * PAGE))
        return address

    def open(self, address, count):
        assert self.libc.mprotect(address, count * PAGE, READ | WRITE) == 0

    def view(self, address, size):
        """The bytes there, as a tensor full of NaN bits."""
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        block = (ctypes.c_uint8 * size).from_address(address)
        return torch.frombuffer(block, dtype=torch.uint8).fill_(255)

    def empty(self, shape, dtype):
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        count = -(-size // PAGE)
        first = self.pages(count + 2) + PAGE
        self.open(first, count)
        start = first + count * PAGE - size if self.at_end else first
        return self.view(start, size).view(dtype).view(shape)

    def like(self, x):
        copy = self.empty(x.shape, x.dtype).copy_(x.detach())
        return copy.requires_grad_(x.requires_grad)

    def lay_out(self, buffers):
        """Scratch buffers of 4-byte elements, each on pages of its own."""
        self.open_parts, offsets, at = [], {}, PAGE
        for name, size in buffers.items():
            count = max(1, -(-size * 4 // PAGE))
            start = at + count * PAGE - size * 4 if self.at_end else at
            offsets[name] = start // 4
            if size:
                self.open_parts.append((at, count))
            at += (count + 1) * PAGE
        return plan.Layout(offsets, at // 4)

    def scratch(self, size):
        base = self.pages(-(-size // PAGE))
        for at, count in self.open_parts:
            self.open(base + at, count)
            self.view(base + at, count * PAGE)
        block = (ctypes.c_uint8 * size).from_address(base)
        return torch.frombuffer(block, dtype=torch.uint8)

    def close(self):
        for address, size in self.maps:
            self.libc.munmap(address, size)


def check(p, dtype, at_end):
    with pytest.MonkeyPatch.context() as patch:
        guarded = Guarded(at_end)
        kernels.kernel.cache_clear()
        patch.setattr(plan, "lay_out", guarded.lay_out)
        patch.setattr(memory, "take_scratch", guarded.scratch)
        patch.setattr(memory, "_idle", [])
        patch.setattr(memory, "empty", guarded.empty)
        patch.setattr(kernels, "SMALL", 2**62)  # scratch memory of one thread
        inputs = tensors(p, dtype, requires_grad=True)
        expected, cotangents = ask_oracle(p, inputs)
        inputs = {
            n: guarded.like(x) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()
        }
        got = run(p, inputs, [guarded.like(c) for c in cotangents])
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            close(a, b, torch.float32 if i == 1 else dtype, f"result {i}", backward=i > 1)
        del got, inputs, a
        guarded.close()
    kernels.kernel.cache_clear()


@settings(max_examples=60, deadline=None)
@given(p=cpu_problems(max_length=(60, 20, 8)))
@pytest.mark.parametrize("at_end", [True, False])
def test_random_problems(p, at_end):
    check(p, torch.float32, at_end)


@settings(max_examples=20, deadline=None)
@given(p=cpu_problems(channels=((4, 4), (33, 17)), max_length=(60, 20, 8)))
@pytest.mark.parametrize("at_end", [True, False])
def test_random_problems_in_bfloat16(p, at_end):
    check(p, torch.bfloat16, at_end)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("p", PROBLEMS.values(), ids=PROBLEMS)
def test_larger_problems(p, at_end):
    check(p, torch.float32, at_end)


@pytest.mark.parametrize("each", [1, 2**62], ids=["pair by pair", "in rounds"])
@pytest.mark.parametrize("p", [STRIPES, VIDEO, PROBLEMS["long"]], ids=["stripes", "video", "line"])
def test_incomplete_sums(monkeypatch, p, each):
    monkeypatch.setattr(rounds, "EACH", each)
    check(p.but(batch=2), torch.bfloat16, True)


def test_the_guards_bite():
    """The page after a guarded tensor may not be touched, and its memory starts as NaN."""
    guarded = Guarded(True)
    x = guarded.empty((16,), torch.float32)
    assert x.isnan().all()
    after = x.data_ptr() + 64
    pages = dict(line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines())
    inside = [
        rights
        for bounds, rights in pages.items()
        if int(bounds.split("-")[0], 16) <= after < int(bounds.split("-")[1], 16)
    ]
    assert inside == ["---p"]
    del x
    guarded.close()


def test_one_thread_and_a_ragged_map_repeat_exactly():
    """Stale scratch memory of earlier calls has no influence."""
    p = Problem((11, 23), (5, 6), (1, 2), (2, 1), (False, True), rpb=True, extra=3, head_dim=5)
    inputs = tensors(p, torch.float32)
    first = attend(p, inputs)
    attend(p, {n: x * 1e30 if isinstance(x, torch.Tensor) else x for n, x in inputs.items()})
    assert torch.equal(attend(p, inputs), first)
    expected, _ = oracle.attention(**inputs, **p.window)
    close(first, expected, torch.float32)


LARGEST = {  # of the models, and long and large problems: (window, head_dim)
    "NAT level 1": ((56, 56), (7, 7), (1, 1), 32),
    "DiNAT level 1": ((96, 96), (7, 7), (12, 12), 32),
    "wide heads": ((56, 56), (7, 7), (1, 1), 64),
    "large window": ((128, 128), (13, 13), (1, 1), 32),
    "line": ((4096,), (63,), (1,), 64),
    "long window": ((8192,), (255,), (1,), 64),
    "video": ((8, 28, 28), (3, 7, 7), (1, 1, 1), 32),
    "large video": ((16, 56, 56), (3, 7, 7), (1, 1, 1), 32),
}


@pytest.mark.parametrize("machine", [(16, 32), (32, 16), (32, 64)], ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", LARGEST.values(), ids=LARGEST)
def test_a_thread_needs_at_most_a_megabyte(monkeypatch, case, backward, machine):
    monkeypatch.setattr(host, "machine", lambda: host.Machine(*machine))
    kernels.kernel.cache_clear()
    shape, kernel_size, dilation, dim = case
    hood = Neighborhood(kernel_size, (1,) * len(shape), dilation, (False,) * len(shape))
    for stripes in (1, 8):
        use = kernels.kernel(shape, hood, dim, dim, 0, torch.float32, backward, stripes)
        assert use.thread_bytes <= 1 << 20
    kernels.kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(2, 28, 28), (3, 4000), (8, 1000)], ids=str)
def test_a_call_allocates_its_results_and_little_more(monkeypatch, shape, threads, dtype):
    """Beyond them two floats for each query and head, and a megabyte for each thread.

    Gradients in a half type that are added up take the sums of a round besides.
    """
    allocated = {}  # memory that is taken again counts once
    empty, take = memory.empty, memory.take_scratch

    def kept(make):
        def made(*sizes):
            x = make(*sizes)
            return allocated.setdefault(id(x), x)

        return made

    monkeypatch.setattr(memory, "empty", kept(empty))
    monkeypatch.setattr(memory, "take_scratch", kept(take))
    monkeypatch.setattr(memory, "_idle", [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    heads, dim, rank = 2, 32, len(shape) - 1
    p = Problem(
        shape[1:], (7,) * rank, (1,) * rank, (1,) * rank, (False,) * rank, batch=shape[0],
        kv_heads=heads, head_dim=dim, value_dim=dim, rpb=True,
    )  # fmt: skip
    inputs = tensors(p, dtype, requires_grad=True)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    out = attend(p, inputs)
    results = out.nbytes
    backward = sum(x.nbytes for x in leaves)
    allowed = 2 * 4 * out[..., 0].numel() + threads * (1 << 20)
    assert sum(x.nbytes for x in allocated.values()) <= results + allowed
    allocated.clear()
    torch.autograd.grad(out.sum(), leaves)
    assert sum(x.nbytes for x in allocated.values()) <= backward + allowed


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has small pages"
)
@pytest.mark.parametrize("megabytes", [32, 33])
def test_results_that_need_many_new_pages_ask_for_huge_ones(megabytes):
    result = memory.empty((megabytes << 20,), torch.uint8)
    for place in (mmap.PAGESIZE, 16 << 20, result.nbytes - mmap.PAGESIZE):
        assert "hg" in flags_of_page(result.data_ptr() + place)


def test_smaller_results_ask_for_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_ask_for_huge_pages", asked.append)
    memory.empty(((4 << 20) - 1,), torch.uint8)
    assert not asked
    large = memory.empty((1 << 20,), torch.float32)
    assert [x.data_ptr() for x in asked] == [large.data_ptr()]


def flags_of_page(address):
    """What Linux says of the mapping an address belongs to."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(x, 16) for x in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError("no mapping holds the address")
