"""A checkpoint read in a process of its own: whatever is in it, the caller's process stays whole.

In: the path of a .pth or .bin, and where to write. Out: a safetensors file with the same tensors
under the same names, and the hash of what was read.

The barriers of `pickles` all apply; this adds one around them. The child has limits on memory,
processor time, file size and open files, and an environment without tokens. It writes only
tensors; the parent reads them back through the strict safetensors reader. Where the child fails
or dies there is an error and no second way to read the file.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

from natcupy.hub import errors
from natcupy.hub.errors import HubError, UnsafePickle
from natcupy.hub.files import sha256_file
from natcupy.hub.pickles import read_pickle
from natcupy.hub.tensors import write_tensors

TIME_LIMIT_S = 600
SPARE_BYTES = 1 << 30  # on top of what the file itself needs
_OF_LIMITS = (None, errno.EFBIG, errno.EMFILE, errno.ENOMEM, errno.EAGAIN)  # the child's own
_KEPT = (
    *("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "LANG", "HOME"),
    *("APPDATA", "USERPROFILE"),  # where Windows keeps packages of a user's own
)


def convert_pickle(source: Path | str, target: Path | str, time_limit: int = TIME_LIMIT_S) -> str:
    """Read a checkpoint in a child process and write its tensors as safetensors.

    Returns:
        SHA-256 of the checkpoint.

    Raises:
        UnsafePickle, Corrupt, Truncated, LfsPointer, HtmlPage, NotFound: as `read_pickle`.
        UnsafePickle: the child ran out of its limits, or died.
        OSError: the source cannot be read or the target not written.
    """
    import natcupy

    root = str(Path(natcupy.__file__).parent.parent)
    environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
    places = os.pathsep.join([root, *(place for place in sys.path if place)])
    environment |= {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "natcupy.hub.sandbox", str(source), str(target)]
    try:
        done = subprocess.run(
            [*command, str(time_limit)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=time_limit + 60,
        )
    except subprocess.TimeoutExpired:
        raise UnsafePickle(
            f"{source} was not read within {time_limit} s and the attempt was ended. It is no "
            "ordinary checkpoint."
        ) from None
    return _understood(done, source)


def _understood(done: subprocess.CompletedProcess[str], source: Path | str) -> str:
    """The child's answer: a hash, or the error it found."""
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = {}
    if done.returncode == 0 and isinstance(answer.get("sha256"), str):
        return answer["sha256"]
    number = answer.get("number")
    if isinstance(number, int) and number in errno.errorcode:
        raise OSError(number, os.strerror(number), str(answer.get("file")))
    kind = getattr(errors, str(answer.get("error")), None)
    if isinstance(kind, type) and issubclass(kind, HubError):
        raise kind(str(answer.get("text")))
    raise UnsafePickle(
        f"{source} could not be read within its limits of memory and time (the reading process "
        f"ended with status {done.returncode}). It was not loaded, and is not read in another way."
    )


# ---------------------------------------------------------------- the child


def _limit(size: int, seconds: int) -> None:
    """Bounds for this process, above what it has already taken; where the system has them."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _lower(resource.RLIMIT_CPU, seconds)
    _lower(resource.RLIMIT_FSIZE, 2 * size + (16 << 20))
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, 64)
    pages = Path("/proc/self/statm")
    if pages.is_file():
        now = int(pages.read_text().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, now + 4 * size + SPARE_BYTES)


def _lower(which: int, value: int) -> None:
    import resource

    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def main(source: str, target: str, seconds: str) -> int:
    """What the child does: read, write, say the hash."""
    try:
        path = Path(source)
        write_tensors({}, target)  # everything is imported before the limits are set
        _limit(path.stat().st_size if path.is_file() else 0, int(seconds))
        read = read_pickle(path)
        write_tensors(read.tensors, target)
        if sha256_file(path) != read.sha256:
            raise errors.Corrupt(f"{source} changed while it was read. Try again.")
        print(json.dumps({"sha256": read.sha256}))
    except (HubError, MemoryError, OSError, RuntimeError) as error:
        Path(target).unlink(missing_ok=True)
        told = {"error": type(error).__name__, "text": str(error)}
        if isinstance(error, OSError) and error.errno not in _OF_LIMITS:
            told |= {"number": error.errno, "file": error.filename or source}
        print(json.dumps(told))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
