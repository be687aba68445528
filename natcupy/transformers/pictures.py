"""Pictures: an image processor that prepares them as natcupy does, number for number.

In: a preprocessor_config.json and pictures. Out: `pixel_values`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from natcupy.hub.preprocessor import parse_preprocessor
from natcupy.zoo import Preprocess


class NatcupyImageProcessor(BaseImageProcessor):
    """Pictures as `model.preprocess` of natcupy makes them, number for number."""

    model_input_names = ["pixel_values"]  # noqa: RUF012  (as transformers declares it)

    def recipe(self) -> Preprocess:
        """The recipe in the file this was loaded from."""
        values = {k: v for k, v in self.to_dict().items() if k != "image_processor_type"}
        cfg = parse_preprocessor(json.dumps(values).encode(), "preprocessor_config.json")
        exact = ("input_size", "crop_pct", "crop_mode")
        return Preprocess(**{**cfg, **{key: values[key] for key in exact if key in values}})

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """One picture or a list of them (PIL, array or tensor) to `pixel_values` `[B, C, H, W]`."""
        recipe = self.recipe()
        single = not isinstance(images, list | tuple)
        pixels = torch.cat([recipe(image) for image in ([images] if single else images)])
        return BatchFeature({"pixel_values": list(pixels)}, tensor_type=return_tensors)
