"""Compile ahead: a model or descriptions of calls come in, every kernel they need is made ready.

A kernel is compiled at its first use and kept on disk; `natcupy.warmup(model, (1, 3, 224, 224))`
does that before, in parallel, and loads the kernels, which the capture of a CUDA graph needs.

Which kernels those are is not guessed. The model runs once on tensors without memory (torch's fake
tensors): every attention call arrives at its operator with the shapes, strides and dtypes it will
have, backward included, and the backend's own planning says what it would launch. Nothing is
computed and nothing of the model changes.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from natcupy import cache
from natcupy import functional as F
from natcupy.neighborhood import Neighborhood


@dataclass(frozen=True)
class Call:
    """One call of `na1d`, `na2d` or `na3d`, by its numbers: everything but the tensors.

    `shape` is the tokens per axis, `extras` the number of additional keys; the other fields are as
    in `natcupy.na2d`. Batch and image size decide no kernel of the CUDA backend.
    """

    shape: Sequence[int]
    heads: int
    head_dim: int
    kernel_size: F.IntOrAxes
    stride: F.IntOrAxes = 1
    dilation: F.IntOrAxes = 1
    is_causal: F.BoolOrAxes = False
    kv_heads: int | None = None
    value_dim: int | None = None
    rpb: bool = False
    extras: int = 0
    dtype: torch.dtype = torch.float32
    batch: int = 1


@dataclass(frozen=True)
class Warmed:
    """What a warm-up did: `kernels` are ready, `compiled` of them now, the rest were kept before.

    `calls` counts the attention calls that were seen, forward and backward, `seconds` the time,
    `measured` the classes of calls whose choice of kernel was measured now.
    """

    calls: int
    kernels: int
    compiled: int
    seconds: float
    measured: int = 0

    @property
    def cached(self) -> int:
        """Kernels that an earlier run had compiled."""
        return self.kernels - self.compiled

    def __str__(self) -> str:
        measured = f", {self.measured} kinds of calls measured" if self.measured else ""
        return (
            f"{self.kernels} kernels ready for {self.calls} calls in {self.seconds:.1f} s: "
            f"{self.compiled} compiled, {self.cached} from the cache{measured}"
        )


def warmup(
    what: nn.Module | Call | Iterable[Call],
    input_size: Sequence[int] | Sequence[Sequence[int]] | None = None,
    *,
    backward: bool | Collection[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    workers: int | None = None,
    quiet: bool = False,
    autotune: bool = False,
) -> Warmed:
    """Compile and load every kernel that a model, or a list of calls, will need.

    Args:
        what: a model (any module that takes one tensor), a `Call`, or several.
        input_size: shape of the model's input with its batch, or several such shapes; by default
            `[1, *model.pretrained_cfg["input_size"]]`, where a model has that.
        backward: also the kernels of the gradients; by default what the model's mode says
            (`model.training`), and False for calls. A model is asked for those of the parameters
            that require them: freeze it first. Of calls True is for those of all tensors; where
            only some are asked for, as beside frozen keys and values, other kernels run: name the
            tensors, for instance `("query", "rpb")`, as in `natcupy.na2d`.
        device: where the calls will run: by default the GPU if there is one. A model says itself.
        dtype: of the model's input; by default that of its first floating parameter. Call this
            inside `torch.autocast` if the model will run there.
        backend: as in `natcupy.na2d`, for calls.
        workers: compilers that run at once; by default one per CPU, at most 16.
        quiet: show no progress bar.
        autotune: on a GPU, also run each kind of call once in every way the plan knows, and keep
            the fastest for this and later processes, as `NATCUPY_AUTOTUNE=1` does at first use.
            Takes the memory of one call and a GPU that does nothing else meanwhile.

    Returns a `Warmed`. Calls that the plain torch backend will run need nothing and count nothing.

    Raises TypeError or ValueError for arguments that break these rules or those of `na2d`, and
    what the backend raises where it cannot compile.
    """
    begun = time.perf_counter()
    if isinstance(what, nn.Module):
        seen = _watch_model(what, _sizes(what, input_size), backward, device, dtype, backend)
    else:
        seen = _watch_calls(what, input_size, backward, device, dtype, backend)
    measured = _measure(seen) if autotune else 0
    jobs = _jobs(seen)
    done = [_make_ready(kind, place, jobs[kind, place], workers, quiet) for kind, place in jobs]
    kernels, compiled = (sum(column) for column in zip(*done, strict=True)) if done else (0, 0)
    return Warmed(len(seen), kernels, compiled, time.perf_counter() - begun, measured)


# ------------------------------------------------------------------------------------------------
# which operators are called with what


@dataclass(frozen=True)
class _Layout:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @staticmethod
    def of(x: Any) -> Any:
        """The layout of a tensor; anything else as it is."""
        if not isinstance(x, Tensor):
            return x
        return _Layout(tuple(x.shape), x.stride(), x.storage_offset(), x.dtype)

    @staticmethod
    def tensor(x: Any) -> Any:
        """A tensor of that layout on the meta device; anything else as it is."""
        if not isinstance(x, _Layout):
            return x
        span = sum((n - 1) * s for n, s in zip(x.shape, x.stride, strict=True) if n)
        room = torch.empty(x.offset + span + 1, dtype=x.dtype, device="meta")
        return room.as_strided(x.shape, x.stride, x.offset)

    @staticmethod
    def random(x: Any, device: torch.device) -> Any:
        """A tensor of that layout with random numbers on a device; anything else as it is."""
        if not isinstance(x, _Layout):
            return x
        span = sum((n - 1) * s for n, s in zip(x.shape, x.stride, strict=True) if n)
        make = torch.Generator(device).manual_seed(0)
        room = torch.randn(x.offset + span + 1, generator=make, device=device).to(x.dtype)
        return room.as_strided(x.shape, x.stride, x.offset)


class _Watch(TorchDispatchMode):
    """Writes down the calls of natcupy's operators: (name, arguments, device)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[Any], torch.device]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "natcupy":
            device = next(x.device for x in args if isinstance(x, Tensor))
            name = func._schema.name.partition("::")[2]
            self.seen.append((name, [_Layout.of(x) for x in args], device))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _watching() -> Iterator[tuple[FakeTensorMode, list]]:
    with FakeTensorMode() as fake, _Watch() as watch, torch.inference_mode(False):
        yield fake, watch.seen


