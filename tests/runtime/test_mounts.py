"""Local folders that stand for folders of a bucket, on a server of the storage protocol."""

import errno
import shutil
import sys

import pytest

from rdm_jax.runtime import mounts
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.mounts import Mount


def write(mount: Mount, name: str, text: str) -> None:
    (mount.path / name).parent.mkdir(parents=True, exist_ok=True)
    (mount.path / name).write_text(text)


def files_of(mount: Mount) -> dict[str, str]:
    paths = [path for path in mount.path.rglob("*") if path.is_file()]
    return {str(path.relative_to(mount.path)): path.read_text() for path in paths}


def test_what_one_process_pushes_another_pulls(store):
    one, other = Mount(store.url("run")), Mount(store.url("run"))
    for name in ("config.json", "stage1/metrics.jsonl", "samples/.parts-1/a.npz"):
        write(one, name, name)
    write(one, ".config.json.incomplete", "half")
    write(one, "stage1/wandb/run-1/logs/debug.log", "open")
    one.push()
    other.pull("samples")
    names = {"config.json", "stage1/metrics.jsonl", "samples/.parts-1/a.npz"}
    assert files_of(other) == {name: name for name in names}

    # What changes and what is removed, in both directions.
    write(other, "config.json", "changed")
    (other.path / "samples/.parts-1/a.npz").unlink()
    other.push()
    write(one, "stage1/metrics.jsonl", "longer")
    one.push()
    one.pull()
    other.pull()
    assert files_of(other) == {"config.json": "changed", "stage1/metrics.jsonl": "longer"}
    assert store.names("run/") == ["run/config.json", "run/stage1/metrics.jsonl"]
    (one.path / ".config.json.incomplete").unlink()
    shutil.rmtree(one.path / "stage1/wandb")
    assert files_of(one) == files_of(other)


def test_nothing_is_sent_twice(store):
    one = Mount(store.url("run"))
    write(one, "config.json", "{}")
    one.push()
    one.pull()
    before = len(store.server.requests)
    one.push()
    assert len(store.server.requests) == before
    one.pull()
    assert {method for method, _ in store.server.requests[before:]} == {"GET"}
    assert not [path for _, path in store.server.requests[before:] if "config.json" in path]


def test_pull_fetches_large_files_only_of_the_folders_that_are_asked_for(store):
    one, other = Mount(store.url("run")), Mount(store.url("run"))
    small = ["samples/grid.png", "stage1/evaluations/10/evaluation.json"]
    large = ["samples/samples.npz", "samples/images/1.png"]
    never = ["stage1/previews/10.png", "stage1/tensorboard/events"]
    for name in [*small, *large, *never]:
        write(one, name, name)
    one.push()
    store.server.put(store.name, "run/stage1/checkpoints/5/d", b"")
    for name in ("run2/config.json", "run/", "run/stage1/"):  # of another run, and of the console
        store.server.put(store.name, name, b"")
    other.pull()
    assert set(files_of(other)) == set(small)
    other.push()  # what was not fetched is not removed
    other.pull("samples")
    assert set(files_of(other)) == {*small, *large}
    assert len(store.names("run/")) == 9


@pytest.mark.parametrize(
    "name", ["stage1/evaluations/../../../out", "../out", "/out", "a//b", "a/.", ""]
)
def test_an_object_that_is_no_file_of_the_folder_is_not_fetched(store, name):
    """Whoever may write into a bucket must not write elsewhere on the machines that read it."""
    one = Mount(store.url("run"))
    for each in ("config.json", name):
        store.server.put(store.name, f"run/{each}", b"")
    one.pull("stage1", "a")
    assert [*one.path.parent.rglob("*")] == [one.path, one.path / "config.json"]
    one.push()
    assert len(store.names("run/")) == 2


def test_a_failed_push_names_the_bucket_and_is_repeated(store):
    one = Mount(store.url("run"))
    write(one, "config.json", "{}")
    store.server.answer = lambda method, path: 403 if method == "POST" else 0
    with pytest.raises(OSError, match="Forbidden") as error:
        one.push()
    assert error.value.filename == store.url("run") and error.value.errno == errno.EIO
    store.server.answer = lambda method, path: 0
    one.push()
    assert store.names("run/") == ["run/config.json"]


def test_a_failed_pull_leaves_nothing_that_is_uploaded(store):
    one, other = Mount(store.url("run")), Mount(store.url("run"))
    for name in ("a.json", "b.json"):
        write(one, name, "whole")
    one.push()
    store.server.answer = lambda method, path: 403 if "b.json" in path else 0
    with pytest.raises(OSError, match="Forbidden"):
        other.pull()
    store.server.answer = lambda method, path: 0
    before = len(store.server.requests)
    other.push()
    assert len(store.server.requests) == before
    other.pull()
    assert files_of(other) == files_of(one)


@pytest.mark.second
def test_a_busy_store_is_asked_again(store):
    one, failures = Mount(store.url("run")), [503, 429]
    write(one, "config.json", "{}")
    store.server.answer = lambda method, path: failures.pop() if failures else 0
    one.push()
    assert not failures and store.names("run/") == ["run/config.json"]


def test_mounted_refuses_what_cannot_be_read(store):
    def refusal(url: str) -> str:
        with pytest.raises(InputError) as error:
            mounts.mounted(url)
        return str(error.value)

    assert "'gs://bucket' is not a folder of a bucket" in refusal("gs://bucket")
    assert "gs://no-such-bucket cannot be read (it does not exist)" in refusal(
        "gs://no-such-bucket/x"
    )
    store.server.answer = lambda method, path: 403
    said = refusal(store.url("other"))
    assert "Forbidden" in said and "roles/storage.objectAdmin" in said
    assert store.url("other") not in mounts._mounts


def test_mounted_names_the_extra_of_a_missing_library(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    mounts.files.cache_clear()
    with pytest.raises(
        InputError, match=r"gcsfs is not installed. Run pip install 'rdm_jax\[gcs\]'"
    ):
        mounts.mounted(store.url("run"))


def test_messages_name_the_bucket(store, caplog):
    path = mounts.mounted(store.url("run")) / "samples"
    mounts.log.warning("%s is there", path)
    assert f"{store.url('run')}/samples is there" in caplog.text
    assert str(mounts.in_store(path)) == f"{store.url('run')}/samples"
    assert mounts.in_store(path.parent.parent) == path.parent.parent
