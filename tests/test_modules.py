"""Layers: shapes, keys, padding of small maps, dropout, agreement with the functions."""

import copy
import pickle

import pytest
import torch
from tolerances import close

import natcupy
from natcupy import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

LAYERS = {1: NeighborhoodAttention1D, 2: NeighborhoodAttention2D, 3: NeighborhoodAttention3D}
NA = {1: natcupy.na1d, 2: natcupy.na2d, 3: natcupy.na3d}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layer_is_projections_around_the_function(rank):
    torch.manual_seed(0)
    layer = LAYERS[rank](12, 3, 3, dilation=2, rel_pos_bias=True, qk_scale=0.3).double()
    x = torch.randn(2, *(6, 7, 8)[:rank], 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 3, 4)).unbind(-3)
    out = NA[rank](q, k, v, 3, dilation=2, scale=0.3, rpb=layer.rpb)
    close(layer(x), layer.proj(out.flatten(-2)), torch.float64)


def test_state_dict_keys_are_the_checkpoints():
    layer = NeighborhoodAttention2D(64, 2, 7, rel_pos_bias=True)
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == {
        "rpb": (2, 13, 13),
        "qkv.weight": (192, 64),
        "qkv.bias": (192,),
        "proj.weight": (64, 64),
        "proj.bias": (64,),
    }
    plain = NeighborhoodAttention2D(64, 2, (3, 5), qkv_bias=False)
    assert set(plain.state_dict()) == {"qkv.weight", "proj.weight", "proj.bias"}


def test_small_maps_are_padded_before_the_projection():
    """Pads become keys and values equal to the projection's bias, are attended, and cropped."""
    torch.manual_seed(1)
    layer = NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True).double()
    x = torch.randn(1, 4, 7, 8, dtype=torch.float64)
    padded = torch.zeros(1, 6, 7, 8, dtype=torch.float64)
    padded[:, :4] = x
    close(layer(x), layer(padded)[:, :4], torch.float64)
    refusing = NeighborhoodAttention2D(8, 2, 3, dilation=2, small_maps="raise").double()
    with pytest.raises(ValueError, match="must fit the input"):
        refusing(x)
    assert refusing(padded).shape == padded.shape


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (9, 2)])
def test_any_map_size(shape):
    layer = NeighborhoodAttention2D(8, 2, 7, rel_pos_bias=True)
    assert layer(torch.randn(2, *shape, 8)).shape == (2, *shape, 8)


def test_attention_dropout_drops_only_while_training():
    torch.manual_seed(0)
    layer = NeighborhoodAttention2D(8, 2, 3, attn_drop=0.5, rel_pos_bias=True)
    plain = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 6, 8)
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - plain(x)).abs().max() < 0.15
    layer.attn_drop.p = 0.0
    close(layer(x), plain(x).double(), torch.float32)


@pytest.mark.parametrize(
    ("args", "error", "word"),
    [
        ((10, 3, 3), ValueError, "multiple of num_heads"),
        ((0, 1, 3), ValueError, "embed_dim"),
        ((8, 0, 3), ValueError, "num_heads"),
        ((8.0, 2, 3), TypeError, "embed_dim"),
        ((8, True, 3), TypeError, "num_heads"),
        ((8, 2, 0), ValueError, "kernel_size"),
        ((8, 2, (3, 3, 3)), ValueError, "kernel_size"),
        ((8, 2, 3, 4), ValueError, "stride"),
    ],
)
def test_bad_arguments(args, error, word):
    with pytest.raises(error, match=word):
        NeighborhoodAttention2D(*args)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {"dim": 8, "num_heads": 2, "kernel_size": 3}, "no argument 'dim'.*'embed_dim'"),
        ((8, 2, 3), {"bias": True}, "no argument 'bias'.*'rel_pos_bias'.*natcupy.natten"),
        ((8, 2), {"window_size": 3}, "no argument 'window_size'.*'kernel_size'"),
        ((8, 2), {"kernelsize": 3}, "no argument 'kernelsize'.*'kernel_size'"),
        ((8, 2, 3), {"zzz": 1}, "no argument 'zzz'; known: embed_dim, .*small_maps"),
        ((8,), {}, "takes embed_dim, .*'num_heads'"),
        ((8, 2, 3), {"embed_dim": 8}, "takes embed_dim, .*multiple values"),
        (range(1, 20), {}, "takes embed_dim, .*too many"),
    ],
)
def test_unknown_arguments_are_told_in_the_layers_name(args, kwargs, words):
    with pytest.raises(TypeError, match=rf"^NeighborhoodAttention2D .*{words}"):
        NeighborhoodAttention2D(*args, **kwargs)


def test_bad_options_and_inputs():
    with pytest.raises(ValueError, match="small_maps"):
        NeighborhoodAttention2D(8, 2, 3, small_maps="maybe")
    with pytest.raises(ValueError, match="scale must be a finite number"):
        NeighborhoodAttention2D(8, 2, 3, qk_scale=float("nan"))
    layer = NeighborhoodAttention2D(8, 2, 3)
    for shape in ((5, 6, 8), (1, 5, 6, 7), (1, 2, 5, 6, 8)):
        with pytest.raises(ValueError, match="input must be"):
            layer(torch.zeros(shape))


def test_copy_and_pickle():
    layer = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 5, 6, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_repr_names_the_window():
    text = repr(NeighborhoodAttention2D(8, 2, 3, dilation=2, is_causal=(True, False)))
    assert "kernel_size=(3, 3)" in text and "dilation=(2, 2)" in text and "is_causal" in text


def test_training_step_reaches_every_parameter():
    layer = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    layer(torch.randn(2, 5, 6, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_autocast():
    layer = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(2, 5, 6, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.rpb.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", [NeighborhoodAttention1D, NeighborhoodAttention2D])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_an_input_of_another_dtype(layer, qkv_bias):
    made = layer(8, 2, 3, qkv_bias=qkv_bias)
    x = torch.randn(1, *(5, 5)[: made.rank], 8)
    with pytest.raises(TypeError, match=r"weights are torch\.float32.*use x\.to\(.*layer\.to"):
        made(x.half())
    with pytest.raises(TypeError, match=r"input torch\.int64; use x\.to\(torch\.float32\)\.$"):
        made(x.long())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x.half()).dtype == torch.bfloat16


class _Failing(torch.nn.Linear):
    def __init__(self, error):
        super().__init__(8, 24)
        self.error = error

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("the size of tensor a must match"),
    ],
)
def test_other_faults_keep_their_own_words(error):
    made = NeighborhoodAttention1D(8, 2, 3)
    made.qkv = _Failing(error)
    with pytest.raises(RuntimeError) as caught:
        made(torch.randn(1, 5, 8).half())
    assert caught.value is error


def test_dtype_errors_of_autocast_quantized_weights_and_other_devices_stay():
    error = RuntimeError("mat1 and mat2 must have the same dtype, but got Half and Float")
    made = NeighborhoodAttention1D(8, 2, 3)
    made.qkv, x = _Failing(error), torch.randn(1, 5, 8).half()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="mat1"):
        made(x)
    with pytest.raises(RuntimeError, match="mat1"):
        made(x.to("meta"))
    made.qkv.weight = torch.nn.Parameter(torch.zeros(24, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RuntimeError, match="mat1"):
        made(x)


def test_a_layer_that_is_compiled_has_one_graph():
    made = NeighborhoodAttention1D(8, 2, 3)
    x = torch.randn(1, 5, 8)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), made(x))
