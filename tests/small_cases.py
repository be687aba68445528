"""How the rooms of small-window tests write their cases, and plan them anew.

In: sizes. Out: a `kernel_cases.Case` that the small-window kernels take.
"""

from kernel_cases import BF16, Case

from natcupy.cuda import plan, small_tiles


def case(name, shape, kernel_size, why, dim=32, **more):
    more = {"heads": 1, "dtype": BF16, "rpb": True} | more
    more = {"kv_heads": more["heads"]} | more
    return Case(name, shape, kernel_size, why, head_dim=dim, value_dim=dim, **more)


def forget_plans():
    """Plan again what has been planned, as for another GPU."""
    plan.forget()
    for planned in vars(small_tiles).values():
        getattr(planned, "cache_clear", bool)()
