"""Workers that leave with their parent.

In: nothing. Out: `leave_with_parent`, what a worker of a `DataLoader` does first.

Torch's workers look from time to time whether they still have the parent that they had at their
first look. One whose parent was killed before that would wait for work for ever.
"""

from __future__ import annotations

import multiprocessing
import os


def leave_with_parent(number: int) -> None:
    """End worker `number` if the process that started it is gone: a `worker_init_fn`."""
    del number
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
