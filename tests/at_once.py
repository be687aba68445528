"""64 threads that begin at once and are interrupted often, for what only one of them may do."""

import sys
import threading

THREADS = 64


def at_once(work):
    """Run `work(number of the thread)` on all of them; back when all are done."""
    barrier = threading.Barrier(THREADS)

    def begin(number):
        barrier.wait()
        work(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=begin, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
