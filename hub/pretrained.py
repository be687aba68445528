"""Loading: a name becomes a model with its weights.

In: what `locate` understands, and the caller's wishes. Out: a model in eval mode with `source`
recorded.

Nothing is allocated before it is known to fit: config through the closed schema, parameters counted
by arithmetic, names and shapes compared with the model on the meta device, and only then the data.
What the caller passes always wins over what a file says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natcupy.hub import convert, dense, shards
from natcupy.hub.architecture import describe
from natcupy.hub.client import Access
from natcupy.hub.dense import Config, Model
from natcupy.hub.errors import CheckpointError, Corrupt, some
from natcupy.hub.files import sha256_of, steady
from natcupy.hub.locate import Located, Shard, locate
from natcupy.hub.pickles import SUFFIXES, read_pickle
from natcupy.hub.tensors import Weights, read_header, read_tensors
from natcupy.hub.weights import embedded
from natcupy.zoo import MODELS, ImageModel, build_model
from natcupy.zoo.config import MAX_PARAMETERS, SINGLE_LEVEL, ModelConfig
from natcupy.zoo.dense import DenseConfig

log = logging.getLogger("natcupy.hub")

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """Where a model's weights came from; `model.source` after loading.

    Attributes:
        kind: "embedded", "hub", "folder" or "file".
        path, sha256: the weights file that was read, and the hash of the bytes that were used. Of
            several files, their index, and the hash of what `sha256sum model-*` prints.
        repo, revision, commit: of a Hub repository: what was asked for and what it stood for.
        tag: the released checkpoint, where it is one (`nat_small.in1k`).
        license: of those weights, where known.
    """

    kind: str
    path: str
    sha256: str
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    tag: str | None = None
    license: str | None = None


# ---------------------------------------------------------------- loading


def from_pretrained(
    name: str | os.PathLike[str],
    revision: str | None = None,
    num_classes: int | None = None,
    *,
    in_chans: int | None = None,
    kernel_size: int | None = None,
    architecture: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    check_finite: bool = False,
    max_parameters: int = MAX_PARAMETERS,
    **overrides: Any,
) -> Model:
    """A model with pretrained weights, in eval mode.

    Args:
        name: "nat-digits" (inside the package), a released model ("nat-small",
            "dinat-large-384.in22k_ft_in1k"), a Hub repository ("org/name", "org/name@revision"), a
            folder, or a file (.safetensors, .pth, .bin).
        revision: branch, tag or commit of a repository; default `main`.
        num_classes: another number of classes than the file's replaces the head (of a segmentation
            or detection model its classifiers) by a fresh one.
        in_chans: other channels than the file's adapt the first convolution.
        kernel_size: another window than the file's resizes the bias tables (bicubic).
        architecture: the zoo's name for weights without config.json. Needed where shapes leave it
            open, since dilations have no parameters.
        device: where the model goes; default the CPU.
        dtype: floating dtype of the model; default float32 whatever the file holds, "auto" keeps
            the file's.
        cache_dir, token, local_files_only: as the Hub client understands them.
        check_finite: raise where weights are NaN or infinite (default: one warning).
        max_parameters: refuse configs that describe a larger model.
        **overrides: any other field of `ModelConfig` (drop_path_rate, dilations, out_indices, …),
            `features_only=True` for a backbone with fresh per-stage norms (of a segmentation or
            detection model: its backbone with its own norms), `global_pool`.

    Returns:
        The model, an `ImageModel` or a `DenseModel`; `model.source` says what was read,
        `model.pretrained_cfg` how pictures go in.

    Raises:
        HubError: not found, gated, offline, corrupt, unsafe …, each its own class.
        CheckpointError: tensors missing, unexpected or misshapen, each named.
        ConfigError: config.json, or an override, breaks a rule.
        TypeError, ValueError: a wrong argument.
    """
    target = _dtype(dtype)
    wishes = {"num_classes": num_classes, "in_chans": in_chans, "kernel_size": kernel_size}
    wishes = {key: value for key, value in wishes.items() if value is not None} | overrides
    global_pool = wishes.pop("global_pool", None)
    access = Access(token, cache_dir, local_files_only)
    with _unchanged(name):
        found = locate(name, revision, access)
        model = load(
            found,
            wishes,
            architecture,
            target,
            check_finite=check_finite,
            max_parameters=max_parameters,
        )
    if global_pool is not None:
        if not isinstance(model.config, ModelConfig):
            raise TypeError(f"global_pool belongs to classifiers, {model.name} is none.")
        model.set_global_pool(global_pool)
    model.source = _source(found, model.source.sha256, revision, name)
    return model.to(device=device).eval()


def _unchanged(name: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Keeps other processes from saving to a path that is loaded; names on the Hub need nothing."""
    path = Path(os.path.expanduser(name)) if isinstance(name, str | os.PathLike) else Path()
    if path.is_file():
        path = path.parent
    elif not path.is_dir():
        return nullcontext()
    return steady(path)


