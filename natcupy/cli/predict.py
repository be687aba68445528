"""`natcupy predict`: any number of pictures in, a table of answers on disk out.

Exit status 1 if any picture could not be read; the others are in the table all the same. Under
torchrun, the first process prints, and all exit alike.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from natcupy import inference
from natcupy.cli import console, runtime
from natcupy.inference import Report


def run(arguments: argparse.Namespace) -> int:
    """Answer, keep, put together."""
    device = runtime.pick_device(arguments.device)
    model = runtime.load_for(runtime.USUAL, arguments.model, device, arguments.dtype)
    report = inference.predict(
        model,
        arguments.data,
        arguments.out,
        split=arguments.split,
        topk=arguments.topk,
        features=arguments.features,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        shard=arguments.shard,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        part_pictures=arguments.part_pictures,
        progress=not arguments.quiet,
    )
    runtime.print_once(lambda: _show(report, arguments.json), device)
    return 1 if report.bad else 0


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        console.print_json({**asdict(report), "out": str(report.out)})
    else:
        print(_text(report))
    console.list_bad(report.bad)


def _text(report: Report) -> str:
    speed = ""
    if report.pictures:
        rate = report.pictures / report.seconds
        read = console.counted(report.pictures, "picture")
        speed = f", {read} in {report.seconds:.1f} s ({rate:,.1f}/s)"
    if not report.complete:
        return (
            f"This share is done{speed}. {report.parts_done:,} of {report.parts:,} parts are "
            f"there; the process that ends last writes {report.out}."
        )
    bad = f" {console.counted(len(report.bad), 'picture')} could not be read." if report.bad else ""
    done = f"{report.out} is complete{speed or ', nothing was left to do'}."
    return done + bad
