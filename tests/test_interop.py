"""Arrays of other libraries in and out: numpy's, and those of a library made up here."""

import subprocess
import sys
import types
import weakref

import numpy as np
import pytest
import torch

import natcupy
from natcupy.interop import accepts_arrays, is_foreign

na1d, na2d, na3d = (accepts_arrays(f) for f in (natcupy.na1d, natcupy.na2d, natcupy.na3d))


def arrays(*shape, count=3, dtype=np.float32, seed=0):
    make = np.random.default_rng(seed)
    return [make.standard_normal(shape).astype(dtype) for _ in range(count)]


class Array:
    """An array of a library of its own, `otherlib`, over a tensor's memory."""

    def __init__(self, tensor):
        self.tensor, self.exports = tensor, 0

    def __dlpack__(self, **asked):
        self.exports += 1
        return self.tensor.__dlpack__(**asked)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


Array.__module__ = "otherlib.core"


@pytest.fixture
def otherlib(monkeypatch):
    library = types.ModuleType("otherlib")
    library.from_dlpack = lambda tensor: Array(torch.from_dlpack(tensor))
    monkeypatch.setitem(sys.modules, "otherlib", library)


@pytest.mark.parametrize("attend, shape", [(na1d, (9,)), (na2d, (6, 7)), (na3d, (4, 5, 4))])
def test_numpy_in_numpy_out(attend, shape):
    q, k, v = arrays(1, *shape, 2, 8)
    out = attend(q, k, v, 3)
    expected = attend.__wrapped__(*map(torch.from_numpy, (q, k, v)), 3)
    assert type(out) is np.ndarray and out.dtype == np.float32
    assert np.array_equal(out, expected.numpy())


def test_every_array_argument_and_result():
    q, k, v = arrays(2, 7, 4, 8, dtype=np.float64)
    rpb = arrays(4, 5, count=1, dtype=np.float64)[0]
    extra_k, extra_v = arrays(2, 3, 4, 8, count=2, dtype=np.float64)
    out, lse = na1d(
        q, k, v, 3, rpb=rpb, additional_keys=extra_k, additional_values=extra_v, return_lse=True
    )
    tensors = map(torch.from_numpy, (q, k, v))
    expected, sums = natcupy.na1d(
        *tensors, 3, rpb=torch.from_numpy(rpb), additional_keys=torch.from_numpy(extra_k),
        additional_values=torch.from_numpy(extra_v), return_lse=True,
    )  # fmt: skip
    assert type(out) is type(lse) is np.ndarray
    assert np.array_equal(out, expected.numpy()) and np.array_equal(lse, sums.numpy())


def test_nothing_is_copied():
    seen = []

    @accepts_arrays
    def keep(x: torch.Tensor, y: torch.Tensor | None = None):
        seen.append((x, y))
        return x, x.new_ones(2)

    given, named = arrays(3, 4, count=2)
    same, fresh = keep(given, y=named)
    (x, y) = seen[0]
    assert x.data_ptr() == given.ctypes.data and y.data_ptr() == named.ctypes.data
    assert same.ctypes.data == given.ctypes.data and same.shape == (3, 4)
    assert fresh.tolist() == [1, 1]
    x[0, 0] = 7
    assert given[0, 0] == 7


def test_a_result_outlives_its_inputs():
    given = arrays(4, count=1)[0]
    gone = weakref.ref(given)
    result = accepts_arrays(lambda x: x * 2)(given)
    expected = given * 2
    del given
    assert gone() is None
    assert np.array_equal(result, expected)


def test_any_library_with_dlpack(otherlib):
    tensors = torch.randn(3, 1, 9, 2, 4)
    given = [Array(x) for x in tensors]
    out = na1d(*given, 5)
    assert type(out) is Array
    assert torch.equal(out.tensor, natcupy.na1d(*tensors, 5))
    assert all(x.exports == 1 for x in given)


def test_strided_arrays_are_read_in_place():
    packed = arrays(1, 6, 7, 3, 2, 8, count=1)[0]
    q, k, v = (packed[..., i, :, :] for i in range(3))
    out = na2d(q, k, v, 3)
    assert np.array_equal(out, na2d(q.copy(), k.copy(), v.copy(), 3))


