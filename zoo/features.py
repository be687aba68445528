"""Facts about a model's feature maps and layers, for dense heads and layer-wise learning rates.

In: a `ModelConfig`. Out: `FeatureInfo` (channels, reduction and module of each stage) and the
patterns of `group_matcher`, both in the form that timm's users expect.
"""

from __future__ import annotations

from typing import Any

from natcupy.zoo.config import PATCH_SIZE, SINGLE_LEVEL, ModelConfig


class FeatureInfo(list):
    """One dict per stage: `num_chs`, `reduction` (input pixels per map pixel) and `module`.

    The methods answer for one stage, for a list of them, or by default for those the model returns.
    """

    out_indices: tuple[int, ...]

    @classmethod
    def of(cls, config: ModelConfig, stages_name: str) -> FeatureInfo:
        """The stages of a model whose modules are called `{stages_name}.{i}`."""
        info = cls(
            {
                "num_chs": config.stage_dim(stage),
                "reduction": _reduction(config, stage),
                "module": f"{stages_name}.{stage}",
            }
            for stage in range(config.num_stages)
        )
        info.out_indices = config.out_indices or tuple(range(config.num_stages))
        return info

    def channels(self, idx: int | list[int] | None = None) -> Any:
        """Channels of the maps."""
        return self._get("num_chs", idx)

    def reduction(self, idx: int | list[int] | None = None) -> Any:
        """Input pixels per map pixel, along a side."""
        return self._get("reduction", idx)

    def module_name(self, idx: int | list[int] | None = None) -> Any:
        """Names of the modules whose outputs the maps are."""
        return self._get("module", idx)

    def get_dicts(self, keys: list[str] | None = None, idx: int | list[int] | None = None) -> Any:
        """The dicts themselves, or the named keys of them."""
        chosen = [self[i] for i in self._stages(idx)]
        dicts = [{k: d[k] for k in keys or d} for d in chosen]
        return dicts[0] if isinstance(idx, int) else dicts

    def _get(self, key: str, idx: int | list[int] | None) -> Any:
        values = [self[i][key] for i in self._stages(idx)]
        return values[0] if isinstance(idx, int) else values

    def _stages(self, idx: int | list[int] | None) -> list[int]:
        if idx is None:
            return list(self.out_indices)
        return [idx] if isinstance(idx, int) else list(idx)


def group_matcher(family: str, stages_name: str, coarse: bool) -> dict[str, Any]:
    """Regular expressions from parameter names to layer groups, in timm's form.

    Coarse: one group per stage. Fine: one per block; a level's downsampler follows its last block.
    """
    stage = rf"^{stages_name}\.(\d+)"
    if coarse:
        blocks: Any = stage
    elif family in SINGLE_LEVEL:
        blocks = [(stage, None), (r"^norm", (99999,))]
    else:
        blocks = [
            (rf"{stage}\.downsample", (99999,)),
            (rf"{stage}\.\w+\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
    return {"stem": r"^patch_embed", "blocks": blocks}


def _reduction(config: ModelConfig, stage: int) -> int:
    level = 0 if config.family in SINGLE_LEVEL else stage
    return PATCH_SIZE[config.family] * 2**level