def load(
    found: Located,
    wishes: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    check_finite: bool = False,
    max_parameters: int = MAX_PARAMETERS,
) -> Model:
    """The model of files that were found: `from_pretrained` after its search, on the CPU.

    `wishes` are changed fields of the config, `dtype` None keeps the file's.
    """
    reader = _Reader(found)
    wishes = dict(wishes or {})
    backbone_only = _backbone_only(wishes, architecture)
    have, cfg = describe(found, reader.shapes, architecture, max_parameters, backbone_only)
    want = _wanted(have, wishes)
    if want.num_classes != have.num_classes:
        cfg.pop("label_names", None)
    cfg["num_classes"] = want.num_classes
    if want.num_classes != have.num_classes or _outputs(want) != _outputs(have):
        cfg["tag"] = ""  # the tag names complete weights
    if isinstance(want, ModelConfig):
        cfg["input_size"] = _input_size(cfg, have, want)
    shapes = dense.renamed(reader.shapes, have)
    model, fresh = _matched(shapes, have, want, cfg, found.weights)
    model = _filled(model, reader, have, want, fresh, dtype, check_finite)
    _tell(fresh, shapes, model.state_dict(), found.weights.name)
    model.source = _source(found, reader.sha256, None, found.weights)
    return model.eval()


def _tell(
    fresh: frozenset[str], given: Mapping[str, Tensor], made: Mapping[str, Tensor], file: str
) -> None:
    """Log which tensors start fresh: those the file lacks, and those of another shape there."""
    absent = sorted(fresh - given.keys())
    if absent:
        log.warning("not in %s, initialised afresh: %s.", file, some(absent))
    reshaped = [
        f"{name} ({tuple(given[name].shape)} there, {tuple(made[name].shape)} here)"
        for name in sorted(fresh & given.keys())
        if given[name].shape != made[name].shape
    ]
    if reshaped:
        log.warning("of another shape in %s, initialised afresh: %s.", file, some(reshaped))


def create_bundled(name: str, *, global_pool: str | None = None, **overrides: Any) -> ImageModel:
    """A model that ships in the package with fresh weights, as `create_model` makes the others."""
    have, cfg = describe(locate(name, None, Access()), {}, None, MAX_PARAMETERS)
    want = _wanted(have, overrides)
    weights_own = {"license", *(() if want.num_classes == have.num_classes else ("label_names",))}
    cfg = {key: value for key, value in cfg.items() if key not in weights_own}
    _, height, width = cfg["input_size"]
    stated = {
        "tag": "",
        "num_classes": want.num_classes,
        "input_size": (want.in_chans, height, width),
    }
    model = build_model(want, cfg | stated)
    if global_pool is not None:
        model.set_global_pool(global_pool)
    return model


def read_state(found: Located) -> dict[str, Tensor]:
    """The verified tensors of a classifier or backbone that was found, in natcupy's names."""
    return convert.to_natcupy(_Reader(found).tensors())


def _backbone_only(wishes: Mapping[str, Any], architecture: str | None) -> bool:
    """Whether the caller wants a backbone, also from the file of a whole dense model."""
    if wishes.get("features_only") or wishes.get("out_indices") is not None:
        return True
    name = (architecture or "").strip().lower().replace("-", "_").partition(".")[0]
    return name in MODELS or embedded(name) is not None


