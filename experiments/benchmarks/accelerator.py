"""All that one accelerator should tell, by one command: tables, profiles, the costliest kernels.

    python -m experiments.benchmarks.accelerator --out runs/accelerator
    python -m experiments.benchmarks.accelerator --out /tmp/small --small   # on a CPU, in minutes

It runs `speed` for each of `RUNS`, one process after the other, so that an error in one, such as
too little memory, does not end the others. Each leaves its table in `OUT/tables.md`, and a profile
of a few calls, whose ten costliest kernels follow the table. --only names runs; a run that has its
table is not repeated. Times of kernels are those of the device; on a CPU, of the thunks.
"""

import collections
import glob
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
from absl import app, flags

_OUT = flags.DEFINE_string("out", "runs/accelerator", "Folder of the tables and profiles.")
_SMALL = flags.DEFINE_bool("small", False, "Tries everything with networks of the digits' size.")
_ONLY = flags.DEFINE_list("only", [], "Names of runs; all if it is not given.")

NOT_KERNELS = re.compile(r"^(Thread|Thunk|Tfrt|Pjit|Pjrt|Execut|Wait|Slinky|py|\$|end: |jit_)")
SHOWN = 10


class Run(NamedTuple):
    """Arguments of `speed`, and those of a small trial of the same kind."""

    arguments: str
    small: str = "--config=configs/digits.py --stage=1 --batch=8 --seconds=0.2"


IMAGENET = "--config=configs/imagenet.py --classes=1000 --seconds=10"
REMATS = "bfloat16,bfloat16+convolutions,bfloat16+block"
RUNS = {
    "adm64": Run(f"{IMAGENET} --stage=1 --batch=128 --nosampling --variants={REMATS}"),
    "adm64-no-dropout": Run(
        f"{IMAGENET} --stage=1 --batch=128 --nosampling --config.stage1.network.dropout=0.0"
    ),
    "adm64-batch-256": Run(f"{IMAGENET} --stage=1 --batch=256 --nosampling --variants={REMATS}"),
    "adm256": Run(f"{IMAGENET} --stage=2 --batch=16 --nosampling --variants={REMATS}"),
    "adm256-no-dropout": Run(
        f"{IMAGENET} --stage=2 --batch=16 --nosampling --config.stage2.network.dropout=0.0"
    ),
    "adm256-batch-32": Run(
        f"{IMAGENET} --stage=2 --batch=32 --nosampling --variants=bfloat16+block"
    ),
    "sampling": Run(f"{IMAGENET} --batch=32 --notraining --nfe=9"),
    "jit": Run(
        "--config=configs/imagenet_jit.py:B16 --classes=1000 --seconds=10 --batch=128 --nfe=9 "
        "--variants=bfloat16,bfloat16+products"
    ),
    "relay-jit": Run(
        "--config=configs/imagenet_relay_jit.py --classes=1000 --seconds=10 --batch=64 --nfe=9 "
        "--variants=bfloat16,bfloat16+block"
    ),
}


def costliest(folder: Path) -> list[tuple[str, float]]:
    """The kernels of a profile that take longest, with their share of all kernels' time."""
    total: collections.Counter = collections.Counter()
    for path in glob.glob(str(folder / "**/*.xplane.pb"), recursive=True):
        profile = jax.profiler.ProfileData.from_file(path)  # its planes end with it
        planes = list(profile.planes)
        devices = [p for p in planes if re.match(r"/device:(GPU|TPU)", p.name)]
        for plane in devices or planes:
            for line in plane.lines:
                for event in line.events:
                    if not NOT_KERNELS.match(event.name):
                        total[event.name] += event.duration_ns
    whole = sum(total.values()) or 1
    return [(name, time / whole) for name, time in total.most_common(SHOWN)]


def run(name: str, arguments: str, out: Path) -> str:
    """A section of the tables: what `speed` printed, and the costliest kernels of each profile."""
    profiles = out / "profiles" / name
    command = [sys.executable, "-m", "experiments.benchmarks.speed", *arguments.split()]
    done = subprocess.run(
        [*command, f"--profile={profiles}"], capture_output=True, text=True, check=False
    )
    parts = [f"## {name}\n\n    {arguments}\n", done.stdout.strip()]
    if done.returncode:
        parts.append(f"It ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    for folder in sorted(profiles.glob("*")):
        rows = [f"| {share:.1%} | `{kernel[:90]}` |" for kernel, share in costliest(folder)]
        parts.append("\n".join([f"\n{folder.name}:\n", "| share | kernel |", "|---|---|", *rows]))
    return "\n".join(parts) + "\n"


def main(_: list[str]) -> None:
    """Runs everything that has no table yet."""
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    tables = out / "tables.md"
    known = tables.read_text() if tables.exists() else ""
    for name in _ONLY.value or RUNS:
        if f"## {name}\n" in known:
            continue
        arguments = RUNS[name].small if _SMALL.value else RUNS[name].arguments
        section = run(name, arguments, out)
        print(section, flush=True)
        with tables.open("a") as file:
            file.write(f"{section}\n")


if __name__ == "__main__":
    app.run(main)
