"""The old operator and module names give what they gave: compared with sums written out by hand."""

import itertools
import sys
import warnings

import oracle
import pytest
import torch
from tolerances import close

import natcupy
from natcupy import natten

SHAPES = {1: (9,), 2: (6, 7), 3: (5, 4, 6)}
SETTINGS = [(3, 1), (3, 2), (5, 1)]


def tensors(rank, heads=2, dim=4, extra=0, seed=0):
    """Heads-first query, key, value and additional keys and values, float64."""
    torch.manual_seed(seed)
    shape = (2, heads, *SHAPES[rank], dim)
    grown = (2, heads, extra, dim)
    return [torch.randn(s, dtype=torch.float64) for s in (shape, shape, shape, grown, grown)]


def bias(rank, kernel_size, heads=2):
    torch.manual_seed(9)
    spans = [2 * k - 1 for k in oracle.per_axis(kernel_size, rank)]
    return torch.randn(heads, *spans, dtype=torch.float64)


def windows(rank, kernel_size, dilation):
    """(query place, [(key place, bias place)] in row-major order) over a whole map."""
    axes = [
        oracle.seen_on_axis(length, k, 1, d, False)
        for length, k, d in zip(
            SHAPES[rank],
            oracle.per_axis(kernel_size, rank),
            oracle.per_axis(dilation, rank),
            strict=True,
        )
    ]
    for query in itertools.product(*(range(n) for n in SHAPES[rank])):
        rows = [sorted(axis[i].items()) for axis, i in zip(axes, query, strict=True)]
        taps = itertools.product(*rows)
        yield query, [(tuple(k for k, _ in tap), tuple(b for _, b in tap)) for tap in taps]


def logits_by_hand(rank, query, key, kernel_size, dilation, rpb=None, extra=None):
    count = 1
    for k in oracle.per_axis(kernel_size, rank):
        count *= k
    out = torch.zeros(*query.shape[:-1], count, dtype=query.dtype)
    for place, taps in windows(rank, kernel_size, dilation):
        for n, (tap, where) in enumerate(taps):
            at = (slice(None), slice(None))
            dot = (query[(*at, *place)] * key[(*at, *tap)]).sum(-1)
            out[(*at, *place, n)] = dot if rpb is None else dot + rpb[(slice(None), *where)]
    if extra is not None:
        more = torch.einsum("bh...d,bhed->bh...e", query, extra)
        out = torch.cat([out, more], -1)
    return out


def sums_by_hand(rank, attn, value, kernel_size, dilation, extra=None):
    out = torch.zeros_like(value)
    at = (slice(None), slice(None))
    for place, taps in windows(rank, kernel_size, dilation):
        for n, (tap, _) in enumerate(taps):
            out[(*at, *place)] += attn[(*at, *place, n)][..., None] * value[(*at, *tap)]
    if extra is not None:
        rest = attn[..., attn.shape[-1] - extra.shape[2] :]
        out = out + torch.einsum("bh...e,bhed->bh...d", rest, extra)
    return out


def fits(rank, kernel_size, dilation):
    return kernel_size * dilation <= min(SHAPES[rank])


CASES = [(r, k, d) for r in (1, 2, 3) for k, d in SETTINGS if fits(r, k, d)]


# ---------------------------------------------------------------- operators


