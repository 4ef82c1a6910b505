"""What a fault's test has seen, as the campaign's table at the end of pytest's output."""

from collections.abc import Callable

import pytest

from rdm_jax.evaluation.tables import markdown
from tests.faults.commands import STAGE, run


@pytest.fixture
def fault(request) -> Callable[[int, int, str], None]:
    """`fault(number, trials, what)`: so many trials of a fault, by its number in README.md, and what held in all of them."""

    def held(number: int, trials: int, what: str) -> None:
        request.node.user_properties.append(("fault", (number, trials, what)))

    return held


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """An undisturbed training of stage 1, with the checkpoints of steps 10, 15 and 20."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    run(images, workdir, *STAGE)
    return workdir


def pytest_terminal_summary(terminalreporter):
    """The table; a fault whose test has failed is not in it as held."""
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            found = [value for name, value in getattr(report, "user_properties", []) if name == "fault"]
            rows += [[int(n), int(trials), what if outcome == "passed" else f"FAILED: {what}"] for n, trials, what in found]
    if rows:
        terminalreporter.section("faults")
        cells = [[str(cell) for cell in row] for row in sorted(rows)]
        terminalreporter.line(markdown(["fault", "trials", "what held"], cells))
