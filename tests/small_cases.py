"""What the rooms of small-window tests share: cases, and sources with a planted mistake.

In: sizes, or a folder and a place in a source. Out: a `Case` that the small-window kernels take, or
the folder filled with the kernels' sources.
"""

from importlib import resources

from kernel_cases import BF16, Case


def case(name, shape, kernel_size, why, dim=32, **more):
    more = {"heads": 1, "dtype": BF16, "rpb": True} | more
    more = {"kv_heads": more["heads"]} | more
    return Case(name, shape, kernel_size, why, head_dim=dim, value_dim=dim, **more)


def spoil(folder, file, right, wrong):
    """The kernels' sources in `folder`, with one place changed."""
    for found in resources.files("natcupy.kernels").iterdir():
        if found.name.endswith((".cu", ".cuh")):
            text = found.read_text()
            if found.name == file:
                assert text.count(right) == 1, "the text to spoil has changed"
                text = text.replace(right, wrong)
            (folder / found.name).write_text(text)
