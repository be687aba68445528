"""The numbers of a model: one flat record for every family, checked before anything is built.

In: keyword arguments or a JSON object. Out: a frozen `ModelConfig`, its exact number of parameters,
or a `ConfigError` that names the field. Nothing here allocates a tensor.
"""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import asdict, dataclass, fields, replace

FAMILIES = ("nat", "dinat_s", "isotropic", "vitrpb")
SINGLE_LEVEL = ("isotropic", "vitrpb")  # one map size from patch embedding to head
PATCH_SIZE = {"nat": 4, "dinat_s": 4, "isotropic": 16, "vitrpb": 16}
MAX_LEVELS = 6
MAX_PARAMETERS = 1_000_000_000


class _Short(reprlib.Repr):
    """Short text of any value, however large."""

    def repr_int(self, value: int, level: int) -> str:
        huge = value.bit_length() > 256  # Python refuses to print the largest
        return f"an int of {value.bit_length()} bits" if huge else super().repr_int(value, level)


_show = _Short()
_show.maxstring = _show.maxother = 60


class ConfigError(ValueError):
    """A field of a model config is unknown, of the wrong type, or out of bounds."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's modules and their shapes.

    Attributes:
        family: "nat" (NAT and DiNAT), "dinat_s", "isotropic" or "vitrpb".
        embed_dim: channels of the first level; level i has `embed_dim * 2**i`.
        depths: blocks per level, 1 to 6 levels ("isotropic" and "vitrpb" have one).
        num_heads: attention heads per level.
        kernel_size: window side; None for "vitrpb", whose attention sees the whole map.
        dilations: per level, one value per block; None means 1 everywhere.
        mlp_ratio: hidden over outer channels of the MLPs.
        layer_scale: initial value of the per-channel branch weights; None leaves them out.
        drop_path_rate: stochastic depth of the last block; earlier blocks ramp up from 0.
        num_classes: rows of the classifier; 0 leaves it out.
        in_chans: channels of the picture.
        img_size: side of the picture, for "isotropic" and "vitrpb" (a multiple of 16); else None.
        out_indices: None builds a classifier. A tuple of stages builds a feature backbone: no final
            norm and head, one `norm{i}` per stage named. Stages are levels, or blocks where there
            is a single level.
    """

    family: str
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    kernel_size: int | None = 7
    dilations: tuple[tuple[int, ...], ...] | None = None
    mlp_ratio: float = 3.0
    layer_scale: float | None = None
    drop_path_rate: float = 0.0
    num_classes: int = 1000
    in_chans: int = 3
    img_size: int | None = None
    out_indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _choice("family", self.family, FAMILIES)
        _integer("embed_dim", self.embed_dim, 1, 8192)
        self._set("depths", _integers("depths", self.depths, 1, 256, MAX_LEVELS))
        self._set("num_heads", _integers("num_heads", self.num_heads, 1, 1024, MAX_LEVELS))
        self._check_levels()
        self._check_attention()
        self._set("mlp_ratio", _number("mlp_ratio", self.mlp_ratio, 0.01, 64))
        if self.layer_scale is not None:
            self._set("layer_scale", _number("layer_scale", self.layer_scale, 1e-12, 100))
        self._set("drop_path_rate", _number("drop_path_rate", self.drop_path_rate, 0, 0.999))
        _integer("num_classes", self.num_classes, 0, 1_000_000)
        _integer("in_chans", self.in_chans, 1, 1024)
        self._check_img_size()
        if self.out_indices is not None:
            self._set("out_indices", pick_stages(self.out_indices, self.num_stages, "out_indices"))

    # -- reading ---------------------------------------------------------------------------------

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels per level."""
        return tuple(self.embed_dim * 2**level for level in range(len(self.depths)))

    @property
    def num_stages(self) -> int:
        """Feature maps a model can hand out: levels, or blocks where there is a single map size."""
        return self.depths[0] if self.family in SINGLE_LEVEL else len(self.depths)

    def stage_dim(self, stage: int) -> int:
        """Channels of a stage's feature map."""
        return self.embed_dim if self.family in SINGLE_LEVEL else self.dims[stage]

    def dilation(self, level: int, block: int) -> int:
        """Dilation of one block."""
        return 1 if self.dilations is None else self.dilations[level][block]

    def replace(self, **changes: object) -> ModelConfig:
        """A copy with some fields changed, checked like a new one."""
        _known_fields(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, object]:
        """The fields as plain JSON values (tuples become lists)."""
        return {name: _lists(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(
        cls, values: dict[str, object], max_parameters: int = MAX_PARAMETERS
    ) -> ModelConfig:
        """A config from untrusted JSON values: unknown and missing fields are errors.

        Raises ConfigError, also when the model would have more than `max_parameters` parameters.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a model config must be an object, got {type(values).__name__}.")
        _known_fields(values)
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ConfigError(f"a model config must state {', '.join(missing)}; they are missing.")
        config = cls(**values)
        count = num_parameters(config)
        if count > max_parameters:
            raise ConfigError(
                f"the model must have at most {max_parameters:,} parameters, this config asks for "
                f"{count:,}; pass a larger max_parameters if that is meant."
            )
        return config

    # -- checking --------------------------------------------------------------------------------

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_levels(self) -> None:
        if len(self.num_heads) != len(self.depths):
            raise ConfigError(
                f"num_heads must have one entry per level, got {len(self.num_heads)} for "
                f"{len(self.depths)} levels in depths."
            )
        if self.family in SINGLE_LEVEL and len(self.depths) != 1:
            raise ConfigError(
                f"depths must have exactly one level for family {self.family!r}, got {self.depths}."
            )
        if self.family == "nat" and self.embed_dim % 2:
            raise ConfigError(
                f"embed_dim must be even for family 'nat' (the stem halves it), got "
                f"{self.embed_dim}."
            )
        for level, (dim, heads) in enumerate(zip(self.dims, self.num_heads, strict=True)):
            if dim % heads:
                raise ConfigError(
                    f"num_heads must divide the channels of each level, got {heads} heads for "
                    f"{dim} channels at level {level}."
                )

    def _check_attention(self) -> None:
        if self.family == "vitrpb":
            for name in ("kernel_size", "dilations"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name} must be None for family 'vitrpb', which has no window, got "
                        f"{_show.repr(getattr(self, name))}."
                    )
            return
        _integer("kernel_size", self.kernel_size, 1, 255)
        if self.dilations is None:
            return
        _sequence("dilations", self.dilations, len(self.depths))
        if len(self.dilations) != len(self.depths):
            raise ConfigError(
                f"dilations must have one list per level, got {len(self.dilations)} for "
                f"{len(self.depths)} levels."
            )
        checked = []
        for level, (row, depth) in enumerate(zip(self.dilations, self.depths, strict=True)):
            checked.append(_integers(f"dilations[{level}]", row, 1, 4096, depth))
            if len(checked[-1]) != depth:
                raise ConfigError(
                    f"dilations[{level}] must have one entry per block, got {len(checked[-1])} "
                    f"for depth {depth}."
                )
        self._set("dilations", tuple(checked))

    def _check_img_size(self) -> None:
        if self.family not in SINGLE_LEVEL:
            if self.img_size is not None:
                raise ConfigError(
                    f"img_size must be None for family {self.family!r}, which takes any picture, "
                    f"got {_show.repr(self.img_size)}."
                )
            return
        patch = PATCH_SIZE[self.family]
        # A dense-attention table grows with the fourth power of the side: hence the lower bound.
        _integer("img_size", self.img_size, patch, 1024 if self.family == "vitrpb" else 8192)
        if self.img_size % patch:
            raise ConfigError(f"img_size must be a multiple of {patch}, got {self.img_size}.")


_REQUIRED = ("family", "embed_dim", "depths", "num_heads")
_NAMES = tuple(field.name for field in fields(ModelConfig))


def pick_stages(
    indices: int | tuple[int, ...] | None, count: int, name: str = "indices"
) -> tuple[int, ...]:
    """Stages from None (all), an int (the last so many) or a list that may count from the end.

    Out: ascending numbers in 0..count-1. Raises ConfigError.
    """
    if indices is None:
        return tuple(range(count))
    if isinstance(indices, int) and not isinstance(indices, bool):
        _integer(name, indices, 1, count)
        return tuple(range(count - indices, count))
    picked = _integers(name, indices, -count, count - 1, count)
    picked = tuple(index % count for index in picked)
    if list(picked) != sorted(set(picked)):
        raise ConfigError(f"{name} must ascend without repetition, got {_show.repr(indices)}.")
    return picked


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters of the model, by arithmetic alone (buffers are not counted)."""
    total = _stem_parameters(config)
    for level, (dim, depth) in enumerate(zip(config.dims, config.depths, strict=True)):
        total += depth * _block_parameters(config, level)
        if level < len(config.depths) - 1:
            total += _downsampler_parameters(config.family, dim)
    if config.out_indices is not None:
        return total + sum(2 * config.stage_dim(stage) for stage in config.out_indices)
    final = config.dims[-1]
    head = (final + 1) * config.num_classes
    return total + 2 * final + head


def _stem_parameters(config: ModelConfig) -> int:
    dim, patch = config.embed_dim, PATCH_SIZE[config.family]
    if config.family == "nat":
        half = dim // 2
        convs = (9 * config.in_chans + 1) * half + (9 * half + 1) * dim
    else:
        convs = (patch * patch * config.in_chans + 1) * dim
    return convs + 2 * dim


def _block_parameters(config: ModelConfig, level: int) -> int:
    dim, heads = config.dims[level], config.num_heads[level]
    window = config.kernel_size
    if config.family == "vitrpb":
        window = config.img_size // PATCH_SIZE["vitrpb"]
    hidden = int(dim * config.mlp_ratio)
    attention = 3 * dim * (dim + 1) + dim * (dim + 1) + heads * (2 * window - 1) ** 2
    mlp = hidden * (dim + 1) + dim * (hidden + 1)
    scales = 0 if config.layer_scale is None else 2 * dim
    return 4 * dim + attention + mlp + scales


def _downsampler_parameters(family: str, dim: int) -> int:
    if family == "dinat_s":
        return 8 * dim + 8 * dim * dim  # LayerNorm(4 dim), Linear(4 dim, 2 dim)
    return 18 * dim * dim + 4 * dim  # 3x3 convolution, LayerNorm(2 dim)


# -- one field at a time ------------------------------------------------------------------------


def _known_fields(values: dict[str, object]) -> None:
    for name in values:
        if name not in _NAMES:
            near = difflib.get_close_matches(str(name)[:80], _NAMES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_NAMES)}."
            raise ConfigError(f"a model config has no field {_show.repr(name)}; {hint}")


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(map(repr, choices))
        raise ConfigError(f"{name} must be one of {known}, got {_show.repr(value)}.")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an int in {low}..{high}, got {_show.repr(value)}.")


def _number(name: str, value: object, low: float, high: float) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not low <= value <= high:  # NaN fails every comparison
        raise ConfigError(f"{name} must be a number in {low}..{high}, got {_show.repr(value)}.")
    return float(value)


def _sequence(name: str, value: object, longest: int) -> None:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= longest:
        raise ConfigError(
            f"{name} must be a list of 1 to {longest} entries, got {_show.repr(value)}."
        )


def _integers(name: str, value: object, low: int, high: int, longest: int) -> tuple[int, ...]:
    _sequence(name, value, longest)
    for index, entry in enumerate(value):
        _integer(f"{name}[{index}]", entry, low, high)
    return tuple(value)


def _lists(value: object) -> object:
    return [_lists(entry) for entry in value] if isinstance(value, tuple) else value
