"""State dicts from one layout to another: pure functions, nothing is read, built or fetched.

In: a mapping of tensor names to tensors. Out: a new dict; tensors are passed on, joined or split,
never changed in value. All of it works on meta tensors too, so that shapes can be checked before
any memory is spent.

natcupy's own names are those of the original checkpoints (`levels.0.blocks.0.attn.qkv.weight`).
The transformers layout splits qkv into three and stacks the two layer scales; detection and
segmentation files put `backbone.` in front and one norm per stage behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from natcupy.hub.errors import CheckpointError, some
from natcupy.zoo.config import PATCH_SIZE, ModelConfig

State = dict[str, Tensor]

_OUTER = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    ("layernorm.", "norm."),
    ("classifier.", "head."),
)
# The longer foreign name first: attention.output.dense also ends in output.dense.
_INNER = (
    ("attention.output.dense.", "attn.proj."),
    ("attention.self.rpb", "attn.rpb"),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)
_PREFIXES = ("nat.", "dinat.")
_PARTS = ("query", "key", "value")
_THEIR_BLOCK = re.compile(r"encoder\.levels\.(\d+)\.layers\.(\d+)\.(.+)")
_OUR_BLOCK = re.compile(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)")
_STAGE_NORM = re.compile(r"norm(\d+)\.(weight|bias)")
_FINAL_NORM = ("norm.weight", "norm.bias")
HEAD = ("head.weight", "head.bias")
WRAPPERS = ("module.", "_orig_mod.")  # names in DistributedDataParallel, in torch.compile


# ---------------------------------------------------------------- which layout


def detect_layout(names: Iterable[str]) -> str:
    """Name the layout of a state dict: "natcupy", "transformers" or "backbone".

    "natcupy" covers the original .pth files of every family; "backbone" is a detection or
    segmentation checkpoint with `backbone.` in front.

    Raises:
        CheckpointError: none of them.
    """
    names = list(names)
    if any(name.startswith("backbone.") for name in names):
        return "backbone"
    if any("encoder.levels." in name for name in names):
        return "transformers"
    if any(re.match(r"(levels|layers)\.0\.(blocks\.0\.|norm1\.)", name) for name in names):
        return "natcupy"
    raise CheckpointError(
        "a NAT or DiNAT checkpoint has tensors named levels.0.blocks.0.…, layers.0.…, "
        f"encoder.levels.… or backbone.…, got {some(sorted(names), 5) or 'no tensors'}. "
        f"{_remedy(names)}"
    )


def _remedy(names: list[str]) -> str:
    """What to do about names of no layout."""
    for prefix in WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return f"A wrapper added {prefix!r}: save the state dict of the model inside it."
    return "Check that this is the right file."


def to_natcupy(state: Mapping[str, Tensor]) -> State:
    """Any known layout in natcupy's names; of a detector or segmenter, the backbone alone."""
    layout = detect_layout(state)
    if layout == "transformers":
        return from_transformers(state)
    if layout == "backbone":
        return from_backbone(state)
    return dict(state)


# ---------------------------------------------------------------- transformers


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """The transformers layout (with or without its `nat.` / `dinat.` prefix) in natcupy's names.

    Names that belong to no rule are kept as they are, so that a strict load reports them.
    """
    out: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        bare = next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)
        block = _THEIR_BLOCK.fullmatch(bare)
        if block is None:
            out[_outer_to_natcupy(bare, name)] = tensor
            continue
        ours, rest = f"levels.{block[1]}.blocks.{block[2]}.", block[3]
        part = re.fullmatch(r"attention\.self\.(query|key|value)\.(weight|bias)", rest)
        if part:
            parts.setdefault(f"{ours}attn.qkv.{part[2]}", {})[part[1]] = tensor
        elif rest == "layer_scale_parameters" and tensor.ndim == 2 and len(tensor) == 2:
            out[ours + "gamma1"], out[ours + "gamma2"] = tensor[0], tensor[1]
        else:
            renamed = _renamed(rest, _INNER)
            out[ours + renamed if renamed else name] = tensor
    for name, found in parts.items():
        out[name] = _joined(name, found)
    return out