@pytest.mark.parametrize(("rank", "kernel_size", "dilation"), CASES)
def test_the_names_of_0_14(rank, kernel_size, dilation):
    query, key, value, *_ = tensors(rank)
    rpb = bias(rank, kernel_size)
    qk, qkrpb, av = (getattr(natten, f"natten{rank}d{end}") for end in ("qk", "qkrpb", "av"))
    window = (kernel_size, dilation) if rank < 3 else (kernel_size, kernel_size, dilation, dilation)
    plain = qk(query, key, *window)
    close(plain, logits_by_hand(rank, query, key, kernel_size, dilation), torch.float64)
    biased = qkrpb(query, key, rpb, *window)
    want = logits_by_hand(rank, query, key, kernel_size, dilation, rpb)
    close(biased, want, torch.float64)
    weights = want.softmax(-1)
    got = av(weights, value, *window)
    close(got, sums_by_hand(rank, weights, value, kernel_size, dilation), torch.float64)
    assert getattr(natten, f"natten{rank}dqkrpb").__name__ == f"natten{rank}dqkrpb"


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_calls_before_0_14_5_have_no_window(rank, dilation):
    """With a dilation that could be taken for the window, too."""
    if 3 * dilation > min(SHAPES[rank]):
        dilation = 1
    query, key, value, *_ = tensors(rank)
    rpb = bias(rank, 3)
    qkrpb, av = (getattr(natten, f"natten{rank}d{end}") for end in ("qkrpb", "av"))
    logits = qkrpb(query, key, rpb, dilation)
    close(logits, logits_by_hand(rank, query, key, 3, dilation, rpb), torch.float64)
    assert torch.equal(qkrpb(query, key, rpb, dilation=dilation), logits)
    weights = logits.softmax(-1)
    got = av(weights, value, dilation)
    close(got, sums_by_hand(rank, weights, value, 3, dilation), torch.float64)
    for bad in ({"kernel_size": 3}, {}, {"window": 3}):
        with pytest.raises(TypeError, match="dav"):
            av(weights, value, **bad)


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(("rank", "kernel_size", "dilation"), CASES)
def test_the_names_of_0_15_and_0_17(rank, kernel_size, dilation, extra):
    query, key, value, more_keys, more_values = tensors(rank, extra=extra)
    more_keys, more_values = (more_keys, more_values) if extra else (None, None)
    rpb = bias(rank, kernel_size)
    qk, with_bias, av = (
        getattr(natten, f"na{rank}d_{end}") for end in ("qk", "qk_with_bias", "av")
    )
    want = logits_by_hand(rank, query, key, kernel_size, dilation, rpb, more_keys)
    given = (query, key, kernel_size, dilation, more_keys)
    close(qk(*given, False, rpb), want, torch.float64)
    close(qk(*given, rpb=rpb), want, torch.float64)
    close(with_bias(query, key, rpb, kernel_size, dilation, more_keys), want, torch.float64)
    plain = logits_by_hand(rank, query, key, kernel_size, dilation, None, more_keys)
    close(qk(query, key, kernel_size, dilation=dilation, additional_keys=more_keys), plain,
          torch.float64)  # fmt: skip
    weights = want.softmax(-1)
    got = av(weights, value, kernel_size, dilation, more_values)
    close(got, sums_by_hand(rank, weights, value, kernel_size, dilation, more_values),
          torch.float64)  # fmt: skip


def test_volumes_with_a_depth_of_their_own():
    query, key, value, *_ = tensors(3)
    window, dilation = (5, 3, 3), (1, 1, 1)
    rpb = bias(3, window)
    want = logits_by_hand(3, query, key, window, dilation, rpb)
    close(natten.na3d_qk_with_bias(query, key, rpb, 5, 3, 1, 1), want, torch.float64)
    named = {"kernel_size_d": 5, "kernel_size": 3, "dilation_d": 1, "dilation": 1}
    close(natten.na3d_qk_with_bias(query, key, rpb, **named), want, torch.float64)
    close(natten.na3d_qk(query, key, window, dilation, rpb=rpb), want, torch.float64)
    close(natten.natten3dqkrpb(query, key, rpb, 5, 3, 1, 1), want, torch.float64)
    weights = want.softmax(-1)
    sums = sums_by_hand(3, weights, value, window, dilation)
    close(natten.na3d_av(weights, value, 5, 3, 1, 1), sums, torch.float64)
    close(natten.na3d_av(weights, value, window), sums, torch.float64)
    for bad in (((), {}), ((3, 1, None, False, rpb, 1), {}), ((3,), {"kernel_size": 3}),
                ((3,), {"window": 3})):  # fmt: skip
        with pytest.raises(TypeError, match="na3d_qk"):
            natten.na3d_qk(query, key, *bad[0], **bad[1])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_unfused_pair_equals_the_oracle_and_the_fused_call(rank, is_causal):
    query, key, value, *_ = tensors(rank)
    scale = query.shape[-1] ** -0.5
    logits = getattr(natten, f"na{rank}d_qk")(query * scale, key, 3, is_causal=is_causal)
    got = getattr(natten, f"na{rank}d_av")(logits.softmax(-1), value, 3, is_causal=is_causal)
    last = [t.movedim(1, -2) for t in (query, key, value)]
    want, _ = oracle.attention(*last, 3, is_causal=is_causal)
    close(got.movedim(1, -2), want, torch.float64)
    fused = getattr(natten, f"na{rank}d")(*last, 3, 1, is_causal)
    close(fused, want, torch.float64)


