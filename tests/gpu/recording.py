"""A pytest plugin (`-p recording --gpu-record FILE`): a line of JSON for every test that ran.

A line has the test's id, its outcome and seconds, why it failed, the kernels it launched and what
it noted. Lines are written as tests end, so that a run that is cut short has a record too.
"""

import json

import pytest


def pytest_addoption(parser):
    parser.addoption("--gpu-record", help="file that gets a line of JSON for every test")


def pytest_configure(config):
    path = config.getoption("--gpu-record")
    if path:
        config.pluginmanager.register(Ear(config))
        if not hasattr(config, "workerinput"):  # with pytest-xdist the controller writes
            config.pluginmanager.register(Writer(path))


class Ear:
    """Hears every launch and tells the test's report of it."""

    def __init__(self, config):
        from natcupy.cuda.launch import CuPyLauncher

        self.kernels = set()
        launch = CuPyLauncher.launch

        def heard(launcher, recipe, device):
            self.kernels.add(recipe.spec.entry)
            launch(launcher, recipe, device)

        CuPyLauncher.launch = heard
        config.add_cleanup(lambda: setattr(CuPyLauncher, "launch", launch))

    def pytest_runtest_logstart(self):
        self.kernels.clear()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        if call.when == "call":
            item.user_properties.append(("kernels", sorted(self.kernels)))


class Writer:
    """Writes the lines."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        notes = dict(report.user_properties)
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "why": _why(report),
            "kernels": notes.pop("kernels", []),
            "notes": notes,
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _why(report):
    if report.outcome == "skipped":
        return str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else "skipped"
    return str(report.longrepr)[-2000:] if report.failed else None