def _joined(name: str, found: dict[str, Tensor]) -> Tensor:
    """Query, key and value under one another, as `qkv` holds them."""
    shapes = {part: tuple(found[part].shape) for part in _PARTS if part in found}
    if len(shapes) < 3 or len(set(shapes.values())) > 1:
        raise CheckpointError(
            f"{name} is made of query, key and value of one shape, got {shapes}. The file is "
            "incomplete or not of this model."
        )
    return torch.cat([found[part] for part in _PARTS])


def _outer_to_natcupy(bare: str, name: str) -> str:
    if bare.startswith("encoder.levels."):
        inner = re.fullmatch(r"encoder\.(levels\.\d+\.downsample\..+)", bare)
        return inner[1] if inner else name
    norm = re.fullmatch(r"hidden_states_norms\.stage(\d+)\.(.+)", bare)
    if norm:
        return f"norm{int(norm[1]) - 1}.{norm[2]}"
    return _renamed(bare, _OUTER) or name


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str | None:
    return next((new + name[len(old) :] for old, new in table if name.startswith(old)), None)


def to_transformers(state: Mapping[str, Tensor], prefix: str = "nat.") -> State:
    """natcupy's names in the transformers layout.

    Args:
        state: weights of family "nat" (NAT and DiNAT), classifier or feature backbone.
        prefix: "nat." or "dinat." for a classifier, "" for a bare model or a backbone.

    Raises:
        ValueError: another prefix, or weights of another family.
    """
    if prefix not in ("", *_PREFIXES):
        raise ValueError(f"prefix must be 'nat.', 'dinat.' or '', got {prefix!r}.")
    out: State = {}
    for name, tensor in state.items():
        block = _OUR_BLOCK.fullmatch(name)
        if block:
            theirs = f"{prefix}encoder.levels.{block[1]}.layers.{block[2]}."
            out.update(_block_to_transformers(name, theirs, block[3], tensor, state))
        else:
            out[_outer_to_transformers(name, prefix)] = tensor
    return out


def _block_to_transformers(
    name: str, theirs: str, rest: str, tensor: Tensor, state: Mapping[str, Tensor]
) -> State:
    if rest.startswith("attn.qkv."):
        kind = rest.rsplit(".", 1)[1]
        pieces = zip(_PARTS, tensor.chunk(3), strict=True)
        return {f"{theirs}attention.self.{part}.{kind}": piece for part, piece in pieces}
    if rest == "gamma1":
        both = torch.stack([tensor, state[name[: -len("gamma1")] + "gamma2"]])
        return {theirs + "layer_scale_parameters": both}
    if rest == "gamma2":
        return {}
    renamed = _renamed(rest, tuple((ours, foreign) for foreign, ours in _INNER))
    if renamed is None:
        raise ValueError(f"{name!r} has no place in the transformers layout.")
    return {theirs + renamed: tensor}


def _outer_to_transformers(name: str, prefix: str) -> str:
    norm = _STAGE_NORM.fullmatch(name)
    if norm:
        return f"hidden_states_norms.stage{int(norm[1]) + 1}.{norm[2]}"
    if name.startswith("levels.") and ".downsample." in name:
        return f"{prefix}encoder.{name}"
    renamed = _renamed(name, tuple((ours, foreign) for foreign, ours in _OUTER))
    if renamed is None:
        raise ValueError(
            f"the transformers layout exists for family 'nat' alone (NAT and DiNAT), {name!r} has "
            "no place in it."
        )
    return renamed if name in HEAD else prefix + renamed


# ---------------------------------------------------------------- detection and segmentation


def from_backbone(state: Mapping[str, Tensor], norms: str = "keep") -> State:
    """The backbone inside a detection or segmentation checkpoint; necks and heads are left out.

    Args:
        state: names that start with `backbone.`, among others.
        norms: "keep" the per-stage `norm0…` (a feature backbone), or "drop" them.
    """
    if norms not in ("keep", "drop"):
        raise ValueError(f"norms must be 'keep' or 'drop', got {norms!r}.")
    inner = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }
    return {
        name: tensor
        for name, tensor in inner.items()
        if norms == "keep" or not _STAGE_NORM.fullmatch(name)
    }


