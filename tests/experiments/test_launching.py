"""The scripts that start a run on a cluster, with stand-ins for the cluster's commands."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDER = ROOT / "experiments/launching"

# Prints its arguments into a file. The slice is requested for a while, then active; the second
# command on its workers, which trains, ends as the test says.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "${*//$'\\n'/ }" >> "$CALLS"
case "$*" in
*describe*) head -n1 "$STATES"; [[ $(wc -l < "$STATES") == 1 ]] || sed -i 1d "$STATES" ;;
*rdm_jax.main*) status=$(head -n1 "$STATUSES"); sed -i 1d "$STATUSES"; exit "$status" ;;
esac
"""
SRUN = """#!/usr/bin/env bash
printf 'srun %s\\n' "$*" >> "$CALLS"
exit "$STATUS"
"""
SCONTROL = """#!/usr/bin/env bash
printf 'scontrol %s\\n' "$*" >> "$CALLS"
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a script with stand-ins of these commands; returns its status and their calls."""

    def run(script: str, commands: dict[str, str], *arguments: str, **variables: str):
        for name, text in commands.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        calls = tmp_path / "calls"
        found = subprocess.run(
            [FOLDER / script, *arguments],
            env=os.environ
            | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
            | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return found, calls.read_text().splitlines() if calls.exists() else []

    return run


def _lines(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def _slice(launch, tmp_path, states: tuple[str, ...], statuses: tuple[str, ...]):
    return launch(
        "tpu_slice.sh",
        {"gcloud": GCLOUD},
        "--config.seed=1",
        BUCKET="gs://mine",
        CONFIG="configs/imagenet_tpu.py",
        POLL="0",
        STATES=_lines(tmp_path / "states", *states),
        STATUSES=_lines(tmp_path / "statuses", *statuses),
    )


def _kinds(calls: list[str]) -> list[str]:
    words = ("create", "rsync", "rdm_jax.main", "delete")
    return [word for call in calls for word in words if word in call]


def test_slice_trains_once_and_is_given_back(launch, tmp_path):
    found, calls = _slice(launch, tmp_path, ("PROVISIONING", "PROVISIONING", "ACTIVE"), ("0",))
    assert found.returncode == 0, found.stderr
    assert _kinds(calls) == ["create", "rsync", "rdm_jax.main", "delete"]
    (command,) = (call for call in calls if "rdm_jax.main" in call)
    assert "--worker=all" in command
    assert "--workdir gs://mine/runs/rdm-jax '--config.seed=1'" in command


def test_slice_that_is_preempted_is_requested_again(launch, tmp_path):
    found, calls = _slice(
        launch, tmp_path, ("ACTIVE", "SUSPENDED", "ACTIVE", "ACTIVE"), ("143", "0")
    )
    assert found.returncode == 0, found.stderr
    assert _kinds(calls) == ["create", "rsync", "rdm_jax.main", "delete"] * 2


def test_slice_is_given_back_when_the_command_fails(launch, tmp_path):
    found, calls = _slice(launch, tmp_path, ("ACTIVE",), ("2",))
    assert found.returncode == 2
    assert _kinds(calls) == ["create", "rsync", "rdm_jax.main", "delete"]


def test_slice_names_a_request_that_failed(launch, tmp_path):
    found, calls = _slice(launch, tmp_path, ("FAILED",), ("0",))
    assert found.returncode == 1 and "rdm-jax is FAILED" in found.stderr
    assert _kinds(calls) == ["create"]


@pytest.mark.parametrize("status", ["0", "2", "143"])
def test_slurm_goes_on_in_a_new_job_when_the_time_is_up(launch, status):
    flags = ("--config", "configs/imagenet.py", "--workdir", "/shared/run")
    found, calls = launch(
        "slurm.sh",
        {"srun": SRUN, "scontrol": SCONTROL},
        *flags,
        STATUS=status,
        SLURM_JOB_ID="7",
    )
    assert str(found.returncode) == status
    assert calls[0].endswith(f"-m rdm_jax.main {' '.join(flags)}")
    assert calls[1:] == (["scontrol requeue 7"] if status == "143" else [])