def _input_size(cfg: Mapping[str, Any], have: ModelConfig, want: ModelConfig) -> tuple[int, ...]:
    """The file's, with the channels and the size that the caller wishes."""
    _, *sides = cfg["input_size"]
    if want.img_size != have.img_size and want.img_size is not None:
        sides = [want.img_size] * 2
    return want.in_chans, *sides


def _outputs(config: Config) -> tuple[int, ...] | None:
    return config.out_indices if isinstance(config, ModelConfig) else None


class _Reader:
    """The weights, read as late as their format allows: header first, or (pickles) all at once."""

    def __init__(self, found: Located):
        self._parts = found.shards or (Shard(found.weights, (), found.sha256),)
        self._several = bool(found.shards)
        self._read: dict[str, Tensor] | None = None
        self.sha256 = ""
        if found.weights.suffix in SUFFIXES:
            self._read = self._verified(self._parts[0], read_pickle(found.weights)).tensors
            shapes = _meta(self._read)
        else:
            shapes = self._joined([read_header(part.path).shapes for part in self._parts])
        self.shapes = shapes

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, as the file names them; can be taken once."""
        if self._read is None:
            read = [self._verified(part, read_tensors(part.path)) for part in self._parts]
            self._read = self._joined([weights.tensors for weights in read])
            self.sha256 = _hash_of_several([w.sha256 for w in read], self._parts)
        read, self._read = self._read, None
        return read

    def _joined(self, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All tensors, once every file holds exactly those the index says."""
        for part, tensors in zip(self._parts, parts, strict=True):
            wrong = tensors.keys() ^ set(part.tensors) if self._several else ()
            if wrong:
                raise Corrupt(
                    f"{part.path} must hold the tensors that the index names, it differs in "
                    f"{some(sorted(wrong), 5)}. Fetch the weights again."
                )
        return {name: tensor for tensors in parts for name, tensor in tensors.items()}

    def _verified(self, part: Shard, read: Weights) -> Weights:
        if part.sha256 and read.sha256 != part.sha256:
            raise Corrupt(
                f"{part.path} must have SHA-256 {part.sha256}, got {read.sha256}. "
                "It changed after it was fetched; load again."
            )
        self.sha256 = read.sha256
        return read


def _hash_of_several(hashes: list[str], parts: tuple[Shard, ...]) -> str:
    """Of one file its hash; of several the hash of the list that `sha256sum` prints for them."""
    if len(hashes) == 1:
        return hashes[0]
    lines = (f"{h}  {name}\n" for h, name in zip(hashes, shards.names(len(parts)), strict=True))
    return sha256_of("".join(lines).encode())


def _meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype to cast to, None to keep the file's."""
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return None
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in _DTYPES:
        raise ValueError(
            f"dtype must be float64, float32, float16, bfloat16, 'auto' or None, got {dtype!r}."
        )
    return dtype


def _wanted(have: Config, wishes: Mapping[str, Any]) -> Config:
    """The file's config with the caller's wishes, checked like any config."""
    wishes = dict(wishes)
    features_only = wishes.pop("features_only", None)
    if "family" in wishes:
        raise TypeError(f"family is decided by the weights, got family={wishes['family']!r}.")
    if isinstance(have, DenseConfig):
        return dense.wanted(have, wishes)
    if features_only and wishes.get("out_indices") is None:
        # Every level; of a single level, its last block.
        levels = len(have.depths)
        wishes["out_indices"] = (
            (have.num_stages - 1,) if have.family in SINGLE_LEVEL else tuple(range(levels))
        )
    elif features_only is False and wishes.get("out_indices") is not None:
        raise ValueError(
            f"out_indices belong to a feature backbone, got {wishes['out_indices']} with "
            "features_only=False."
        )
    return have.replace(**wishes)


