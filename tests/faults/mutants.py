"""Shows that the campaign can fail: breaks a copy of the code on purpose, and runs the test that
must notice.

python -m tests.faults.mutants
"""

import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rdm_jax.render.tables import markdown
from tests.support.paths import ROOT

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "package")

# Fault, what is broken, file, old text, new text, and the selection of the test.
MUTANTS = [
    (
        1,
        "a resumed run starts its data from the beginning",
        "training/loop.py",
        "        iterator.set_state(state)\n",
        "",
        "test_1_ and 3",
    ),
    (
        1,
        "the optimizer's state is not restored",
        "checkpoints/store.py",
        'abstract.replace(**restored.pop("train"),',
        "abstract.replace(**restored['train'] | {'opt_state': jax.tree.map(jnp.zeros_like, restored.pop('train')['opt_state'])},",
        "test_1_ and 3",
    ),
    (
        1,
        "a step is listed before it is complete",
        "checkpoints/store.py",
        "        write_checksums(being_saved(self.directory, self._saving))",
        "        import shutil\n        partial = being_saved(self.directory, self._saving)\n"
        "        shutil.copytree(partial, self.directory / str(self._saving))\n"
        "        time.sleep(5)\n        shutil.rmtree(self.directory / str(self._saving))\n"
        "        write_checksums(partial)",
        "test_1_ and 3",
    ),
    (
        6,
        "no file is compared with its checksum",
        "checkpoints/checksums.py",
        "    for name in sorted(expected.keys() | found.keys()):\n",
        "    for name in ():\n",
        "test_6_damage and 2",
    ),
    (
        12,
        "a step that is not finite is applied",
        "training/step.py",
        "finite = jnp.isfinite(loss) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(loss) | True",
        "test_12_bad_image and white_is_nan",
    ),
    (
        12,
        "a gradient that is not finite is not checked",
        "training/step.py",
        "finite = jnp.isfinite(loss) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(loss)",
        "test_12_bad_image and white_has_no_gradient",
    ),
    (
        12,
        "the EMA is updated nevertheless",
        "training/step.py",
        "ema=keep(ema, state.ema),",
        "ema=ema,",
        "test_12_bad_image and white_is_nan",
    ),
    (
        16,
        "a pickle is loaded by Python's own reader",
        "interop/import_export.py",
        "    with torch_files.open_torch(path, key) as found:\n",
        "    import pickle\n    pickle.loads(path.read_bytes())\n    with torch_files.open_torch(path, key) as found:\n",
        "hostile_file and pickle",
    ),
    (
        16,
        "features of a dataset are imported, whatever they are",
        "data/tfds_directory.py",
        "if not OWN_FEATURE.fullmatch(name):",
        "if not name:",
        "hostile_file and features",
    ),
    (
        16,
        "JSON that is nested too deeply is not caught",
        "runtime/files.py",
        "except RecursionError as error:",
        "except ZeroDivisionError as error:",
        "(test_16_fuzzed or hostile_file) and config and not minutes",
    ),
    (
        16,
        "objects in an npz are loaded by NumPy's own reader",
        "runtime/npz.py",
        "            self._file = zipfile.ZipFile(path)\n",
        "            list(np.load(path, allow_pickle=True).values())\n            self._file = zipfile.ZipFile(path)\n",
        "hostile_file and npz",
    ),
]


def status(test: str, file: str = "", old: str = "", new: str = "") -> int:
    """The exit status of pytest for some tests on a copy of the code, with `old` in a file replaced
    by `new` if a file is named."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        if file:
            path = tree / "rdm_jax" / file
            text = path.read_text()
            if text.count(old) != 1:
                raise ValueError(f"{file} has {old!r} {text.count(old)} times instead of once")
            path.write_text(text.replace(old, new))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-m",
            "long or not long",
            "-k",
            test,
            "tests/faults",
        ]
        return subprocess.run(command, cwd=tree, capture_output=True).returncode


def main() -> int:
    """Returns 1 if a test does not notice the broken code, or fails on unbroken code."""
    sound = functools.cache(lambda test: status(test) == 0)
    rows = []
    for fault, what, file, old, new, test in MUTANTS:
        found = (
            {0: "NOT SEEN", 1: "seen"}.get(status(test, file, old, new), "not run")
            if sound(test)
            else "FAILS ON SOUND CODE"
        )
        rows.append([str(fault), what, test, found])
        print(*rows[-1], sep=" | ", flush=True)
    print(f"\n{markdown(['fault', 'broken on purpose', 'test', ''], rows)}")
    return int(any(row[-1] != "seen" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
