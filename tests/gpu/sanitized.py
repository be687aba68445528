"""Runs the tables of kernel cases once, for compute-sanitizer: `python sanitized.py RIG [PART OF]`.

Every case of tests/kernel_cases.py and of the tests' other tables, forward and backward, in every
family of kernels that can; with PART and OF, each OF-th of them. It judges no numbers (the tests
do), so that a sanitizer, which slows everything, spends its time on the kernels. Prints a line for
every run, and at the end one of JSON: how many cases, runs and failures.
"""

import importlib
import json
import sys
from itertools import chain
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parent.parent)]


def tables():
    """The cases of every table by name: `CASES` of `kernel_cases` and of the families' tests."""
    tests = chain.from_iterable(map(FOLDER.parent.glob, ("test_small*.py", "test_mma*.py")))
    rooms = ["kernel_cases", *sorted(path.stem for path in tests)]
    for room in rooms:
        for case in getattr(importlib.import_module(room), "CASES", ()):
            yield f"{room}: {case}", case


def main(name, part="0", of="1"):
    from kernel_cases import cotangents, inputs
    from problems import families, run
    from rigs import Rig

    from natcupy.cuda import plan

    rig, ran, failed = Rig(name), [], {}
    chosen = list(tables())[int(part) :: int(of)]
    with rig.active():
        for label, case in chosen:
            tensors, cotangent = inputs(case, rig.device), cotangents(case, rig.device)
            for family in families(case):
                try:
                    with plan.use_family(family):
                        run(case, tensors, *cotangent)
                    rig.cuda.synchronize()
                    ran.append(f"{label} ({family})")
                    print("ran", ran[-1], flush=True)
                except ValueError as error:
                    if "cannot run this call" not in str(error):
                        raise
                except RuntimeError as error:
                    failed[f"{label} ({family})"] = str(error)[:500]
    print(json.dumps({"cases": len(chosen), "runs": len(ran), "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
