"""Small models with invented weights, one or two of each family, for the tests of the hub."""

import torch

from natcupy.zoo import ModelConfig, build_model

CONFIGS = {
    "nat": ModelConfig(
        family="nat", embed_dim=8, depths=(1, 2), num_heads=(1, 2), kernel_size=3, num_classes=5
    ),
    "dinat": ModelConfig(
        family="nat",
        embed_dim=8,
        depths=(2, 2, 1),
        num_heads=(2, 2, 4),
        kernel_size=3,
        dilations=((1, 2), (1, 3), (1,)),
        mlp_ratio=2.0,
        layer_scale=0.5,
        num_classes=4,
        in_chans=1,
    ),
    "dinat_s": ModelConfig(
        family="dinat_s",
        embed_dim=8,
        depths=(2, 1),
        num_heads=(1, 2),
        kernel_size=3,
        dilations=((1, 2), (1,)),
        mlp_ratio=4.0,
        num_classes=3,
    ),
    "isotropic": ModelConfig(
        family="isotropic", embed_dim=8, depths=(2,), num_heads=(2,), kernel_size=3, img_size=64,
        num_classes=3,
    ),
    "vitrpb": ModelConfig(
        family="vitrpb", embed_dim=8, depths=(2,), num_heads=(2,), kernel_size=None, img_size=32,
        num_classes=3,
    ),
    "backbone": ModelConfig(
        family="nat", embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3,
        out_indices=(0, 1),
    ),
}  # fmt: skip


def invented(name, seed=0):
    """A model of `CONFIGS[name]` with random weights everywhere, in eval mode."""
    torch.manual_seed(seed)
    model = build_model(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def picture(config, seed=1):
    torch.manual_seed(seed)
    return torch.randn(2, config.in_chans, config.img_size or 48, config.img_size or 40)


def same(one, other):
    """Two state dicts hold the same names, shapes, dtypes and bits."""
    assert one.keys() == other.keys(), set(one) ^ set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def folder_of(model, place):
    """The files of a saved model, as a repository holds them."""
    folder = model.save_pretrained(place)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