def to_backbone(state: Mapping[str, Tensor]) -> State:
    """A feature backbone's weights as a detection or segmentation checkpoint names them."""
    return {f"backbone.{name}": tensor for name, tensor in state.items()}


# ---------------------------------------------------------------- numbers from shapes


def infer_config(state: Mapping[str, Tensor]) -> ModelConfig:
    """Every architecture number that shapes can tell, from weights in natcupy's names.

    Dilations and the drop path rate have no parameters, so they come back as None and 0.

    Raises:
        CheckpointError: a tensor that decides a number is missing or misshapen.
    """
    family, first = _family(state)
    shape = Shapes(state)
    dim = shape("patch_embed.norm.weight", 1)[0]
    depths, heads = _depths_and_heads(state, shape, family)
    window = (shape(first + "attn.rpb", 3)[1] + 1) // 2
    stem = "patch_embed.proj.0.weight" if family == "nat" else "patch_embed.proj.weight"
    stages = sorted({int(m[1]) for name in state if (m := _STAGE_NORM.fullmatch(name))})
    single = family in ("isotropic", "vitrpb")
    return ModelConfig(
        family=family,
        embed_dim=dim,
        depths=depths,
        num_heads=heads,
        kernel_size=None if family == "vitrpb" else window,
        mlp_ratio=shape(first + "mlp.fc1.weight", 2)[0] / dim,
        layer_scale=1e-5 if first + "gamma1" in state else None,
        num_classes=shape("head.weight", 2)[0] if "head.weight" in state else 0,
        in_chans=shape(stem, 4)[1],
        img_size=(window * PATCH_SIZE[family] if family == "vitrpb" else 224) if single else None,
        out_indices=tuple(stages) or None,
    )


