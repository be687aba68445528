"""CuPy arrays in and out, with numpy standing in for CuPy where there is no GPU."""

import importlib.util

import numpy as np
import pytest
import torch

from natcupy.cuda import interop


class ndarray(np.ndarray):  # noqa: N801 (named as CuPy's class)
    """An array that says it is CuPy's."""


ndarray.__module__ = "cupy"


def array(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape).view(ndarray)


def test_arrays_become_tensors_over_the_same_memory():
    given = array(2, 3)
    (tensor, nothing), _ = interop.enter(given, None)
    assert isinstance(tensor, torch.Tensor) and nothing is None
    tensor[0, 0] = 7
    assert given[0, 0] == 7


def test_results_go_back(monkeypatch):
    monkeypatch.setattr(interop, "import_cupy", lambda name: np)
    _, leave = interop.enter(array(2))
    result = torch.ones(3, requires_grad=True)
    back = leave(result)
    assert isinstance(back, np.ndarray) and back.tolist() == [1, 1, 1]
    assert back.ctypes.data == result.data_ptr()


def test_tensors_are_left_alone():
    tensor = torch.ones(2)
    arguments, leave = interop.enter(tensor, None)
    assert arguments[0] is tensor and leave(tensor) is tensor


def test_mixing_is_refused():
    with pytest.raises(TypeError, match="got both"):
        interop.enter(array(2), torch.ones(2))


@pytest.mark.gpu
def test_real_arrays():
    if not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None:
        pytest.skip("needs a CUDA GPU and CuPy")
    import cupy

    given = cupy.arange(6, dtype=cupy.float32)
    (tensor,), leave = interop.enter(given)
    back = leave(tensor * 2)
    assert isinstance(back, cupy.ndarray) and back.get().tolist() == [0, 2, 4, 6, 8, 10]
    assert back.data.ptr != given.data.ptr and tensor.data_ptr() == given.data.ptr