def test_the_fused_arguments_of_0_17():
    query, key, value, more_keys, more_values = tensors(2, extra=2)
    last = [t.movedim(1, -2) for t in (query, key, value)]
    extra = [t.transpose(1, 2) for t in (more_keys, more_values)]
    rpb = bias(2, 3)
    want, _ = oracle.attention(*last, 3, dilation=2, scale=0.3, rpb=rpb,
                               additional_keys=extra[0], additional_values=extra[1])  # fmt: skip
    got = natten.na2d(*last, 3, 2, False, rpb, 0.3, *extra, xformers_kwargs=None)
    close(got, want, torch.float64)
    named = dict(zip(("additional_keys", "additional_values"), extra, strict=True))
    got = natten.na2d(*last, 3, 2, (False, False), rpb=rpb, scale=0.3, **named)
    close(got, want, torch.float64)


@pytest.mark.filterwarnings("error")
def test_the_fused_arguments_of_0_20():
    query, key, value, more_keys, more_values = tensors(2, extra=2)
    last = [t.movedim(1, -2) for t in (query, key, value)]
    extra = [t.transpose(1, 2) for t in (more_keys, more_values)]
    window = {"stride": 2, "dilation": (1, 2), "is_causal": (True, False), "scale": 0.3}
    want, lse = oracle.attention(*last, 3, **window,
                                 additional_keys=extra[0], additional_values=extra[1])  # fmt: skip
    got = natten.na2d(*last, 3, 2, (1, 2), (True, False), 0.3, *extra, None, "cutlass-fna", (8, 8))
    close(got, want, torch.float64)
    got = natten.na2d(*last, 3, 2, dilation=(1, 2), is_causal=(True, False), scale=0.3,
                      additional_keys=extra[0], additional_values=extra[1], return_lse=True,
                      q_tile_shape=(8, 8), run_persistent_kernel=True)  # fmt: skip
    close(got[0], want, torch.float64)
    close(got[1], lse, torch.float64)
    want, _ = oracle.attention(*last, 3, stride=3)
    close(natten.na2d(*last, 3, stride=3), want, torch.float64)


def test_one_value_after_the_window_is_a_dilation_and_said_so():
    query, key, value, *_ = (t.movedim(1, -2) for t in tensors(1))
    want, _ = oracle.attention(query, key, value, 3, dilation=2)
    with pytest.warns(UserWarning, match="stride"):
        close(natten.na1d(query, key, value, 3, 2), want, torch.float64)
    for bad in ({"rpb": None, "stride": 1}, {"window": 3}):
        with pytest.raises(TypeError, match="na1d"):
            natten.na1d(query, key, value, 3, 1, **bad)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_generic_call_goes_by_the_axes(rank):
    query, key, value, *_ = (t.movedim(1, -2) for t in tensors(rank))
    want, lse = oracle.attention(query, key, value, 3, stride=2, dilation=1, scale=0.3)
    got = natten.neighborhood_attention_generic(
        query, key, value, 3, 2, 1, False, 0.3, backend="cutlass-fna", return_lse=True
    )
    close(got[0], want, torch.float64)
    close(got[1], lse, torch.float64)
    with pytest.raises(ValueError, match="1 to 3 spatial axes"):
        natten.neighborhood_attention_generic(query.flatten(1), key, value, 3)
    with pytest.raises(TypeError, match="rpb"):
        natten.neighborhood_attention_generic(query, key, value, 3, rpb=None)


