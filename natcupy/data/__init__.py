"""Labelled pictures for training, examination and prediction.

In: a folder of pictures or a Hugging Face dataset. Out: a `Split` of `Source`s, which know every
picture's label and open it when asked, and `Pictures`, a torch `Dataset` over one. `files` lists
and opens, `folders`, `metadata` and `hf` make sources, `find` decides which.
"""

from natcupy.data.files import list_pictures, named_files, why
from natcupy.data.find import Data, Part, Split, find, find_pictures, find_split
from natcupy.data.pictures import Pictures
from natcupy.data.source import DataError, PictureSet, Source, Subset

__all__ = [
    "Data",
    "DataError",
    "Part",
    "PictureSet",
    "Pictures",
    "Source",
    "Split",
    "Subset",
    "find",
    "find_pictures",
    "find_split",
    "list_pictures",
    "named_files",
    "why",
]
