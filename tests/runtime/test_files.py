"""Atomic files, their checks, and local paths."""

import errno

import numpy as np
import pytest

from rdm_jax.data.image_sets import open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.data.sources import open_source
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import is_whole_npz, local_path, log_write_errors


def test_is_whole_npz_notices_every_harmful_bit_flip(tmp_path):
    """A file that passes holds the arrays that were written; nothing is raised."""
    path, arrays = (
        tmp_path / "x.npz",
        {"a": np.arange(6, dtype=np.uint8), "b": np.ones((2, 2), np.uint8)},
    )
    np.savez_compressed(path, **arrays)
    sound, noticed = path.read_bytes(), 0
    assert is_whole_npz(path, arrays)
    assert not is_whole_npz(path, ["a"]) and not is_whole_npz(path, [*arrays, "c"])
    for bit in range(8 * len(sound)):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if is_whole_npz(path, arrays):
            with np.load(path) as file:
                assert all((file[name] == value).all() for name, value in arrays.items())
        else:
            noticed += 1
    assert noticed > 4 * len(sound)  # the others are in dates, versions and so on
    assert not is_whole_npz(tmp_path / "nothing.npz", arrays)


def test_log_write_errors_logs_os_errors_only(tmp_path, caplog):
    with log_write_errors(tmp_path / "curve.png"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "curve.png cannot be written (No space left on device)" in caplog.text
    with pytest.raises(ValueError), log_write_errors(tmp_path):
        raise ValueError


@pytest.mark.parametrize(
    "path, says",
    [
        ("s3://bucket/x", "s3:// is not supported here. Use a local path"),
        ("gs://bucket/x/y", "gcsfuse --implicit-dirs bucket /mnt/bucket', and use /mnt/bucket/x/y"),
        ("~nosuchuser/x", r"'~nosuchuser/x' cannot be expanded .*Use the absolute path\."),
    ],
)
def test_local_path_refuses_urls_and_unknown_users_everywhere(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    calls = (
        lambda: local_path(path, "--workdir"),
        lambda: open_source(f"folder:{path}"),
        lambda: open_prepared(path),
        lambda: prepare("digits", path, ImageSpec(8, 8)),
    )
    for call in calls:
        with pytest.raises(InputError, match=says):
            call()
    assert not list(tmp_path.iterdir())