def _family(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """The family and the name of its first block."""
    if "levels.0.blocks.0.norm1.weight" in state:
        return "nat", "levels.0.blocks.0."
    if "layers.0.blocks.0.norm1.weight" in state:
        return "dinat_s", "layers.0.blocks.0."
    if "layers.0.attn.relative_position_index" in state:
        return "vitrpb", "layers.0."
    if "layers.0.norm1.weight" in state:
        return "isotropic", "layers.0."
    raise CheckpointError(
        "the family shows in the name of the first block's norm1.weight (levels.0.blocks.0., "
        f"layers.0.blocks.0. or layers.0.), got only {some(sorted(state), 5) or 'no tensors'}."
    )


def _depths_and_heads(
    state: Mapping[str, Tensor], shape: Shapes, family: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pattern = {"nat": r"levels\.(\d{1,4})\.blocks\.(\d{1,4})\.norm1\.weight"}.get(
        family,
        r"layers\.(\d{1,4})\.blocks\.(\d{1,4})\.norm1\.weight"
        if family == "dinat_s"
        else r"layers()\.(\d{1,4})\.norm1\.weight",
    )
    blocks = sorted(
        (int(m[1] or 0), int(m[2])) for name in state if (m := re.fullmatch(pattern, name))
    )
    depths = [sum(1 for level, _ in blocks if level == i) for i in range(blocks[-1][0] + 1)]
    if blocks != [(level, block) for level, depth in enumerate(depths) for block in range(depth)]:
        raise CheckpointError(f"blocks must be numbered without gaps, got {some(blocks)}.")
    where = {"nat": "levels.{}.blocks.0.", "dinat_s": "layers.{}.blocks.0."}.get(
        family, "layers.{}."
    )
    heads = [shape(where.format(level) + "attn.rpb", 3)[0] for level in range(len(depths))]
    return tuple(depths), tuple(heads)


class Shapes:
    """Shapes by name, with an error that names what is missing or has the wrong rank."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that must have `rank` non-empty axes."""
        tensor = self.state.get(name)
        if tensor is None or tensor.ndim != rank or 0 in tensor.shape:
            got = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{name} decides the architecture and must have {rank} non-empty axes, got {got}."
            )
        return tuple(tensor.shape)


# ---------------------------------------------------------------- fitting weights to a wish


def fit(
    state: Mapping[str, Tensor], have: ModelConfig, want: ModelConfig
) -> tuple[State, frozenset[str]]:
    """Weights of config `have`, changed as far as the caller's config `want` asks for it.

    Another `num_classes` leaves the head out; another `kernel_size` (or vitrpb `img_size`) resizes
    the bias tables; other `in_chans` adapt the first convolution; other `out_indices` leave out
    the norms and head that the wanted model does not have. Nothing else is bent.

    Returns:
        The weights, and the names that the model has to keep as it initialised them.
    """
    state, fresh = dict(state), set()
    if have.num_classes != want.num_classes and have.out_indices == want.out_indices:
        fresh |= set(HEAD) if want.num_classes else set()
        state = {name: tensor for name, tensor in state.items() if name not in HEAD}
    if have.out_indices != want.out_indices:
        state, added = _fit_outputs(state, have, want)
        fresh |= added
    if (have.kernel_size, have.img_size) != (want.kernel_size, want.img_size):
        state, added = _fit_window(state, want)
        fresh |= added
    if have.in_chans != want.in_chans:
        name = "patch_embed.proj.0.weight" if want.family == "nat" else "patch_embed.proj.weight"
        if name in state:
            state[name] = adapt_input(state[name], want.in_chans)
    return state, frozenset(fresh)


def _fit_outputs(state: State, have: ModelConfig, want: ModelConfig) -> tuple[State, set[str]]:
    before = {f"norm{i}.{kind}" for i in have.out_indices or () for kind in ("weight", "bias")}
    after = {f"norm{i}.{kind}" for i in want.out_indices or () for kind in ("weight", "bias")}
    if want.out_indices is None:
        after |= {*_FINAL_NORM, *(HEAD if want.num_classes else ())}
    if have.out_indices is None:
        before |= {*_FINAL_NORM, *HEAD}
    kept = {name: tensor for name, tensor in state.items() if name not in before - after}
    return kept, after - before


def _fit_window(state: State, want: ModelConfig) -> tuple[State, set[str]]:
    window = want.kernel_size
    if want.family == "vitrpb":
        window = want.img_size // PATCH_SIZE["vitrpb"]
    index = {name for name in state if name.endswith(".relative_position_index")}
    resized = {
        name: resize_rpb(tensor, window) if name.endswith(".attn.rpb") else tensor
        for name, tensor in state.items()
        if name not in index
    }
    return resized, index


def resize_rpb(rpb: Tensor, kernel_size: int) -> Tensor:
    """A relative position bias table for another window size, by bicubic interpolation.

    The way the authors made their 11x11 weights from 7x7 ones (and Swin before them).

    Args:
        rpb: `[heads, 2K-1, 2K-1]`, any floating dtype.
        kernel_size: the new K.

    Returns:
        `[heads, 2*kernel_size-1, 2*kernel_size-1]`, same dtype; itself when K stays.
    """
    if rpb.ndim != 3 or 0 in rpb.shape:
        raise CheckpointError(f"a bias table is [heads, 2K-1, 2K-1], got {tuple(rpb.shape)}.")
    side = 2 * kernel_size - 1
    if rpb.shape[1:] == (side, side):
        return rpb
    wide = interpolate(rpb[None].float(), size=(side, side), mode="bicubic", align_corners=False)
    return wide[0].to(rpb.dtype)


def adapt_input(weight: Tensor, in_chans: int) -> Tensor:
    """A first convolution for another number of channels.

    Args:
        weight: `[out, channels, kh, kw]`.
        in_chans: 1 sums over the channels, which keeps the response to a grey picture; other
            numbers repeat them in turn, scaled by channels / in_chans.
    """
    if weight.ndim != 4 or 0 in weight.shape:
        raise CheckpointError(f"a convolution is [out, in, kh, kw], got {tuple(weight.shape)}.")
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    times = -(-in_chans // channels)
    repeated = weight.float().repeat(1, times, 1, 1)[:, :in_chans]
    return (repeated * (channels / in_chans)).to(weight.dtype)