def test_merged_attentions_are_one_over_all_keys():
    query, key, value, *_ = (t.movedim(1, -2) for t in tensors(1))
    parts = []
    for some in (slice(0, 4), slice(4, 6), slice(6, 9)):
        logits = torch.einsum("blhd,bmhd->blhm", query, key[:, some])
        out = torch.einsum("blhm,bmhd->blhd", logits.softmax(-1), value[:, some])
        parts.append((out, logits.logsumexp(-1)))
    out, lse = natten.merge_attentions(*zip(*parts, strict=True))
    logits = torch.einsum("blhd,bmhd->blhm", query, key)
    close(out, torch.einsum("blhm,bmhd->blhd", logits.softmax(-1), value), torch.float64)
    close(lse, logits.logsumexp(-1), torch.float64)
    with pytest.raises(ValueError, match="2 outputs and 1 log-sum-exps"):
        natten.merge_attentions([out, out], [lse])
    with pytest.raises(ValueError, match="one shape"):
        natten.merge_attentions([out, out[:, 1:]], [lse, lse])


@pytest.mark.parametrize("fix", [{}, {"use_autograd_fix": True}, {"use_autograd_fix": False}])
def test_gradients_go_through_a_merge(fix):
    """Two fused calls over other keys each, merged, against one attention over all keys."""
    length = SHAPES[1][0]
    query, key, value, *_ = (t.movedim(1, -2) for t in tensors(1))
    _, more_keys, more_values, *_ = (t.movedim(1, -2) for t in tensors(1, seed=1))
    leaves = [t.clone().requires_grad_() for t in (query, key, more_keys, value, more_values)]
    query, key, more_keys, value, more_values = leaves
    parts = [natten.na1d(query, k, v, length, stride=1, return_lse=True)
             for k, v in ((key, value), (more_keys, more_values))]  # fmt: skip
    out, lse = natten.merge_attentions(*zip(*parts, strict=True), torch_compile=False, **fix)
    keys, values = torch.cat([key, more_keys], 1), torch.cat([value, more_values], 1)
    logits = torch.einsum("blhd,bmhd->blhm", query, keys) * query.shape[-1] ** -0.5
    want = torch.einsum("blhm,bmhd->blhd", logits.softmax(-1), values)
    close(out, want, torch.float64)
    weight, lse_weight = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out * weight).sum() + (lse * lse_weight).sum(), leaves)
    total = (want * weight).sum() + (logits.logsumexp(-1) * lse_weight).sum()
    for one, other in zip(got, torch.autograd.grad(total, leaves), strict=True):
        close(one, other, torch.float64, backward=True)


def test_switches_and_questions_have_answers():
    natten.use_fused_na(False)
    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    assert natten.is_fused_na_enabled() and natten.has_fna() and natten.has_half("cpu")
    with pytest.raises(AttributeError, match="no 'attention'; it has Neigh"):
        _ = natten.attention


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_equal_the_oracle(rank):
    heads, scale = 2, 0.5
    query, key, value, *_ = tensors(rank, heads, dim=2)
    leaves = [t.requires_grad_() for t in (query, key, value, bias(rank, 3, heads))]
    weight = torch.randn_like(value)
    window = (3, 1) if rank < 3 else (3, 3, 1, 1)
    qkrpb, av = (getattr(natten, f"natten{rank}d{end}") for end in ("qkrpb", "av"))
    logits = qkrpb(query * scale, key, leaves[3], *window)
    got = torch.autograd.grad((av(logits.softmax(-1), value, *window) * weight).sum(), leaves)
    last = [t.movedim(1, -2) for t in leaves[:3]]
    want, _ = oracle.attention(*last, 3, scale=scale, rpb=leaves[3])
    want = torch.autograd.grad((want.movedim(-2, 1) * weight).sum(), leaves)
    for name, one, other in zip(("query", "key", "value", "rpb"), got, want, strict=True):
        close(one, other, torch.float64, name, backward=True)
    fused = getattr(natten, f"na{rank}d")(*last, 3, scale=scale, rpb=leaves[3])
    got = torch.autograd.grad((fused.movedim(-2, 1) * weight).sum(), leaves)
    for name, one, other in zip(("query", "key", "value", "rpb"), got, want, strict=True):
        close(one, other, torch.float64, name, backward=True)


def test_wrong_layouts_are_told():
    query, key, *_ = tensors(2)
    with pytest.raises(ValueError, match="heads-first"):
        natten.natten1dqk(query, key, 3, 1)
    with pytest.raises(ValueError, match="heads-first"):
        natten.na2d_av(query[0], key, 3)


