"""The README's table of models, from the library's own: `python tests/readme_table.py`."""

from natcupy.hub.weights import WEIGHTS
from natcupy.zoo import MODELS, model_config
from natcupy.zoo.config import num_parameters
from natcupy.zoo.flops import count_macs
from natcupy.zoo.published import PUBLISHED


def table():
    rows = ["| model | parameters | MACs | pixels | top-1 | weights |", "|---|---|---|---|---|---|"]
    where = {row.arch: "hub" if row.repo else "file" for row in WEIGHTS.values()}
    for name in MODELS:
        config, paper = model_config(name), PUBLISHED[name]
        macs = count_macs(config, paper.img_size, paper.img_size).papers / 1e9
        top1 = f"{paper.top1} %" if paper.top1 else ""
        rows.append(
            f"| `{name.replace('_', '-')}` | {num_parameters(config) / 1e6:.1f} M | {macs:.1f} G "
            f"| {paper.img_size} | {top1} | {where.get(name, '')} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
