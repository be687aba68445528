"""Pretrained weights: found by name, fetched, checked, loaded, saved and converted.

In: names, folders, files. Out: models (`from_pretrained`), folders (`save_pretrained`), state dicts
in other layouts (`convert`). The rooms: `weights` is the table of released checkpoints, `locate`
finds files, `download` speaks to the Hub, `tensors` and `pickles` read files, `config` and `schema`
read config.json, `architecture` and `pretrained` put a model together, `files` writes.
"""

from natcupy.hub import convert
from natcupy.hub.errors import (
    BadToken,
    CheckpointError,
    ConfigError,
    Corrupt,
    Gated,
    HtmlPage,
    HubError,
    LfsPointer,
    NotFound,
    Offline,
    Truncated,
    Unavailable,
    UnsafePickle,
)
from natcupy.hub.pretrained import Source, from_pretrained, save_pretrained
from natcupy.hub.weights import WEIGHTS, Row, embedded_names

__all__ = [
    "WEIGHTS",
    "BadToken",
    "CheckpointError",
    "ConfigError",
    "Corrupt",
    "Gated",
    "HtmlPage",
    "HubError",
    "LfsPointer",
    "NotFound",
    "Offline",
    "Row",
    "Source",
    "Truncated",
    "Unavailable",
    "UnsafePickle",
    "convert",
    "embedded_names",
    "from_pretrained",
    "save_pretrained",
]
