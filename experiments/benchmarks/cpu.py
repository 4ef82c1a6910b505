"""Training steps and forward passes of small networks on a CPU, as a Markdown table.

    python -m experiments.benchmarks.cpu
    python -m experiments.benchmarks.cpu --against ../other_checkout

The rows are the two stages of configs/digits.py and a network of 64 channels at 32 x 32, on random
data. With --against, another checkout of this project takes turns with this one, each in a process
of its own that is set up as a run is, so that other load on the machine affects both. Images per
second are medians over the turns, and the best turn, which other load has affected least. "CPU ms"
is the processor time of all threads per step or pass. "Ratio" is that of the images per second.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags

from experiments.benchmarks import timing
from rdm_jax.cli.command import command

_AGAINST = flags.DEFINE_string("against", "", "Folder of another checkout to compare with.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Turns of each pass.", 1)
_SECONDS = flags.DEFINE_float("turn_seconds", 2.0, "Length of a turn.")
_ROW = flags.DEFINE_multi_integer("row", [], "Numbers of the rows; all if it is not given.", 1, 3)

HERE = Path(__file__).parents[2]
ROWS = ("digits, stage 1", "digits, stage 2", "64 channels, 32 x 32")
PASSES = ("training", "forward")
COLUMNS = ("network", "pass", "checkout", "images/s", "best", "CPU ms", "ratio", "of the best")
WORKER = HERE / "experiments" / "benchmarks" / "cpu_worker.py"

Times = list[tuple[float, float]]  # seconds and seconds of processor time per image


class Worker:
    """A process that serves one row with the modules of a checkout."""

    def __init__(self, folder: Path, row: int):
        words = [sys.executable, str(WORKER), str(row)]
        self._process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.batch = int(self._read())
        self._read()

    def turn(self, name: str) -> tuple[float, float]:
        """A turn of a pass: seconds and seconds of processor time per image."""
        assert self._process.stdin is not None
        print(name, _SECONDS.value, file=self._process.stdin, flush=True)
        seconds, used = map(float, self._read().split())
        return seconds / self.batch, used / self.batch

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker has ended with status {self._process.wait()}")
        return line


def cells(
    row: int, folders: list[Path], times: dict[tuple[str, Path], Times], batch: int
) -> Iterator[list[str]]:
    """The table's rows for one network; `times` is by pass and folder."""
    for name in PASSES:
        walls = [[wall for wall, _ in times[name, folder]] for folder in folders]
        for folder, wall in zip(folders, walls, strict=True):
            ratio = statistics.median(walls[-1]) / statistics.median(wall)
            best = min(walls[-1]) / min(wall)
            used = statistics.median(used for _, used in times[name, folder]) * batch
            rates = [f"{1 / statistics.median(wall):,.3g}", f"{1 / min(wall):,.3g}"]
            shown = folder.name if folder == HERE else str(folder)
            ratios = [f"{ratio:.2f}", f"{best:.2f}"]
            yield [ROWS[row], name, shown, *rates, timing.milliseconds(used), *ratios]


def main() -> None:
    """Prints the table."""
    folders = [HERE] + ([Path(_AGAINST.value).resolve()] if _AGAINST.value else [])
    timing.start_table(f"CPU, {timing.cores()} cores, jax {jax.__version__}", COLUMNS)
    for row in [number - 1 for number in _ROW.value] or range(len(ROWS)):
        workers = {folder: Worker(folder, row) for folder in folders}
        times: dict[tuple[str, Path], Times] = {}
        for _ in range(_ROUNDS.value):
            for name in PASSES:
                for folder, worker in workers.items():
                    times.setdefault((name, folder), []).append(worker.turn(name))
        batch = workers[HERE].batch
        for worker in workers.values():
            worker.close()
        for line in cells(row, folders, times, batch):
            timing.print_row(line)


if __name__ == "__main__":
    command(main)
