"""Checkpoints and small files on a network file system: listed late, stale, renamed from elsewhere."""

import errno
import os
from pathlib import Path

import pytest

from rdm_jax.checkpoints import checksums, folders
from rdm_jax.config import Config, saved
from rdm_jax.runtime.errors import InputError, reason
from rdm_jax.runtime.files import atomic_write
from rdm_jax.workdir import Workdir

STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with two files and their checksums."""
    folder = tmp_path / "5"
    (folder / "train").mkdir(parents=True)
    for name in ("train/a", "train/b"):
        (folder / name).write_text(name)
    checksums.write_checksums(folder)
    return folder


@pytest.fixture
def unlisted(monkeypatch):
    """`unlisted(NAMES)`: files that listings do not show."""

    def set_up(*names):
        listed = checksums.file_sizes
        monkeypatch.setattr(
            checksums,
            "file_sizes",
            lambda folder: {n: size for n, size in listed(folder).items() if n not in names},
        )

    return set_up


def test_file_that_is_listed_late_is_no_damage(checkpoint, unlisted):
    unlisted("train/b")
    assert checksums.damage(checkpoint) == ""
    (checkpoint / "train/b").write_text("other/b")
    assert checksums.damage(checkpoint) == "train/b does not match its checksum"
    (checkpoint / "train/b").unlink()
    assert checksums.damage(checkpoint) == "train/b is missing"


def test_save_waits_until_its_folder_is_listed(tmp_path, monkeypatch):
    partial, slept = tmp_path / "5.orbax-checkpoint-tmp", []

    def appear(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            partial.mkdir()

    monkeypatch.setattr(folders.time, "sleep", appear)
    assert folders.being_saved(tmp_path, 5) == partial and len(slept) == 2
    with pytest.raises(FileNotFoundError, match="the folder of the save is not listed"):
        folders.being_saved(tmp_path, 6)


@pytest.mark.parametrize("call", ["replace", "open"])
def test_file_that_cannot_be_replaced_stays(tmp_path, monkeypatch, call):
    """And nothing partial is left beside it."""
    workdir = Workdir(tmp_path)
    workdir.write_config(Config())
    before = workdir.config_file.read_bytes()

    def fail(*arguments, **keywords):
        raise STALE

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(OSError, match="Stale"):
            workdir.write_config(Config(seed=3))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert workdir.config_file.read_bytes() == before


def test_stale_config_asks_for_another_try(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "config.json") as partial:
        saved.save_config(Config(), partial)

    def fail(*arguments, **keywords):
        raise STALE

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(InputError, match="config.json cannot be read as a config .*Stale") as error:
        saved.read_saved(tmp_path)
    assert error.value.fix.startswith("Run the same again: the file was replaced")


def test_reason_names_a_stale_file_in_what_a_library_says():
    said = ValueError(f"NOT_FOUND: Error opening 'x': {os.strerror(errno.ESTALE)} [source ...]")
    assert reason(said) == os.strerror(errno.ESTALE)
