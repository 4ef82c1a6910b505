"""Collects what the tests of faults have seen into a table at the end of pytest's output."""

import re
from collections.abc import Callable

import pytest

from rdm_jax.render.tables import markdown
from tests.support.commands import STAGE, run
from tests.support.configs import write_images


@pytest.fixture
def fault(request) -> Callable[[int, int, str], None]:
    """`fault(number, trials, what)` records the number of trials of a fault, by its number in
    README.md, and what held in all of them."""

    def held(number: int, trials: int, what: str) -> None:
        request.node.user_properties.append(("fault", (number, trials, what)))

    return held


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder of images for the tests of all faults."""
    folder = tmp_path_factory.mktemp("source") / "images"
    write_images(folder)
    return folder


@pytest.fixture(scope="session")
def finished(image_folder, tmp_path_factory):
    """An uninterrupted training of stage 1, with the checkpoints of steps 10, 15 and 20."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run(image_folder, workdir, *STAGE)
    return workdir


def pytest_terminal_summary(terminalreporter):
    """Prints the table, with failed and skipped tests marked as such."""
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            number = re.search(r"faults/.*::test_([0-9]+)_", report.nodeid)
            found = [
                value for name, value in getattr(report, "user_properties", []) if name == "fault"
            ]
            if number and outcome != "passed":
                rows.append(
                    [int(number[1]), 0, f"{outcome.upper()}: {report.nodeid.rpartition('::')[2]}"]
                )
            elif outcome == "passed" and report.when == "call":
                rows += [[int(n), int(trials), what] for n, trials, what in found]
    if rows:
        terminalreporter.section("faults")
        cells = [[str(cell) for cell in row] for row in sorted(rows)]
        terminalreporter.line(markdown(["fault", "trials", "what held"], cells))
