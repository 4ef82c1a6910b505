"""Records the CPU seconds of every test: pytest --cpu-seconds=FILE.json.

Counted are the user and system time of the processes that run the tests and of all commands that
they started and waited for. Wall time says little on a shared machine; CPU time does.
"""

import collections
import json
import os
from pathlib import Path

import pytest

from rdm_jax.render.tables import markdown

STARTING = "start and collection"  # of every process of pytest, in the table


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def recorded(file: Path) -> dict[str, float]:
    """CPU seconds by test, of a file that a `Recorder` wrote; nothing if there is none."""
    return json.loads(file.read_text()) if file.is_file() else {}


class Recorder:
    """Adds up what every phase of every test took, in the process that runs it and over all."""

    def __init__(self, config: pytest.Config, file: Path):
        self._config, self._file = config, file
        self._before = 0.0
        self._seconds: dict[str, float] = collections.Counter()
        self._tests: dict[str, float] = collections.Counter()

    def _since(self) -> float:
        before, self._before = self._before, cpu_seconds()
        return self._before - before

    def pytest_collection_finish(self):
        """Everything up to here is the price of a process."""
        self._add_start(self._since())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        """Reports travel from pytest-xdist's workers with their attributes."""
        report = yield
        report.cpu_seconds = self._since()
        return report

    def pytest_runtest_logreport(self, report):
        """Adds a phase of a test to its file."""
        self._seconds[report.nodeid.partition("::")[0]] += report.cpu_seconds
        # Parameters that are paths are those of the checkout.
        name = report.nodeid.replace(f"{self._config.rootpath}/", "")
        self._tests[name] += report.cpu_seconds

    def _add_start(self, seconds: float):
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput["cpu_seconds"] = seconds
        else:
            self._seconds[STARTING] += seconds

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """A worker of pytest-xdist has ended."""
        self._seconds[STARTING] += getattr(node, "workeroutput", {}).get("cpu_seconds", 0.0)

    def pytest_sessionfinish(self):
        """Writes the record, the most expensive first; tests of other tiers stay in it."""
        if hasattr(self._config, "workeroutput"):
            return
        tests = {**recorded(self._file), **self._tests}
        ordered = sorted(tests.items(), key=lambda item: -item[1])
        record = {name: round(seconds, 1) for name, seconds in ordered if seconds >= 0.05}
        self._file.write_text(json.dumps(record, indent=1) + "\n")

    def pytest_terminal_summary(self, terminalreporter):
        """The same as a table for tests/README.md."""
        rows = sorted(self._seconds.items(), key=lambda row: -row[1])
        rows = [("all", sum(self._seconds.values())), *rows]
        terminalreporter.section("CPU seconds")
        cells = [[name, f"{seconds:.0f}"] for name, seconds in rows if seconds >= 0.5]
        terminalreporter.line(markdown(["tests", "CPU s"], cells))


def pytest_addoption(parser):
    """The option that switches it on."""
    parser.addoption(
        "--cpu-seconds", metavar="FILE", type=Path, help="Record CPU seconds by test as JSON."
    )


def pytest_configure(config):
    """In pytest's own process and in every worker."""
    if file := config.getoption("--cpu-seconds"):
        config.pluginmanager.register(Recorder(config, file), "cpu-seconds-recorder")
