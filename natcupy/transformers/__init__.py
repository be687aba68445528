"""natcupy's models in transformers: `import natcupy.transformers`, then its Auto classes.

In: transformers' calls. Out: `AutoConfig`, `AutoModel`, `AutoModelForImageClassification`,
`AutoBackbone`, `AutoImageProcessor` and `pipeline` know the model types nat, dinat, dinat_s,
isotropic and vitrpb, without remote code. transformers itself has no NAT any more, and its DiNAT
needs operators that no library has any more; both load and run here.

A model holds natcupy's modules under natcupy's names, so a repository that natcupy wrote loads as
it is, and what transformers saves loads in natcupy. `AutoBackbone.from_pretrained` takes no local
folders, for no model at all; `NatBackbone.from_pretrained` and its like here do. Weights come
through `natcupy.hub`: verified by hash, from shards, and from the released layout. Needs the extra
"transformers".
"""

from __future__ import annotations

from importlib.metadata import distributions

try:
    import transformers
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        PreTrainedConfig,
    )
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin  # noqa: F401

    # Earlier ones lose the heads of adapters, and take their own DiNAT for their own DinatConfig.
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19):
        raise ImportError(f"{transformers.__version__} is installed")
except ImportError as error:
    remedy = "Install it with: pip install 'natcupy[transformers]'."
    if {"transformers", "torchvision"} <= {d.name for d in distributions()}:
        remedy += (
            " If it is of that release already, torchvision may be the reason, which must be of "
            "torch's own build: install torch and torchvision again together, or remove "
            "torchvision, which these models do not need. `natcupy doctor` says if it fits."
        )
    raise ImportError(
        "natcupy.transformers registers natcupy's models in transformers >= 5.19, which cannot "
        f"be imported ({error}). {remedy}"
    ) from error

from natcupy.transformers.configs import (
    DinatConfig,
    DinatSConfig,
    IsotropicConfig,
    NatConfig,
    NatcupyConfig,
    VitRpbConfig,
)
from natcupy.transformers.models import NatBackbone, NatForImageClassification, NatModel
from natcupy.transformers.pictures import NatcupyImageProcessor

__all__ = [
    "DinatConfig",
    "DinatSConfig",
    "IsotropicConfig",
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatModel",
    "NatcupyConfig",
    "NatcupyImageProcessor",
    "VitRpbConfig",
]


def _register(config_class: type[PreTrainedConfig], word: str) -> None:
    """Classes of their own for one config class, which is how the Auto classes tell them apart."""
    made = {}
    for base in (NatModel, NatForImageClassification, NatBackbone):
        name = word + base.__name__.removeprefix("Nat")
        if base.config_class is config_class:
            made[base] = base
            continue
        members = {"config_class": config_class, "__doc__": base.__doc__, "__module__": __name__}
        made[base] = type(name, (base,), members)
        globals().setdefault(name, made[base])
    AutoModel.register(config_class, made[NatModel], exist_ok=True)
    AutoModelForImageClassification.register(
        config_class, made[NatForImageClassification], exist_ok=True
    )
    AutoBackbone.register(config_class, made[NatBackbone], exist_ok=True)
    processors = {"pil": NatcupyImageProcessor, "torchvision": NatcupyImageProcessor}
    AutoImageProcessor.register(config_class, image_processor_classes=processors, exist_ok=True)


for _config_class, _word in (
    (NatConfig, "Nat"),
    (DinatConfig, "Dinat"),
    (DinatSConfig, "DinatS"),
    (IsotropicConfig, "Isotropic"),
    (VitRpbConfig, "VitRpb"),
):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    _register(_config_class, _word)
# Code that builds transformers' own DinatConfig gets a model that runs, too.
_register(transformers.DinatConfig, "TransformersDinat")
