"""LLVM IR to a callable function in this process, by llvmlite.

In: the text of a module, made only when needed. Out: the address of its function `run`. Object code
is kept by `natcupy.cache`, so a second process neither writes IR nor compiles. With NATCUPY_DEBUG=1
the IR is also written beside the cache's other files, in `ir/`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
import threading
from pathlib import Path

import torch

from natcupy import cache
from natcupy.cpu.backward import Backward
from natcupy.cpu.common import common_functions
from natcupy.cpu.emit import Machine
from natcupy.cpu.forward import Forward
from natcupy.cpu.spec import Common, Spec

DEBUG_VARIABLE = "NATCUPY_DEBUG"
OLDEST_LLVM = 20  # llvmlite 0.45; the one before reads another language, with typed pointers
WIDE_FEATURES = ("avx512", "avx10")  # how LLVM's names of features for 512 bits begin

_functions: dict[Spec, int] = {}
_engines: list = []  # owners of the machine code, for the life of the process
_lock = threading.Lock()


def _find_missing() -> str | None:
    try:
        import llvmlite.binding
    except (ImportError, OSError) as error:  # OSError: its library cannot be loaded
        return (
            f"llvmlite, which compiles the CPU kernels, cannot be imported ({error}); "
            'install it with pip install "natcupy[cpu]", or use backend="torch".'
        )
    if llvmlite.binding.llvm_version_info[0] < OLDEST_LLVM:
        return (
            f"the CPU kernels need llvmlite 0.45 or newer, got {llvmlite.__version__}; upgrade it "
            "with pip install -U llvmlite (and numba, where it is installed, to 0.62 or newer), or "
            'use backend="torch".'
        )
    if _machine() is None:
        return (
            "the CPU kernels need AVX2, FMA and F16C on x86-64, or a 64-bit ARM processor, and "
            f'this is {platform.machine()} without them; use backend="torch".'
        )
    return None


def machine() -> Machine:
    """The vector registers of this host."""
    found = _machine()
    if found is None:
        raise RuntimeError(missing)
    return found


@functools.cache
def _machine() -> Machine | None:
    from llvmlite import binding

    # of this process: an emulated one has another instruction set than the machine
    if binding.get_process_triple().split("-")[0] in ("aarch64", "arm64"):
        return Machine(32, 16)
    has = _target()[2]
    if not (has.get("avx2") and has.get("fma") and has.get("f16c")):
        return None
    wide = all(has.get(f"avx512{part}") for part in ("f", "vl", "bw", "dq"))
    return Machine(32, 64) if wide else Machine(16, 32)


@functools.cache
def _target() -> tuple[str, str, dict]:
    """Name of the processor, its features as LLVM writes them and as a dictionary.

    Vectors are at most as wide as torch's: ATEN_CPU_CAPABILITY=avx2 holds for both.
    """
    from llvmlite import binding

    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:  # not known to LLVM on this system
        return binding.get_host_cpu_name(), "", {}
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT"):
        features.update({name: False for name in features if name.startswith(WIDE_FEATURES)})
    return binding.get_host_cpu_name(), features.flatten(), dict(features)


def function(spec: Spec) -> int:
    """The address of the compiled `run` for a spec; at most one thread compiles it."""
    address = _functions.get(spec)
    if address is None:
        with _lock:
            address = _functions.get(spec)
            if address is None:
                address = _functions[spec] = _load(spec)
    return address


def object_code(part: Spec | Common) -> bytes:
    """The relocatable object of a part of a kernel, from the cache or compiled."""
    return cache.default_store().get_or_build(_ingredients(part), lambda: _compile(part))


def is_cached(spec: Spec) -> bool:
    """Whether nothing of a kernel would have to be compiled."""
    store = cache.default_store()
    return all(store.get(_ingredients(part)) is not None for part in (spec, spec.common))


def module_text(part: Spec | Common) -> str:
    """The LLVM assembly of a part of a kernel for this host."""
    if isinstance(part, Common):
        return common_functions(part, machine()).text()
    return (Backward if part.backward else Forward)(part, machine()).text()


def _ingredients(part: Spec | Common) -> dict[str, str]:
    import llvmlite

    name, features, _ = _target()
    return {
        "kind": "cpu",
        "spec": repr(part),
        "machine": repr(machine()),
        "generator": _generator(),
        "cpu": name,
        "features": features,
        "llvmlite": llvmlite.__version__,
        "system": f"{sys.platform} {platform.machine()}",
    }


@functools.cache
def _generator() -> str:
    """Hash of this package's code, which with a spec and a machine decides the IR."""
    digest, folder = hashlib.sha256(), os.path.dirname(__file__)
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py"):
            with open(os.path.join(folder, name), "rb") as file:
                digest.update(name.encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()


def _target_machine():
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features, _ = _target()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features, opt=2, jit=True)


def _compile(part: Spec | Common) -> bytes:
    from llvmlite import binding

    text = module_text(part)
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        _keep_text(part, text)
    target = _target_machine()
    module = binding.parse_assembly(text)
    module.verify()
    return target.emit_object(module)


def _keep_text(part: Spec | Common, text: str) -> None:
    folder = cache.default_store().describe()["folder"]
    if folder is None:
        return
    common = part if isinstance(part, Common) else part.common
    what = "common"
    if part is not common:
        what = "backward-adds" if part.adds else "backward" if part.backward else "forward"
    sizes = ["-".join(map(str, sizes)) for sizes in (common.shared, common.singles)]
    name = f"{what}-{common.storage}-{common.head_dim}-{common.value_dim}-{'+'.join(sizes)}"
    name += f"-{common.keys}{'-extra' if common.extra else ''}.ll"
    place = Path(folder).parent / "ir"
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_text(text)


def _load(spec: Spec) -> int:
    from llvmlite import binding

    parts = spec.common, spec
    codes = [object_code(part) for part in parts]
    target = _target_machine()
    module = binding.parse_assembly("")
    module.triple = target.triple
    engine = binding.create_mcjit_compiler(module, target)
    for code in codes:
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address("run")
    if not address:
        for part in parts:
            cache.default_store().discard(_ingredients(part))
        raise RuntimeError("a cached CPU kernel has no function 'run'; it was dropped, try again.")
    _engines.append(engine)
    return address


#: Why nothing can be compiled here, or None. Found on import, so that tracers see a constant.
missing = _find_missing()
