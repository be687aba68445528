"""Kernels with a planted mistake: `spoil` writes their sources, `Spoilt` runs what they make.

In: a folder, and a place in a source with what stands there instead. Out: the folder filled with
the kernels' sources; a launcher that compiles from it the kernels that differ from the library's.
"""

from importlib import resources

from ptxsim import load
from ptxsim.launcher import PtxLauncher, compile_with_natcupy

from natcupy.cuda.source import source_text, use_sources


def spoil(folder, file="", right="", wrong=""):
    """The kernels' sources in `folder`, with one place of `file` changed (none without `file`)."""
    for found in resources.files("natcupy.kernels").iterdir():
        if found.name.endswith((".cu", ".cuh")):
            text = found.read_text()
            if found.name == file:
                assert text.count(right) == 1, "the text to spoil has changed"
                text = text.replace(right, wrong)
            (folder / found.name).write_text(text)


class Spoilt(PtxLauncher):
    """Compiles kernels from a folder, where they differ from the library's own."""

    def __init__(self, folder):
        super().__init__("80")
        self._folder, self._spoilt = folder, {}

    def program(self, spec):
        if spec not in self._spoilt:
            own = source_text(spec)
            with use_sources(self._folder):
                changed = source_text(spec) != own
                program = load(compile_with_natcupy(spec, "80"), spec.entry) if changed else None
            self._spoilt[spec] = program or super().program(spec)
        return self._spoilt[spec]
