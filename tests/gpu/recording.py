"""A pytest plugin (`-p recording --gpu-record FILE`): a line of JSON for every test that ran.

A line has the test's id, its outcome and seconds, why it failed, the kernels it launched and what
it noted. Lines are written as tests end, so that a run that is cut short has a record too.
"""

import json


def pytest_addoption(parser):
    parser.addoption("--gpu-record", help="file that gets a line of JSON for every test")


def pytest_configure(config):
    path = config.getoption("--gpu-record")
    if path:
        config.pluginmanager.register(Recorder(path, config))


class Recorder:
    """Hears every launch and every report."""

    def __init__(self, path, config):
        from natcupy.cuda.launch import CuPyLauncher

        self.path, self.kernels = path, set()
        launch = CuPyLauncher.launch

        def heard(launcher, recipe, device):
            self.kernels.add(recipe.spec.entry)
            launch(launcher, recipe, device)

        CuPyLauncher.launch = heard
        config.add_cleanup(lambda: setattr(CuPyLauncher, "launch", launch))

    def pytest_runtest_logstart(self):
        self.kernels.clear()

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "why": _why(report),
            "kernels": sorted(self.kernels),
            "notes": dict(report.user_properties),
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _why(report):
    if report.outcome == "skipped":
        return str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else "skipped"
    return str(report.longrepr)[-2000:] if report.failed else None
