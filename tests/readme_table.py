"""The README's table of models, as `natcupy models` prints it: `python tests/readme_table.py`."""

from natcupy.cli.models import matching, tables


def table():
    headings, rows = next(tables(matching("*")))
    lines = [headings, ["---"] * len(headings), *((f"`{name}`", *more) for name, *more in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    print(table())