# ---------------------------------------------------------------- modules


LAYERS = {1: natten.NeighborhoodAttention1D, 2: natten.NeighborhoodAttention2D,
          3: natten.NeighborhoodAttention3D}  # fmt: skip


def by_hand(layer, rank, x, kernel_size, dilation):
    """A layer of 0.14, written out with the operators of its time."""
    shape = x.shape[1:-1]
    pads = [0, 0]
    for length in reversed(shape):
        pads += [0, max(kernel_size * dilation - length, 0)]
    x = torch.nn.functional.pad(x, pads)
    heads = layer.num_heads
    qkv = layer.qkv(x).unflatten(-1, (3, heads, -1)).movedim(-3, 0).movedim(-2, 2)
    query, key, value = qkv
    query = query * (query.shape[-1] ** -0.5)
    window = (kernel_size, dilation) if rank < 3 else (kernel_size, kernel_size, dilation, dilation)
    name = "qkrpb" if layer.rpb is not None else "qk"
    extra = (layer.rpb,) if layer.rpb is not None else ()
    attn = getattr(natten, f"natten{rank}d{name}")(query, key, *extra, *window).softmax(-1)
    out = getattr(natten, f"natten{rank}dav")(attn, value, *window).movedim(1, -2).flatten(-2)
    for axis, length in enumerate(shape, 1):
        out = out.narrow(axis, 0, length)
    return layer.proj(out)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("side", [3, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_0_14(rank, side, bias):
    """With and without a bias table; maps smaller than the window are padded and cropped."""
    torch.manual_seed(0)
    given = (1, bias) if rank < 3 else ()
    layer = LAYERS[rank](8, 2, 5, *given, **({} if given else {"bias": bias})).double().eval()
    assert (layer.rpb is not None) == bias
    keys = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"} | ({"rpb"} if bias else set())
    assert set(layer.state_dict()) == keys
    x = torch.randn(2, *(side,) * rank, 8, dtype=torch.float64)
    close(layer(x), by_hand(layer, rank, x, 5, 1), torch.float64)


def test_what_a_call_means_in_each_version():
    two = natten.NeighborhoodAttention2D
    assert two(8, 2, 3).rpb is not None  # 0.14: on by default
    assert two(dim=8, num_heads=2, kernel_size=3, bias=False).rpb is None
    assert two(8, 2, 3, dilation=None).hood.dilation == (1, 1)
    assert two(dim=8, num_heads=2, kernel_size=3, is_causal=True).rpb is None  # 0.17: off
    newer = two(dim=8, num_heads=2, kernel_size=5, rel_pos_bias=True, use_experimental_ops=False)
    assert newer.rpb.shape == (2, 9, 9)
    with pytest.raises(ValueError, match="kernel_size"):
        newer(torch.randn(1, 4, 4, 8))  # 0.17 raises where 0.14 pads
    old = two(8, 2, 5, 1, True, False, 0.5, 0.1, 0.2)
    assert old.qkv.bias is None and old.scale == 0.5
    assert (old.attn_drop.p, old.proj_drop.p) == (0.1, 0.2)
    volume = natten.NeighborhoodAttention3D(8, 2, 3, kernel_size_d=5, dilation=2, dilation_d=1)
    assert volume.hood.kernel_size == (5, 3, 3) and volume.hood.dilation == (1, 2, 2)
    for bad in ({"bias": True, "is_causal": False}, {"window": 3}, {"stride": 2, "attn_drop": 0.1},
                {"kernel_size_d": 3}):  # fmt: skip
        with pytest.raises(TypeError, match="each once"):
            two(8, 2, 3, **bad)
    with pytest.raises(TypeError, match="each once"):
        two(8, 2, 3, 1, True, bias=True)
    with pytest.raises(TypeError, match="num_heads"):
        two(8, kernel_size=3)
    with pytest.raises(TypeError, match="Write its name"):
        natten.NeighborhoodAttention3D(8, 2, 3, 1)


def test_a_layer_that_fits_several_versions_says_how_it_is_read():
    two = natten.NeighborhoodAttention2D
    for make in (
        lambda: two(8, 2, 3),
        lambda: two(8, 2, 3, 2),
        lambda: two(dim=8, num_heads=2, kernel_size=3, dilation=2, qkv_bias=True),
    ):
        with pytest.warns(UserWarning, match="fits several versions and is read as 0.14's") as told:
            assert make().rpb is not None
        assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two(8, 2, 3, 2, bias=True)
        two(8, 2, 3, 2, rel_pos_bias=False)
        two(8, 2, 3, stride=2)
        natten.NeighborhoodAttention3D(8, 2, 3, kernel_size_d=3, dilation_d=1)


def test_layers_of_0_17_and_0_20_by_position():
    two = natten.NeighborhoodAttention2D
    old = two(8, 2, 3, 2, False, True, False, 0.5, 0.1, 0.2, False)  # 0.17
    assert old.rpb is not None and old.qkv.bias is None and old.scale == 0.5
    assert old.hood.dilation == (2, 2) and old.small_maps == "raise"
    causal = two(8, 2, 3, 2, (True, False))
    assert causal.hood.is_causal == (True, False) and causal.rpb is None
    for new in (two(8, 2, 3, 2, 1, False, False, 0.5, 0.2), two(8, 2, 3, 2, (1, 1), qkv_bias=False,
                qk_scale=0.5, proj_drop=0.2), two(embed_dim=8, num_heads=2, kernel_size=3,
                stride=2, qkv_bias=False, qk_scale=0.5, proj_drop=0.2)):  # fmt: skip
        assert new.hood.stride == (2, 2) and new.hood.dilation == (1, 1)
        assert new.rpb is None and new.qkv.bias is None and new.scale == 0.5
        assert new.proj_drop.p == 0.2 and new.small_maps == "raise"
    x = torch.randn(1, 6, 6, 8)
    assert two(8, 2, 3, stride=3)(x).shape == x.shape


def test_layers_have_the_attributes_of_old_ones():
    two = natten.NeighborhoodAttention2D(8, 2, (3, 5), dilation=2, is_causal=(True, False),
                                         attn_drop=0.1)  # fmt: skip
    assert (two.kernel_size, two.dilation) == ((3, 5), (2, 2))
    assert (two.stride, two.is_causal) == ((1, 1), (True, False))
    assert (two.num_heads, two.head_dim, two.scale) == (2, 4, 0.5)
    assert (two.embed_dim, two.na_dim, two.attn_drop_rate) == (8, 2, 0.1) and two.rpb is None
    one = natten.NeighborhoodAttention1D(embed_dim=8, num_heads=2, kernel_size=3, stride=2)
    assert (one.kernel_size, one.stride, one.na_dim) == ((3,), (2,), 1)


def test_an_attribute_that_is_set_counts():
    class Mine(natten.NeighborhoodAttention2D):
        def __init__(self, dim, kernel_size):
            super().__init__(dim, 2, kernel_size, stride=1)
            self.kernel_size = kernel_size

    torch.manual_seed(0)
    layer, wide = Mine(8, 3).eval(), Mine(8, 5).eval()
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(1, 7, 8, 8)
    assert not torch.equal(layer(x), wide(x))
    layer.kernel_size = 5
    assert layer.kernel_size == (5, 5) and torch.equal(layer(x), wide(x))
    with pytest.raises(ValueError, match="kernel_size"):
        layer.kernel_size = 0


def test_layers_equal_natcupys_own():
    torch.manual_seed(0)
    old = natten.NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3, dilation=2).eval()
    new = natcupy.NeighborhoodAttention2D(8, 2, 3, dilation=2, rel_pos_bias=True).eval()
    new.load_state_dict(old.state_dict())
    x = torch.randn(1, 7, 8, 8)
    assert torch.equal(old(x), new(x)) and isinstance(old, natcupy.NeighborhoodAttention2D)


def test_everything_named_is_there():
    assert all(hasattr(natten, name) for name in natten.__all__)
    assert "natten" not in sys.modules
    release = tuple(int(part) for part in natten.__version__.split("."))
    assert (0, 21) <= release < (0, 22)  # its docstring says up to which version
    assert natten.has_cuda() == torch.cuda.is_available() and natten.use_fused_na(True) is None