def test_tensors_pass_untouched():
    q, k, v = torch.randn(3, 1, 9, 2, 4)
    q.requires_grad_()
    out = na1d(q, k, v, 3, rpb=torch.nn.Parameter(torch.zeros(2, 5)))
    out.sum().backward()
    assert isinstance(out, torch.Tensor) and q.grad is not None


def test_numbers_and_lists_are_no_arrays():
    plain = (1, 1.0, True, None, "cpu", [1], (1,), np.float32(1), np.int64(3), torch.ones(1))
    assert not any(map(is_foreign, plain))
    q, k, v = arrays(1, 9, 2, 4)
    assert type(na1d(q, k, v, np.int64(3), scale=np.float32(0.5))) is np.ndarray


def test_libraries_do_not_mix(otherlib):
    q, k, v = arrays(1, 9, 2, 4)
    with pytest.raises(TypeError, match="numpy and torch"):
        na1d(q, k, torch.from_numpy(v), 3)
    with pytest.raises(TypeError, match="numpy and torch"):
        na1d(*map(torch.from_numpy, (q, k, v)), 3, rpb=np.zeros((2, 5), np.float32))
    with pytest.raises(TypeError, match="numpy and otherlib"):
        na1d(q, k, Array(torch.from_numpy(v)), 3)


def test_what_torch_cannot_take_is_refused():
    q, k, v = arrays(1, 9, 2, 4)
    with pytest.raises(ValueError, match="backward in memory"):
        na1d(q[:, ::-1], k, v, 3)
    with pytest.raises(ValueError, match=r"torch\.from_dlpack takes"):
        na1d(q.astype(">f4"), k, v, 3)
    for dtype in (int, bool, complex):
        with pytest.raises(TypeError, match=rf"value must.*numpy.s {np.dtype(dtype)}.*\.astype"):
            na1d(q, k, v.astype(dtype), 3)
        with pytest.raises(TypeError, match=r"rpb must be .*\.astype"):
            na1d(q, k, v, 3, rpb=np.zeros((2, 5), dtype))
    with pytest.raises(TypeError, match="has none"):  # otherlib is not imported
        na1d(*(Array(torch.from_numpy(x)) for x in (q, k, v)), 3)


def test_rules_are_those_of_tensors():
    q, k, v = arrays(1, 9, 2, 4)
    with pytest.raises(ValueError, match="kernel_size"):
        na1d(q, k, v, 11)
    with pytest.raises(TypeError, match="float16"):
        na1d(*(x.astype(np.int32) for x in (q, k, v)), 3)


def test_an_argument_that_is_no_tensor_makes_no_call_one_of_arrays(monkeypatch):
    size = np.array([3, 3])
    q, k, v = torch.randn(3, 1, 5, 6, 2, 4)
    told = []
    for call in (lambda: na2d(q, k, v, size), lambda: na2d(*map(np.asarray, (q, k, v)), size)):
        try:
            told.append(torch.as_tensor(call()))
        except (TypeError, ValueError) as error:
            told.append(str(error))
    ours = natcupy.na2d.__wrapped__
    try:
        expected = ours(q, k, v, size)
        assert all(torch.equal(x, expected) for x in told)
    except (TypeError, ValueError) as error:
        assert told == [str(error)] * 2 and "kernel_size" in told[0]


def test_an_array_keeps_its_dtype_under_autocast():
    q, k, v = arrays(1, 9, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = na1d(q, k, v, 3)
    assert out.dtype == np.float32 and np.array_equal(out, na1d(q, k, v, 3))


def test_compiles_as_one_graph():
    compiled = torch.compile(na1d, backend="eager", fullgraph=True)
    q, k, v = torch.randn(3, 1, 9, 2, 4)
    assert torch.equal(
        compiled(q, k, v, 3), torch.compile(natcupy.na1d, backend="eager")(q, k, v, 3)
    )


def test_the_call_keeps_its_face():
    assert na2d.__name__ == "na2d" and na2d.__doc__ == natcupy.na2d.__doc__


IMPORT = """
import sys
import natcupy.interop
assert "cupy" not in sys.modules, "CuPy was imported"
import numpy as np, natcupy
q = np.ones((1, 5, 1, 4), np.float32)
natcupy.interop.accepts_arrays(natcupy.na1d)(q, q, q, 3, backend="torch")
assert "cupy" not in sys.modules, "CuPy was imported for numpy arrays"
"""


def test_cupy_is_not_imported_for_others():
    subprocess.run([sys.executable, "-c", IMPORT], check=True)
