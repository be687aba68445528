"""How this process leaves the others that it worked with.

In: nothing. Out: a handler that ends `torch.distributed`'s default group before Python ends.
"""

from __future__ import annotations

import atexit
import time

import torch.distributed as dist

LETTING_GO = 0.2  # seconds; gloo's threads need microseconds, on a crowded machine more


def leave_at_exit() -> None:
    """Have the group of processes destroyed at exit; call it after joining, once or more often.

    A thread of gloo that lets go of a tensor while Python ends aborts the process (torch issue
    190489): the group is destroyed while Python still runs, and the threads that outlive it (a
    `DistributedDataParallel` keeps them) are given a moment to drop the last work.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if not dist.is_initialized():
        return
    gloo = "gloo" in dist.get_backend()
    dist.destroy_process_group()
    if gloo:
        time.sleep(LETTING_GO)
