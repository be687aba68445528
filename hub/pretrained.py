"""The two verbs: a name becomes a model with its weights, a model becomes a folder.

In: what `locate` understands, and the caller's wishes. Out: a model in eval mode with `source`
recorded; or a folder with config.json, model.safetensors and README.md.

Nothing is allocated before it is known to fit: config through the closed schema, parameters counted
by arithmetic, names and shapes compared with the model on the meta device, and only then the data.
What the caller passes always wins over what a file says.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natcupy.hub import card, convert, schema
from natcupy.hub.architecture import describe
from natcupy.hub.config import config_text
from natcupy.hub.download import Access
from natcupy.hub.errors import CheckpointError, Corrupt, some
from natcupy.hub.files import write_folder
from natcupy.hub.locate import CONFIG, WEIGHTS_FILE, Located, locate
from natcupy.hub.pickles import SUFFIXES, read_pickle
from natcupy.hub.tensors import Weights, read_header, read_tensors, write_tensors
from natcupy.zoo import ImageModel, build_model
from natcupy.zoo.config import MAX_PARAMETERS, SINGLE_LEVEL, ModelConfig

log = logging.getLogger("natcupy.hub")

README = "README.md"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Source:
    """Where a model's weights came from; `model.source` after loading.

    Attributes:
        kind: "embedded", "hub", "folder" or "file".
        path, sha256: the weights file that was read, and the hash of the bytes that were used.
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
) -> ImageModel:
    """A model with pretrained weights, in eval mode.

    Args:
        name: "nat-digits" (inside the package), a released model ("nat-small",
            "dinat_large_384.in22k_ft_in1k"), a Hub repository ("org/name", "org/name@revision"), a
            folder, or a file (.safetensors, .pth, .bin).
        revision: branch, tag or commit of a repository; default `main`.
        num_classes: another number of classes than the file's replaces the head by a fresh one.
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
            `features_only=True` for a backbone with fresh per-stage norms, `global_pool`.

    Returns:
        The model; `model.source` says what was read, `model.pretrained_cfg` how pictures go in.

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
    found = locate(name, revision, access)
    reader = _Reader(found)
    have, cfg = describe(found, reader.shapes, architecture, max_parameters)
    want = _wanted(have, wishes)
    if want.num_classes != have.num_classes:
        cfg.pop("label_names", None)
    cfg["num_classes"] = want.num_classes
    if want.num_classes != have.num_classes or want.out_indices != have.out_indices:
        cfg["tag"] = ""  # the tag names complete weights
    model, fresh = _matched(reader.shapes, have, want, cfg, found.weights)
    model = _filled(model, reader, have, want, fresh, target, check_finite)
    if global_pool is not None:
        model.set_global_pool(global_pool)
    if fresh:
        log.warning("not in %s, initialised afresh: %s.", found.weights.name, some(sorted(fresh)))
    model.source = _source(found, reader.sha256, revision, name)
    return model.to(device=device).eval()


class _Reader:
    """A weights file, read as late as its format allows: header first, or (pickles) all at once."""

    def __init__(self, found: Located):
        self._found = found
        self._weights: Weights | None = None
        if found.weights.suffix in SUFFIXES:
            self._weights = self._verified(read_pickle(found.weights))
            self.shapes = convert.to_natcupy(_meta(self._weights.tensors))
        else:
            self.shapes = convert.to_natcupy(read_header(found.weights).shapes)
        self.sha256 = ""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, in natcupy's names; can be taken once."""
        read = self._weights or self._verified(read_tensors(self._found.weights))
        self._weights, self.sha256 = None, read.sha256
        return convert.to_natcupy(read.tensors)

    def _verified(self, read: Weights) -> Weights:
        if self._found.sha256 and read.sha256 != self._found.sha256:
            raise Corrupt(
                f"{self._found.weights} must have SHA-256 {self._found.sha256}, got {read.sha256}. "
                "It changed after it was fetched; load again."
            )
        return read


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


def _wanted(have: ModelConfig, wishes: dict[str, Any]) -> ModelConfig:
    """The file's config with the caller's wishes, checked like any config."""
    wishes = dict(wishes)
    features_only = wishes.pop("features_only", None)
    if "family" in wishes:
        raise TypeError(f"family is decided by the weights, got family={wishes['family']!r}.")
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
    have: ModelConfig,
    want: ModelConfig,
    cfg: dict[str, Any],
    path: Path,
) -> tuple[ImageModel, frozenset[str]]:
    """The wanted model without memory, once names and shapes agree; and the names left fresh."""
    fitted, fresh = convert.fit(shapes, have, want)
    with torch.device("meta"):
        model = build_model(want, cfg)
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
    if not (missing or unexpected or misshapen):
        return
    wrong = [f"{name} is {got}, not {need}" for name, got, need in misshapen]
    parts = [
        f"{len(names)} {word}: {some(names)}"
        for word, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", wrong),
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


def _filled(
    model: ImageModel,
    reader: _Reader,
    have: ModelConfig,
    want: ModelConfig,
    fresh: frozenset[str],
    dtype: torch.dtype | None,
    check_finite: bool,
) -> ImageModel:
    """The model of `_matched` with memory: the tensors, and fresh parts as training starts them."""
    state, _ = convert.fit(reader.tensors(), have, want)
    _finite(state, check_finite)
    state = {name: _own(tensor, dtype) for name, tensor in state.items()}
    if fresh:
        model = build_model(want, model.pretrained_cfg).to(dtype or _floating(state))
        model.load_state_dict(state, strict=False)  # the difference is exactly `fresh`
        return model
    model.load_state_dict(state, strict=True, assign=True)
    return model


def _own(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in its final dtype, contiguous, in memory shared with no other."""
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone and tensor.is_contiguous() else tensor.contiguous().clone()


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


# ---------------------------------------------------------------- saving


def save_pretrained(
    model: ImageModel, folder: str | os.PathLike[str], *, overwrite_card: bool = False
) -> Path:
    """Write config.json, model.safetensors and README.md, all or none.

    A kill at any moment leaves the old folder or the new one, as `from_pretrained` reads it; saving
    into the folder the model was loaded from is safe. Tensors keep their dtype.

    Args:
        model: any model of the zoo.
        folder: made if missing; other files in it stay.
        overwrite_card: also replace a README.md that is there.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model was rebuilt by hand and is not what its config describes.
        ConfigError: its pretrained_cfg holds a value that could not be read back.
        OSError: the folder cannot be written.
    """
    from natcupy import __version__

    folder = Path(folder).expanduser()
    state = model.state_dict()
    with torch.device("meta"):
        compare(state, build_model(model.config).state_dict(), where=f"this {model.name}")
    text = config_text(model.config, model.pretrained_cfg, __version__)
    writers = {
        WEIGHTS_FILE: lambda path: write_tensors(state, path),
        CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
    }
    if overwrite_card or not (folder / README).exists():
        facts = schema.clean_pretrained_cfg(model.pretrained_cfg, model.config)
        readme = card.render(model.config, facts, getattr(model, "source", None))
        writers[README] = lambda path: path.write_text(readme, encoding="utf-8")
    write_folder(folder, writers)
    return folder
