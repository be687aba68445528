"""What `segment` and `detect` share: the model, the files one by one, where results are written.

Which files the command line names, `classify` asks here, too.

In: the command line's arguments and a function that turns one picture into a record. Out: a record
or a reason per file; pictures at the paths that were asked for, each written whole or not at all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image
from tqdm import tqdm

from natcupy.cli import one_line
from natcupy.data import named_files, why
from natcupy.hub.files import writing
from natcupy.zoo.dense.images import read_pixels

Record = dict[str, Any]
MOST_NAMED = 5  # folders in one warning
# Formats that give grey numbers back as they were; of those above 255, all but .bmp hold them.
LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".pgm")


def targets(
    files: list[Path],
    output: str | None,
    option: str = "--output",
    allowed: Collection[str] | None = None,
) -> list[Path | None]:
    """Where each file's result goes: the output itself for one file, else in a folder of that name.

    Args:
        files: the pictures.
        output: what the command line's `option` says.
        allowed: suffixes a file may have; None for those of any picture.

    Raises:
        ValueError: a result would replace one of the pictures, its suffix is not allowed, or a file
            is named for the results of several pictures.
    """
    if output is None:
        return [None] * len(files)
    place = Path(output)
    is_folder = place.is_dir() or output.endswith(("/", os.sep))
    if len(files) == 1 and not is_folder:
        if place.suffix.lower() not in (allowed or Image.registered_extensions()):
            others = ", ".join(allowed[1:]) if allowed else "another picture suffix"
            raise ValueError(
                f"{option} must end in .png or {others}, got {output}. "
                f"Write {output}/ for a folder."
            )
        found = [place]
    else:
        like_file = place.suffix.lower() in Image.registered_extensions() and not is_folder
        if like_file or (place.exists() and not place.is_dir()):
            raise ValueError(
                f"{option} must be a folder for several pictures, got {output} for {len(files):,}. "
                "Name a folder."
            )
        found = _names_in(place, files)
    pictures = {file.resolve() for file in files}
    clash = next((path for path in found if path.resolve() in pictures), None)
    if clash is not None:
        raise ValueError(f"{option} must not replace a picture that is read, got {clash}.")
    return found


def _names_in(folder: Path, files: list[Path]) -> list[Path]:
    """One new name per file, numbered where two have the same."""
    taken: set[str] = set()
    found = []
    for file in files:
        name, number = file.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name.lower())
        found.append(folder / f"{name}.png")
    return found


def each(
    files: list[Path], channels: int, work: Callable[[int, np.ndarray], Record]
) -> Iterator[Record]:
    """Every file's record, in order; a file that fails has an "error" and stops no other.

    Args:
        files: pictures.
        channels: of the model.
        work: number of the file and pixels `[H, W, channels]` in 0..255 to the record.
    """
    quiet = True if len(files) == 1 else None  # None: no bar where stderr is no terminal
    for number, file in enumerate(tqdm(files, unit="picture", leave=False, disable=quiet)):
        begun = time.perf_counter()
        try:
            pixels = read_pixels(os.fspath(file), channels).numpy()
        except Exception as error:  # decoders raise nearly anything for broken data
            yield {"file": str(file), "error": why(error)}
            continue
        try:
            record = work(number, pixels)
        except (ValueError, OSError) as error:  # of another file than the picture
            yield {"file": str(file), "error": one_line(error)}
            continue
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        yield {"file": str(file), **size, "seconds": time.perf_counter() - begun, **record}


def as_given(pixels: np.ndarray) -> np.ndarray:
    """Pixels of `each` as models take them: bytes, or floats in 0..1."""
    return pixels if pixels.dtype == np.uint8 else pixels / 255


def colour(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any kind as `[H, W, 3]` uint8, to draw on."""
    whole = pixels.round().clip(0, 255).astype(np.uint8)
    return whole if whole.shape[2] == 3 else whole[..., :1].repeat(3, axis=2)


def save(image: Image.Image, path: Path) -> None:
    """Write a picture beside its place, then move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}.part{path.suffix}")
    try:
        with writing(path):
            image.save(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def named(arguments_images: list[str]) -> tuple[list[Path], int]:
    """The files that the command line names, and the exit status so far.

    That is 1 if folders cannot be listed: a line on stderr names them. Raises ValueError where no
    picture is left.
    """
    closed: list[tuple[str, str]] = []
    files = list(named_files((Path(name) for name in arguments_images), closed))
    if not closed:
        return files, 0
    some = ", ".join(f"{folder} ({reason})" for folder, reason in closed[:MOST_NAMED])
    more = " ..." if len(closed) > MOST_NAMED else ""
    told = f"folders that cannot be listed are left out, {len(closed):,} of them: {some}{more}"
    if not files:
        raise ValueError(f"there must be a picture to look at; {told}.")
    print(f"natcupy: warning: {told}", file=sys.stderr)
    return files, 1


def report(records: list[Record]) -> int:
    """Name the files that failed on stderr; the exit status."""
    bad = [record for record in records if "error" in record]
    for record in bad:
        print(f"natcupy: error: {record['file']}: {record['error']}", file=sys.stderr)
    return 1 if bad else 0
