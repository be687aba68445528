"""Models over many pictures: how right they are (`evaluate`), and what they say (`predict`).

In: a model and data. Out: a `Result`, or a table on disk. `feed` prepares pictures ahead, `ranks`
knows the other processes, `classes` matches the data's classes with the model's, `parts` keeps what
is done, `tables` writes it.
"""

from natcupy.inference.evaluation import Result, evaluate
from natcupy.inference.prediction import Report, predict

__all__ = ["Report", "Result", "evaluate", "predict"]
