"""How a command ends: one line for an error, and an exit status."""

import errno

import pytest

from rdm_jax.cli.exit_codes import exit_status

FULL = (errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "workdir", "where"),
    [
        (OSError(*FULL, "data/1.png"), "runs/digits", "data/1.png"),
        (OSError(*FULL), "runs/digits", "runs/digits"),
        (OSError(*FULL), None, "a file"),
    ],
)
def test_exit_status_names_what_the_system_refuses(capsys, error, workdir, where):
    def work():
        raise error

    assert exit_status(work, lambda: workdir) == 2
    line = f"error: {where} cannot be used (No space left on device). Free space, or use another "
    assert capsys.readouterr().err == f"{line}--workdir.\n"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_exit_status_of_a_stale_file_asks_for_another_try(capsys, number):
    """Also if it was raised again as another error, as that of a failed save."""

    def work():
        raise OSError(number, "Stale file handle", "run/5")

    assert exit_status(work, lambda: None) == 2
    line = "error: run/5 cannot be used (Stale file handle). Run the same again: the file was "
    assert capsys.readouterr().err.startswith(line)


class HttpError(Exception):
    """As that of gcsfs, whose import takes a second."""

    __module__ = "gcsfs.retry"


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Forbidden", "gs://bucket/run"), HttpError("Forbidden")]
)
def test_exit_status_of_a_bucket_does_not_ask_for_space(capsys, error):
    def work():
        raise error

    assert exit_status(work, lambda: "gs://bucket/run") == 2
    line = "error: gs://bucket/run cannot be used (Forbidden). Run the same command again once "
    assert capsys.readouterr().err == f"{line}the bucket can be used.\n"
