"""Pretrained weights: found by name, fetched, checked, loaded, saved and converted.

In: names, folders, files. Out: models (`from_pretrained`), folders (`save_pretrained`),
repositories (`push_to_hub`), state dicts in other layouts (`convert`). The rooms: `weights` is the
table of released checkpoints, `locate` finds files, `client` speaks to the Hub, `download`,
`attempt`, `push` and `rehearsal` say what; `tensors`, `shards` and `pickles` read files, `config`
and `schema` read config.json, `architecture` and `pretrained` put a model together, `facts` and
`card` describe it, `saving` and `files` write it.

The switches are the client's own: HF_HUB_OFFLINE=1 asks nobody, HF_HUB_DISABLE_PROGRESS_BARS=1
shows no bars, HF_HOME moves the cache, HF_TOKEN (or 'hf auth login') is the login.
"""

from natcupy.hub import convert
from natcupy.hub.errors import (
    BadToken,
    CheckpointError,
    ConfigError,
    Conflict,
    Corrupt,
    Forbidden,
    Gated,
    HtmlPage,
    HubError,
    LfsPointer,
    NotFound,
    Offline,
    RevisionNotFound,
    Truncated,
    Unavailable,
    UnsafePickle,
)
from natcupy.hub.facts import Metric
from natcupy.hub.pretrained import Source, from_pretrained
from natcupy.hub.push import Pushed, push_to_hub
from natcupy.hub.rehearsal import Planned, plan_push
from natcupy.hub.saving import save_pretrained
from natcupy.hub.weights import WEIGHTS, Row, embedded_names

__all__ = [
    "WEIGHTS",
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
    "Metric",
    "NotFound",
    "Offline",
    "Planned",
    "Pushed",
    "RevisionNotFound",
    "Row",
    "Source",
    "Truncated",
    "Unavailable",
    "UnsafePickle",
    "convert",
    "embedded_names",
    "from_pretrained",
    "plan_push",
    "push_to_hub",
    "save_pretrained",
]
