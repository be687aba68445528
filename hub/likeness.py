"""How far two models' numbers agree, as far as weights can show it.

In: two `ModelConfig`s. Out: the differences in words; none means that they are alike.
"""

from __future__ import annotations

from natcupy.zoo.config import ModelConfig

# What shapes cannot show, and what a finetuned copy may change freely.
HIDDEN = ("dilations", "drop_path_rate", "layer_scale", "img_size")
FREE = ("num_classes", "in_chans", "out_indices")


def shape_differences(seen: ModelConfig, known: ModelConfig) -> list[str]:
    """What shapes tell apart; `seen` is read from them."""
    wrong = differences(seen, known, (*HIDDEN, *FREE, "mlp_ratio"))
    if (seen.layer_scale is None) != (known.layer_scale is None):
        wrong.append(f"layer scale {'absent' if seen.layer_scale is None else 'present'}")
    if int(seen.embed_dim * seen.mlp_ratio) != int(known.embed_dim * known.mlp_ratio):
        wrong.append(f"mlp_ratio {seen.mlp_ratio:g} instead of {known.mlp_ratio:g}")
    return wrong


def differences(one: ModelConfig, other: ModelConfig, ignored: tuple[str, ...]) -> list[str]:
    """Fields that differ, but for those ignored."""
    mine, theirs = one.to_dict(), other.to_dict()
    return [
        f"{key} {mine[key]} instead of {theirs[key]}"
        for key in mine
        if key not in ignored and mine[key] != theirs[key]
    ]
