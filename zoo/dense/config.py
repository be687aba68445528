"""The numbers of a segmentation or detection model: a backbone's record and a few widths, checked.

In: keyword arguments or a JSON object. Out: a frozen `DenseConfig`, or a `ConfigError` that names
the field. Nothing here allocates a tensor.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, fields, replace

from natcupy.zoo.config import ConfigError, ModelConfig

TASKS = {
    "upernet": "segmentation",
    "mask_rcnn": "detection",
    "cascade_mask_rcnn": "detection",
}
MAX_CLASSES = 100_000
_WIDTHS = {"segmentation": ("channels", "aux_channels"), "detection": ("channels", "fc_channels")}


@dataclass(frozen=True)
class DenseConfig:
    """Everything that decides a dense model's modules and their shapes.

    Attributes:
        architecture: "upernet", "mask_rcnn" or "cascade_mask_rcnn".
        backbone: the feature backbone; its `out_indices` must name every level.
        num_classes: classes to tell apart; a detector adds background by itself.
        channels: width of the decoder (UPerNet: 512) or of the feature pyramid and the
            convolutional heads (detectors: 256).
        aux_channels: width of UPerNet's auxiliary head; None for detectors.
        fc_channels: width of the detectors' box heads; None for UPerNet.
    """

    architecture: str
    backbone: ModelConfig
    num_classes: int
    channels: int
    aux_channels: int | None = None
    fc_channels: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in TASKS:
            known = ", ".join(map(repr, TASKS))
            raise ConfigError(f"architecture must be one of {known}, got {self.architecture!r}.")
        self._check_backbone()
        _integer("num_classes", self.num_classes, MAX_CLASSES)
        used = _WIDTHS[self.task]
        for name in ("channels", "aux_channels", "fc_channels"):
            value = getattr(self, name)
            if name in used:
                _integer(name, value, 8192)
            elif value is not None:
                raise ConfigError(
                    f"{name} must be None for {self.architecture!r}, which has no such part, got "
                    f"{reprlib.repr(value)}."
                )

    @property
    def task(self) -> str:
        """ "segmentation" or "detection"."""
        return TASKS[self.architecture]

    @property
    def in_chans(self) -> int:
        """Channels of the pictures."""
        return self.backbone.in_chans

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per pixel of each of the backbone's maps."""
        return tuple(4 << level for level in range(len(self.backbone.depths)))

    def replace(self, **changes: object) -> DenseConfig:
        """A copy with some fields changed, checked like a new one."""
        _known_fields(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, object]:
        """The fields as plain JSON values; the backbone as an object of its own."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "backbone": self.backbone.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> DenseConfig:
        """A config from untrusted JSON values: unknown and missing fields are errors."""
        if not isinstance(values, dict):
            raise ConfigError(f"a dense config must be an object, got {type(values).__name__}.")
        _known_fields(values)
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ConfigError(f"a dense config must state {', '.join(missing)}; they are missing.")
        return cls(**{**values, "backbone": ModelConfig.from_dict(values["backbone"])})

    def _check_backbone(self) -> None:
        backbone = self.backbone
        if not isinstance(backbone, ModelConfig):
            raise ConfigError(f"backbone must be a ModelConfig, got {type(backbone).__name__}.")
        if backbone.family not in ("nat", "dinat_s"):
            raise ConfigError(
                f"a dense model needs a backbone with several levels, family 'nat' or 'dinat_s', "
                f"got {backbone.family!r}."
            )
        levels = len(backbone.depths)
        if levels < 2 or backbone.out_indices != tuple(range(levels)):
            raise ConfigError(
                f"a dense model's backbone must have at least 2 levels and hand out all of them, "
                f"got {levels} levels with out_indices={backbone.out_indices}; build it with "
                f"features_only=True."
            )


_NAMES = tuple(field.name for field in fields(DenseConfig))
_REQUIRED = ("architecture", "backbone", "num_classes", "channels")


def _known_fields(values: dict[str, object]) -> None:
    for name in values:
        if name not in _NAMES:
            raise ConfigError(
                f"a dense config has no field {reprlib.repr(name)}; known: {', '.join(_NAMES)}."
            )


def _integer(name: str, value: object, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise ConfigError(f"{name} must be an int in 1..{high}, got {reprlib.repr(value)}.")
