"""Xet on the local Hub: hf_xet's own folder store instead of a storage service.

In: a folder. Out: what the Hub says of it, its address (`local://`, which hf_xet's client takes for
a service), tokens, and which Xet file a SHA-256 is. The genuine client chunks, writes and reads; no
storage protocol is spoken here. Undocumented: hf_xet uses that store in its own tests.
"""

import struct
import tempfile
import time
from pathlib import Path

RECORD = 48  # bytes; a shard's file section is made of such records, after one of header


class XetStore:
    def __init__(self, folder: Path):
        self.folder, self.url = folder, f"local://{folder}"

    def token(self) -> tuple[dict, dict[str, str]]:
        """Body and headers of a token's answer: one client reads the one, one the other."""
        expires = int(time.time()) + 3600
        body = {"casUrl": self.url, "accessToken": "xet-token", "exp": expires}
        return body, {"X-Xet-Cas-Url": self.url, "X-Xet-Access-Token": "xet-token",
                      "X-Xet-Token-Expiration": str(expires)}  # fmt: skip

    def find(self, sha256: str) -> tuple[str, int] | None:
        """Xet hash and size of a file."""
        for shard in self.folder.rglob("*.mdb"):
            found = _files(shard.read_bytes()).get(sha256)
            if found:
                return found
        return None

    def read(self, sha256: str) -> bytes | None:
        found = self.find(sha256)
        if found is None:
            return None
        from hf_xet import XetFileInfo, XetSession

        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "file"
            with XetSession().new_file_download_group(endpoint=self.url) as group:
                group.start_download_file(XetFileInfo(*found), str(path))
            return path.read_bytes()


def _files(shard: bytes) -> dict[str, tuple[str, int]]:
    """`{sha256: (Xet hash, size)}` of a shard's file section.

    A file has a header (hash, flags, number of segments), its segments, where bit 31 is set as many
    records to verify them, and where bit 30 is set one that begins with the SHA-256.
    """
    found, at = {}, RECORD
    while at + RECORD <= len(shard) and shard[at : at + 32] != b"\xff" * 32:
        name = _text(shard[at : at + 32])
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += RECORD
        sizes = [struct.unpack_from("<I", shard, at + n * RECORD + 36)[0] for n in range(count)]
        at += RECORD * count * (2 if flags >> 31 else 1)
        if flags >> 30 & 1:
            found[_text(shard[at : at + 32])] = name, sum(sizes)
            at += RECORD
    return found


def _text(raw: bytes) -> str:
    """A 32-byte hash as Xet prints it: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