def _matched(
    shapes: dict[str, Tensor],
    have: Config,
    want: Config,
    cfg: dict[str, Any],
    path: Path,
) -> tuple[Model, frozenset[str]]:
    """The wanted model without memory, once names and shapes agree; and the names left fresh."""
    fitted, fresh = _fit(shapes, have, want)
    with torch.device("meta"):
        model = dense.build(want, cfg)
    compare(fitted, model.state_dict(), fresh, path)
    return model, fresh


def compare(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    fresh: frozenset[str] = frozenset(),
    where: object = "the state dict",
) -> None:
    """Raise unless the tensors given are those wanted, up to the names that may stay fresh.

    Raises:
        CheckpointError: with every difference, the first ten of each kind in its text.
    """
    missing = sorted(wanted.keys() - given.keys() - fresh)
    unexpected = sorted(given.keys() - wanted.keys())
    misshapen = [
        (name, tuple(given[name].shape), tuple(wanted[name].shape))
        for name in sorted(given.keys() & wanted.keys())
        if given[name].shape != wanted[name].shape
    ]
    of_ints = [
        f"{name} is {given[name].dtype}, not {wanted[name].dtype}"
        for name in sorted(given.keys() & wanted.keys())
        if wanted[name].is_floating_point() and not given[name].is_floating_point()
    ]
    if not (missing or unexpected or misshapen or of_ints):
        return
    wrong = [f"{name} is {got}, not {need}" for name, got, need in misshapen]
    parts = [
        f"{len(names)} {word}: {some(names)}"
        for word, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", wrong),
            ("of another kind of number", of_ints),
        )
        if names
    ]
    raise CheckpointError(
        f"the tensors of {where} must be those of the model its config describes; "
        f"{'; '.join(parts)}. Check that weights and config belong together; to replace the head, "
        "pass num_classes.",
        missing,
        unexpected,
        misshapen,
    )


def _fit(
    state: Mapping[str, Tensor], have: Config, want: Config
) -> tuple[dict[str, Tensor], frozenset[str]]:
    fit = dense.fit if isinstance(have, DenseConfig) else convert.fit
    return fit(state, have, want)


def _filled(
    model: Model,
    reader: _Reader,
    have: Config,
    want: Config,
    fresh: frozenset[str],
    dtype: torch.dtype | None,
    check_finite: bool,
) -> Model:
    """The model of `_matched` with memory: the tensors, and fresh parts as training starts them."""
    state, _ = _fit(dense.renamed(reader.tensors(), have), have, want)
    _finite(state, check_finite)
    taken: set[int] = set()
    state = {name: _own(tensor, dtype, taken) for name, tensor in state.items()}
    if fresh:
        model = dense.build(want, model.pretrained_cfg).to(dtype or _floating(state))
        model.load_state_dict(state, strict=False)  # the difference is exactly `fresh`
        return model
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _own(tensor: Tensor, dtype: torch.dtype | None, taken: set[int]) -> Tensor:
    """The tensor in its final dtype, contiguous, in memory shared with no other.

    `taken` are the addresses of memory that tensors before it have.
    """
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if not (alone and tensor.is_contiguous()) or tensor.data_ptr() in taken:
        tensor = tensor.contiguous().clone()
    taken.add(tensor.data_ptr())
    return tensor


def _floating(state: Mapping[str, Tensor]) -> torch.dtype:
    return next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)


def _finite(state: Mapping[str, Tensor], strict: bool) -> None:
    bad = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if bad and strict:
        raise CheckpointError(
            f"weights must be finite (check_finite=True), got NaN or infinity in {some(bad)}."
        )
    if bad:
        log.warning("NaN or infinity in %s.", some(bad))


def _source(
    found: Located, sha256: str, revision: str | None, name: str | os.PathLike[str]
) -> Source:
    asked = revision or (name.partition("@")[2] if isinstance(name, str) and found.repo else None)
    return Source(
        kind=found.kind,
        path=str(found.weights),
        sha256=sha256,
        repo=found.repo,
        revision=(asked or "main") if found.repo else None,
        commit=found.commit,
        tag=found.row.tag if found.row else None,
        license=found.row.license if found.row else None,
    )
