"""How the rooms of small-window tests write their cases.

In: sizes. Out: a `kernel_cases.Case` that the small-window kernels take.
"""

from kernel_cases import BF16, Case


def case(name, shape, kernel_size, why, dim=32, **more):
    more = {"heads": 1, "dtype": BF16, "rpb": True} | more
    more = {"kv_heads": more["heads"]} | more
    return Case(name, shape, kernel_size, why, head_dim=dim, value_dim=dim, **more)
