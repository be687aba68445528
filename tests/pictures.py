"""Pictures and folders of pictures for tests: small, drawn from a seed, good and bad."""

import os
from pathlib import Path

import numpy as np
from PIL import Image


def noise(seed, size=(12, 10), mode="RGB"):
    """A picture of random pixels."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels))
    return Image.fromarray(values.astype(np.uint8), mode=mode)


def class_folders(root: Path, counts, suffix=".png"):
    """One folder per class with that many pictures; `counts` is {class: number}."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            noise(seed).save(root / name / f"{index:03}{suffix}")
            seed += 1
    return root


def kinds(folder: Path):
    """Readable pictures of every kind: {name: how it should look, as "L" or "RGB"}."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}

    def put(name, image, expected=None, **options):
        image.save(folder / name, **options)
        made[name] = image if expected is None else expected

    put("rgb.png", noise(1))
    put("grey.png", noise(2, mode="L"))
    put("rgba.png", noise(3, mode="RGBA"), noise(3, mode="RGBA").convert("RGB"))
    put("la.png", noise(4, mode="LA"), noise(4, mode="LA").convert("L"))
    palette = noise(5).quantize(16)
    put("palette.png", palette, palette.convert("RGB"))
    put("palette-clear.png", palette, palette.convert("RGB"), transparency=3)
    put("cmyk.tif", noise(6, mode="CMYK"), noise(6, mode="CMYK").convert("RGB"))
    bits = noise(7, mode="L").convert("1")
    put("bits.png", bits, bits.convert("L"))
    deep = np.random.default_rng(8).integers(0, 65536, (10, 12)).astype(np.uint16)
    grey = Image.fromarray((deep.astype(np.float32) / 65535 * 255).round().astype(np.uint8))
    put("16-bit.png", Image.fromarray(deep), grey)
    frames = [noise(seed, mode="L") for seed in (9, 10, 11)]
    put("animated.gif", frames[0], save_all=True, append_images=frames[1:])
    made["animated.gif"] = Image.open(folder / "animated.gif").convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned a quarter clockwise
    put("turned.png", noise(12), noise(12).transpose(Image.Transpose.ROTATE_270), exif=turned)
    put("日本語 ünï.png", noise(13))
    return made


def broken(folder: Path):
    """Files that are no readable pictures: {name: a word of the reason}."""
    folder.mkdir(parents=True, exist_ok=True)
    noise(1, (64, 64)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    noise(2, (64, 64)).save(folder / "corrupt.png")
    data = bytearray((folder / "corrupt.png").read_bytes())
    data[60:4000] = bytes(3940)
    (folder / "corrupt.png").write_bytes(data)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    bomb(folder / "bomb.png")
    return {
        "truncated.jpg": "truncated",
        "corrupt.png": "",
        "empty.png": "empty",
        "text.jpg": "not a picture",
        "gone.png": "no such file",
        "pipe.png": "ordinary file",
        "script.png": "not a picture",
        "bomb.png": "decompression bomb",
    }


def bomb(path: Path):
    """A tiny PNG whose header promises 40,000 x 40,000 pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b""))
