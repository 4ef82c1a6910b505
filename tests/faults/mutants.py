"""Shows that the campaign can fail: breaks a copy of the code on purpose, and runs the test that must see it.

python -m tests.faults.mutants
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rdm_jax.evaluation.tables import markdown

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "package")

# Fault, what is broken, file, what is there, what comes in its place, and the test.
MUTANTS = [
    (
        1,
        "a resumed run begins its data anew",
        "training/loop.py",
        '            iterator.set_state(about["data"])\n',
        "",
        "test_1_",
    ),
    (
        1,
        "the optimizer's state is not restored",
        "training/checkpoint.py",
        "TrainState(**restored.train,",
        "TrainState(**restored.train | {'opt_state': jax.tree.map(jnp.zeros_like, restored.train['opt_state'])},",
        "test_1_",
    ),
    (
        6,
        "no file is compared with its checksum",
        "training/checksums.py",
        "    for name in sorted(expected.keys() | found.keys()):\n",
        "    for name in ():\n",
        "test_6_a_byte",
    ),
    (
        12,
        "a step that is not finite is taken",
        "training/step.py",
        "finite = jnp.isfinite(loss) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(loss) | True",
        "test_12_one",
    ),
    (12, "the average is updated all the same", "training/step.py", "ema=keep(ema, state.ema),", "ema=ema,", "test_12_one"),
    (
        16,
        "a pickle is loaded by Python's own reader",
        "interop/weights.py",
        "    with open_torch(path) as found:\n",
        "    import pickle\n    pickle.loads(path.read_bytes())\n    with open_torch(path) as found:\n",
        "test_16_from_outside and pickle",
    ),
    (
        16,
        "a data set's features are imported, whatever they are",
        "data/tfds_directory.py",
        "if not OWN_FEATURE.fullmatch(name):",
        "if not name:",
        "test_16_from_outside and features",
    ),
    (
        16,
        "a config that is nested too deep is not expected",
        "config.py",
        "(OSError, ValueError, RecursionError) as error",
        "(OSError, ValueError) as error",
        "(test_16_fuzzed or test_16_from) and config",
    ),
]


def seen(file: str, old: str, new: str, test: str) -> str:
    """Whether the test passes on the code as it is, and fails on what was broken."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        path = tree / "rdm_jax" / file
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file} has {old!r} {text.count(old)} times; once would do.")
        path.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", test, "tests/faults"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    return {0: "NOT SEEN", 1: "seen"}.get(done.returncode, f"not run: {done.stdout[-300:]}")


def main() -> int:
    """Returns 1 where a test did not see that the code was broken."""
    rows = []
    for fault, what, *mutation in MUTANTS:
        rows.append([str(fault), what, mutation[-1], seen(*mutation)])
        print(*rows[-1], sep=" | ", flush=True)
    print(f"\n{markdown(['fault', 'broken on purpose', 'test', ''], rows)}")
    return int(any(row[-1] != "seen" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
