"""Records for people: Markdown tables, and a plot where matplotlib is installed.

In: a record. Out: text, or a picture.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.roofline import YARDSTICK

DASH = "-"
ROUNDS = ", the median over rounds of one call each."
FULL_CACHES = " Each call follows one of its own, so caches are as full as they get."
BESIDE = " The peak is that of the matrix product (1024 x 1024) timed in the same rounds."


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; every column but the first to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return DASH if value is None else str(value).replace("|", "\\|")


def where(record: dict[str, Any]) -> str:
    """One line on device, versions and date."""
    env = record["environment"]
    parts = [env["device"]]
    if env.get("driver"):
        parts.append(f"driver {env['driver']}")
    if env["device_type"] == "cpu":
        instructions = env.get("instructions")
        if env.get("instructions_asked"):
            instructions += " (asked for by ATEN_CPU_CAPABILITY)"
        parts += filter(None, (instructions, f"{env['threads']} threads"))
    parts += [f"{name} {version}" for name, version in env["versions"].items()]
    return f"{', '.join(parts)}; {record['date']}."


def speed(record: dict[str, Any]) -> str:
    """The tables of `benchmarks.op` and `benchmarks.model`, one per case and pass."""
    roof = record["roofline"]
    lines = [
        where(record),
        "",
        f"Milliseconds of {record.get('clock', 'wall time')}. Measured ceilings in "
        f"{roof['dtype']}: copy {roof['bandwidth'] / 1e9:,.0f} GB/s, "
        f'matrix product {roof["peak"] / 1e12:,.2f} TFLOP/s. "Of peak" and "of copy" are the '
        "shares of these that useful operations and fewest possible bytes reach. Peak MB counts "
        "what torch allocates for a call, results included. Ways marked * compute something else "
        "of similar cost. Times: a way's time in times that of natcupy's backend for the device"
        + (ROUNDS if record["environment"]["device_type"] == "cpu" else ".")
        + (FULL_CACHES if record.get("caches") == "full" else "")
        + (BESIDE if any(row["way"] == YARDSTICK for row in record["rows"]) else ""),
    ]
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        for step in dict.fromkeys(row["pass"] for row in record["rows"]):
            rows = [r for r in record["rows"] if (r["case"], r["pass"]) == (case, step)]
            if rows:
                lines += [
                    "",
                    f"**{case}** — {step}, {rows[0]['dtype']}",
                    "",
                    _speed_table(rows, roof),
                ]
    return "\n".join(lines) + "\n"


def _speed_table(rows: Sequence[dict[str, Any]], roof: dict[str, Any]) -> str:
    headings = (
        "way",
        "ms",
        "times",
        "host ms",
        "GB/s",
        "TFLOP/s",
        "of copy",
        "of peak",
        "peak MB",
        "error",
    )
    ran = sorted((r for r in rows if r["ms"] is not None), key=lambda r: r["ms"])
    peak = next((r["tflop_s"] for r in ran if r["way"] == YARDSTICK), roof["peak"] / 1e12)
    not_run = [r for r in rows if r["ms"] is None]
    cells = [
        (
            r["way"] + ("" if r["exact"] else " *"),
            f"{r['ms']:.3f}",
            _number(r.get("ratio"), ".2f"),
            f"{r['host_ms']:.3f}",
            _number(r["gb_s"], ".1f"),
            _number(r["tflop_s"], ".3f"),
            _number(r["gb_s"], ".0%", roof["bandwidth"] / 1e9),
            _number(r["tflop_s"], ".0%", peak),
            _number(r["peak_bytes"], ".1f", 1e6),
            _number(r["error"], ".1e"),
        )
        for r in ran
    ]
    text = table(headings, cells)
    if not_run:
        text += "\n\nNot run: " + "; ".join(f"{r['way']} ({r['why_not']})" for r in not_run) + "."
    return text


def _number(value: float | None, form: str, unit: float = 1.0) -> str | None:
    return None if value is None else f"{value / unit:{form}}"


def plot(record: dict[str, Any], path: Path) -> bool:
    """Bars of milliseconds per case and way, on a logarithmic axis; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    ran = [r for r in record["rows"] if r["ms"] is not None and r["way"] != YARDSTICK]
    passes = list(dict.fromkeys(row["pass"] for row in ran))
    ways = list(dict.fromkeys(row["way"] for row in ran))
    cases = list(dict.fromkeys(row["case"] for row in ran))
    figure = Figure(figsize=(8, 1.5 + 0.18 * len(cases) * len(ways) * len(passes)))
    axes = figure.subplots(len(passes), 1, squeeze=False)[:, 0]
    height = 0.8 / max(1, len(ways))
    for ax, step in zip(axes, passes, strict=True):
        for number, way in enumerate(ways):
            mine = {r["case"]: r["ms"] for r in ran if (r["way"], r["pass"]) == (way, step)}
            places = [i + number * height for i, case in enumerate(cases) if case in mine]
            ax.barh(places, [mine[case] for case in cases if case in mine], height, label=way)
        ax.set_yticks([i + 0.4 - height / 2 for i in range(len(cases))], cases, fontsize=7)
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlabel("milliseconds")
        ax.set_title(f"{step}, {record['environment']['device']}", fontsize=9)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