def _run(compute: Callable[[], Any], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        results = [x for x in tree_leaves(compute()) if isinstance(x, Tensor) and x.requires_grad]
        if backward and results:
            torch.autograd.backward(results, [torch.empty_like(x) for x in results])


def _watch_model(model, sizes, backward, device, dtype, backend) -> list:
    for name, given in (("device", device), ("backend", backend)):
        if given is not None:
            raise TypeError(
                f"{name} is for calls, a model has its own, got {name}={given!r}; leave it out."
            )
    if not (backward is None or isinstance(backward, bool)):
        raise TypeError(
            "names of tensors are for calls, a model's parameters say themselves whether they "
            f"require gradients, got backward={backward!r}; pass True or False."
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floating = [x for x in tensors.values() if x.is_floating_point()]
    dtype = dtype or (floating[0].dtype if floating else torch.get_default_dtype())
    place = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    backward = model.training if backward is None else backward
    with _watching() as (fake, seen):
        doubles = {f"model.{name}": fake.from_tensor(x) for name, x in tensors.items()}
        for size in sizes:
            image = torch.empty(size, dtype=dtype, device=place)
            torch.func.functional_call(_Pass(model, backward), doubles, (image,))
        return seen


class _Pass(nn.Module):
    """A model's forward pass, and its gradients too: one with checkpoints runs again for them."""

    def __init__(self, model: nn.Module, backward: bool) -> None:
        super().__init__()
        self.model, self.backward = model, backward

    def forward(self, image: Tensor) -> None:
        _run(lambda: self.model(image), self.backward)


def _sizes(model: nn.Module, given) -> list[tuple[int, ...]]:
    """Shapes of inputs, with their batch."""
    if given is None:
        known = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if known is None:
            raise ValueError(
                "a model needs the shape of its input, with the batch, got none; pass for instance "
                "natcupy.warmup(model, (1, 3, 224, 224))."
            )
        return [(1, *known)]
    entries = list(given)
    sizes = [entries] if all(isinstance(n, int) for n in entries) else entries
    for size in sizes:
        if not isinstance(size, (list, tuple)) or not all(isinstance(n, int) for n in size):
            raise TypeError(f"input_size must be one shape or several, got {given!r}.")
        if not size or min(size) < 1:
            raise ValueError(f"the sizes in a shape must be at least 1, got {given!r}.")
    return [tuple(size) for size in sizes]


def _watch_calls(what, input_size, backward, device, dtype, backend) -> list:
    calls = [what] if isinstance(what, Call) else list(what) if isinstance(what, Iterable) else what
    if not isinstance(calls, list) or not all(isinstance(call, Call) for call in calls):
        raise TypeError(
            "warmup takes a torch.nn.Module, a natcupy.warmup.Call or several calls, got "
            f"{type(what).__name__}."
        )
    for name, given in (("input_size", input_size), ("dtype", dtype)):
        if given is not None:
            raise TypeError(f"{name} is for models, calls have their own, got {name}={given!r}.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be one that is there, got {place} without a CUDA device; `natcupy "
            "doctor` tells why."
        )
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    wanted = _wanted(backward)
    with _watching() as (_, seen):
        for call in calls:
            _run(lambda call=call: _attend(call, place, wanted, backend), bool(wanted))
        return seen


_TENSORS = ("query", "key", "value", "rpb", "additional_keys", "additional_values")


def _wanted(backward: bool | Collection[str] | None) -> Collection[str]:
    """Names of the tensors of calls whose gradients are asked for."""
    if backward is None or isinstance(backward, bool):
        return _TENSORS if backward else ()
    named = isinstance(backward, Collection) and not isinstance(backward, str)
    if not named or not all(name in _TENSORS for name in backward):
        raise ValueError(
            f"backward must be True, False or several of {', '.join(_TENSORS)}, got {backward!r}."
        )
    return backward


def _attend(call: Call, device: torch.device, wanted: Collection[str], backend: str | None):
    def empty(name: str, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=call.dtype, device=device, requires_grad=name in wanted)

    rank = len(call.shape)
    if rank not in (1, 2, 3):
        raise ValueError(f"a call's shape must have 1, 2 or 3 axes, got {tuple(call.shape)}.")
    hood = F.neighborhood(rank, call.kernel_size, call.stride, call.dilation, call.is_causal)
    rows, kv_heads = (call.batch, *call.shape), call.kv_heads or call.heads
    value_dim = call.value_dim or call.head_dim
    extra = {}
    if call.extras:
        for name, dim in (("additional_keys", call.head_dim), ("additional_values", value_dim)):
            extra[name] = empty(name, call.batch, call.extras, kv_heads, dim)
    if call.rpb:
        extra["rpb"] = empty("rpb", call.heads, *(2 * k - 1 for k in hood.kernel_size))
    return getattr(F, f"na{rank}d")(
        empty("query", *rows, call.heads, call.head_dim),
        empty("key", *rows, kv_heads, call.head_dim),
        empty("value", *rows, kv_heads, value_dim),
        hood.kernel_size,
        hood.stride,
        hood.dilation,
        hood.is_causal,
        backend=backend,
        **extra,
    )


# ------------------------------------------------------------------------------------------------
# which kernels that means: for each backend a way from an operator's arguments to its specs


def _jobs(seen) -> dict[tuple[str, torch.device], dict[Any, int]]:
    """For each backend and device: spec -> bytes of shared memory (0 on the CPU)."""
    jobs: dict[tuple[str, torch.device], dict[Any, int]] = {}
    for name, args, device in seen:
        kind = "cpu" if name.startswith("cpu_") else "cuda"
        found = jobs.setdefault((kind, device), {})
        tensors = [_Layout.tensor(x) for x in args]
        for spec, shared in (_cpu_specs if kind == "cpu" else _cuda_specs)(name, tensors, device):
            found[spec] = max(shared, found.get(spec, 0))
    return jobs


def _measure(seen) -> int:
    """Run every different call of the CUDA backend on random numbers; classes measured."""
    calls = {
        (name, str(args), device): args for name, args, device in seen if not name.startswith("cpu")
    }
    if not calls:
        return 0
    from natcupy.cuda import run, tuning

    with tuning.measuring() as measured, torch.no_grad():
        for (name, _, device), args in calls.items():
            compute = {"na_fwd": run.forward, "na_bwd": run.backward}[name]
            compute(*(_Layout.random(x, device) for x in args))
    return len(measured)


_recording = threading.Lock()


class _Recorder:
    """A launcher that writes down launches on the meta device and passes all others on."""

    def __init__(self, before: Any) -> None:
        self._before = before
        self.device_type = before.device_type
        self.recipes: list[Any] = []

    def launch(self, recipe: Any, device: torch.device) -> None:
        if device.type == "meta":
            self.recipes.append(recipe)
        else:
            self._before.launch(recipe, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._before, name)


def _cuda_specs(name: str, args: list[Any], device: torch.device) -> list[tuple[Any, int]]:
    """Specs and shared memory of the launches that an operator of the CUDA backend makes."""
    # A tensor without memory has no GPU of its own: what is planned for it is for the current one.
    on_gpu = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    from natcupy.cuda import jit, launch, run

    compute = {"na_fwd": run.forward, "na_bwd": run.backward}[name]
    with _recording:
        recorder = _Recorder(launch.current_launcher() or jit._default)
        with jit.use_launcher(recorder), on_gpu:
            compute(*args)
    return [(recipe.spec, recipe.shared) for recipe in recorder.recipes]


def _cpu_specs(name: str, args: list[Any], device: torch.device) -> list[tuple[Any, int]]:
    """The spec of the kernel that an operator of the CPU backend runs."""
    from natcupy.cpu import kernels

    backward = name.endswith("_backward")
    query, key, value, _, extra_keys, _, *window = args[2:12] if backward else args[:10]
    if not query.numel():
        return []
    hood = Neighborhood(*map(tuple, window))
    extra = 0 if extra_keys is None else extra_keys.shape[1]
    sizes = (query.shape[-1], value.shape[-1], extra, query.dtype)
    grouped = backward and query.shape[-2] != key.shape[-2]
    use = kernels.kernel(tuple(query.shape[1:-2]), hood, *sizes, backward, 1, grouped=grouped)
    return [(use.spec, 0)]


def _make_ready(kind, device, wanted, workers, quiet) -> tuple[int, int]:
    """Compile and load; (kernels, how many of them were compiled now)."""
    return (_ready_cpu if kind == "cpu" else _ready_cuda)(wanted, device, workers, quiet)


def _ready_cuda(wanted: dict[Any, int], device, workers, quiet) -> tuple[int, int]:
    from natcupy.cuda import jit

    target = jit.arch_for(device)
    store = cache.default_store()
    missing = [spec for spec in wanted if store.get(jit.ingredients(spec, target)) is None]
    with _bar(len(missing), str(device), quiet) as step:
        jit.compile_many(missing, target, workers, progress=lambda *_: step())
    for spec, shared in wanted.items():
        jit.prepare(spec, device, shared)
    return len(wanted), len(missing)


def _ready_cpu(wanted: dict[Any, int], device, workers, quiet) -> tuple[int, int]:
    """One after another: LLVM's binding holds a lock."""
    from natcupy.cpu import host

    missing = [spec for spec in wanted if not host.is_cached(spec)]
    with _bar(len(missing), str(device), quiet) as step:
        for spec in wanted:
            host.function(spec)
            if spec in missing:
                step()
    return len(wanted), len(missing)


@contextlib.contextmanager
def _bar(total: int, where: str, quiet: bool) -> Iterator[Callable[[], object]]:
    """What to call after each of `total` compiles."""
    if quiet or not total:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=f"natcupy: compiling for {where}", unit="kernel") as bar:
        yield bar.update


warmup.Call = Call  # `natcupy.warmup.Call`, whichever of the two `natcupy.warmup` is


class _CallableModule(types.ModuleType):
    """`natcupy.warmup` names the function, also once this module has been imported."""

    def __call__(self, *args: Any, **kwargs: Any) -> Warmed:
        return warmup(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
