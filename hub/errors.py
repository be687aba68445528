"""The errors of loading and saving: one family, one class for each thing a user can do about it.

In: nothing. Out: `HubError` and its children. Each also derives from the usual Python type, so that
code which knows nothing of natcupy still catches what it expects. Every text says the rule that
broke, the values that broke it and the remedy; none ever holds a token.
"""

# ruff: noqa: N818  (the names say what happened; HubError is the one to catch)
from __future__ import annotations

from collections.abc import Iterable

from natcupy.zoo.config import ConfigError

__all__ = [
    "BadToken",
    "CheckpointError",
    "ConfigError",
    "Conflict",
    "Corrupt",
    "Forbidden",
    "Gated",
    "HtmlPage",
    "HubError",
    "LfsPointer",
    "NotFound",
    "Offline",
    "RevisionNotFound",
    "Truncated",
    "Unavailable",
    "UnsafePickle",
]


class HubError(Exception):
    """Anything that keeps weights from being found, fetched, read or written."""


class NotFound(HubError, FileNotFoundError):
    """No such model name, folder, file, repository or revision."""


class RevisionNotFound(NotFound):
    """The repository exists, the branch, tag or commit does not."""


class Gated(HubError, PermissionError):
    """The repository exists, but this account may not read it (yet)."""


class BadToken(HubError, PermissionError):
    """The Hub did not accept the token that was sent, or there is none to send."""


class Forbidden(HubError, PermissionError):
    """This account may not write there."""


class Conflict(HubError, RuntimeError):
    """The remote is not what a push expects: it changed meanwhile, or contradicts the call."""


class Offline(HubError, ConnectionError):
    """The Hub cannot be reached and the files are not in the cache."""


class Unavailable(HubError, ConnectionError):
    """The Hub was reached but could not serve the request now (5xx, 429, cut transfers).

    Attributes:
        retry_after: seconds the Hub asked to wait, where it did.
    """

    retry_after: float | None = None


class Corrupt(HubError, ValueError):
    """The file is not what its name, its header or its recorded hash says."""


class Truncated(Corrupt):
    """The file ends before its content does."""


class LfsPointer(Corrupt):
    """A Git-LFS pointer stands where the weights should be."""


class HtmlPage(Corrupt):
    """A web page (often a login or error page) was saved in place of the file."""


class UnsafePickle(HubError, ValueError):
    """A pickle that asks for more than plain tensors, or cannot be read safely here."""


class CheckpointError(HubError, ValueError):
    """The tensors in the file are not the tensors of the model.

    Attributes:
        missing, unexpected: tensor names.
        misshapen: (name, shape in the file, shape in the model).
    """

    def __init__(
        self,
        message: str,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
    ):
        super().__init__(message)
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        self.misshapen = tuple(misshapen)


def some(names: Iterable[object], limit: int = 10) -> str:
    """The first names of a list as text, the rest as a number."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
