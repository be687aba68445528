"""The model card of nat-digits.

In: the model's numbers, the recipe, and what was measured. Out: README.md as text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from natcupy.zoo import ModelConfig, count_macs, num_parameters

if TYPE_CHECKING:
    from natcupy.digits.training import Recipe

_TEXT = """---
library_name: natcupy
pipeline_tag: image-classification
license: mit
tags: [natcupy, neighborhood-attention, nat, digits]
---

# nat-digits

A small NAT (Neighborhood Attention Transformer, arXiv 2204.07143) that names the one digit
drawn on a picture. It ships inside natcupy, so that there is a real model to run with no
download:

```
natcupy classify digit.png
```

| | |
| --- | --- |
| parameters | {parameters:,} |
| multiply-adds per picture | {macs:.1f} million |
| input | grey, {side} x {side}, made by the preprocessing mode "ink" |
| levels | {depths} blocks, {dims} channels, {heads} heads |
| window | {kernel} x {kernel}, dilations {dilations} |
| weights | float16 |
| SHA-256 | `{sha256}` |

## Use and limits

One digit per picture, drawn or printed in any size and colour on an even ground, upright within
some 15 degrees. "ink" finds the drawing by its contrast with the picture's border and frames
it. Photographs, several digits at once, letters and anything else get an answer too, and it
means nothing.

## Data

* {pictures:,} pictures drawn by `natcupy.digits` from seed {seed}: simulated pens and nibs,
  seven-segment and dot displays, typefaces, enlarged scans; turned, slanted, stretched,
  blurred, coarsened, with noise.
* The typefaces are those inside the matplotlib package: DejaVu (Bitstream Vera licence), STIX
  (SIL Open Font License), Computer Modern (BaKoMa fonts licence). Only pictures of their digits
  were used.
* 80 % of scikit-learn's digits (1797 scans of 8 x 8 pixels, from the UCI machine learning
  repository, "Optical recognition of handwritten digits" by E. Alpaydin and C. Kaynak, CC BY
  4.0).

## Recipe

AdamW, learning rate {learning_rate:g} (200 steps of warm-up, cosine to 0), weight decay
{weight_decay:g}, batches of {batch_size}, {epochs} epochs, label smoothing {smoothing:g}, small
affine changes of every picture at every step. Seed {seed}. One command repeats it, on a CPU in
minutes:

```
pip install 'natcupy[train]'
natcupy train-digits --output nat-digits
```

## Held-out accuracy

None of these pictures, typefaces or ways of drawing was trained on. Mistakes on these
sets were looked at between three full runs, while the drawing of the training pictures was
designed, so the numbers flatter a little. Drawn sets go through the same distortions as the
training pictures. The scans are held out by picture, not by writer.

| set | pictures | accuracy |
| --- | --- | --- |
{table}
"""


def card(
    config: ModelConfig,
    recipe: Recipe,
    side: int,
    scores: dict[str, float],
    sizes: dict[str, int],
    sha256: str,
) -> str:
    """The card's text.

    `side` is the picture's, in pixels; `scores` and `sizes` are by the name of the held-out set;
    `sha256` is that of the weights file.
    """
    rows = [f"| {name} | {sizes[name]} | {100 * score:.1f} % |" for name, score in scores.items()]
    return _TEXT.format(
        parameters=num_parameters(config),
        macs=count_macs(config, side, side).plain / 1e6,
        side=side,
        sha256=sha256,
        depths=_list(config.depths),
        dims=_list(config.dims),
        heads=_list(config.num_heads),
        kernel=config.kernel_size,
        dilations="; ".join(_list(row) for row in config.dilations or ()),
        table="\n".join(rows),
        pictures=recipe.pictures,
        seed=recipe.seed,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        smoothing=recipe.smoothing,
    )


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
