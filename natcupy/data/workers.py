"""Workers: how many, and that they leave with their parent.

In: nothing. Out: `usable_cores`, `usual_workers`, and `leave_with_parent`, what a worker of a
`DataLoader` does first.

Torch's workers look from time to time whether they still have the parent that they had at their
first look. One whose parent was killed before that would wait for work for ever.
"""

from __future__ import annotations

import multiprocessing
import os

MOST_WORKERS = 8


def usable_cores() -> int:
    """Processors that this process may use, not those that there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def usual_workers(processes: int) -> int:
    """How many workers to start, beside `processes` like this one on the machine."""
    return max(min(usable_cores() // processes, MOST_WORKERS), 1)


def leave_with_parent(number: int) -> None:
    """End worker `number` if the process that started it is gone: a `worker_init_fn`."""
    del number
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
