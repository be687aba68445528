"""LoRA on the attention of a NAT: few parameters train, and are merged into plain weights.

    python examples/lora.py DATA OUTPUT [--model NAME] [--epochs N]

In: a folder with a folder of pictures per class. Out: the folder of a run; its `model` is a model
like any other, since the adapters are merged. Needs peft: pip install peft.
"""

from __future__ import annotations

import argparse

import natcupy
from natcupy.data import find
from natcupy.train import Result, TrainConfig, finetune


def finetune_lora(data: str, output: str, model: str = "nat-digits", **numbers) -> Result:
    """Adapters on `qkv` and `proj` of every attention, and a fresh head."""
    try:  # here, so that `--help` works without it
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        if error.name != "peft":  # something that peft itself needs
            raise
        raise ModuleNotFoundError(f"{error}; this example needs peft: pip install peft") from None
    split = find(data)
    base = natcupy.from_pretrained(model, num_classes=len(split.classes))
    adapters = LoraConfig(
        r=8, lora_alpha=16, target_modules=r".*\.attn\.(qkv|proj)", modules_to_save=["head"]
    )
    lora = get_peft_model(base, adapters)
    lora.print_trainable_parameters()
    config = TrainConfig(output, **{"epochs": 10, "lr": 3e-3, **numbers})
    return finetune(lora, split.train, split.val, config, data_name=split.name)


def main() -> None:
    """Read the arguments, train, print the scores."""
    parser = argparse.ArgumentParser(description="Finetune a NAT with LoRA, by peft.")
    parser.add_argument("data", metavar="DATA", help="folder with a folder of pictures per class")
    parser.add_argument("output", metavar="OUTPUT", help="folder of the run: new, or empty")
    parser.add_argument(
        "--model", default="nat-digits", help="name, folder or org/name (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    result = finetune_lora(
        arguments.data, arguments.output, arguments.model, epochs=arguments.epochs
    )
    print(result.scores)


if __name__ == "__main__":
    main()
