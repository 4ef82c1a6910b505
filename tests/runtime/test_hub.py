"""Repositories by name: what is fetched, and what is refused with which remedy."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from rdm_jax.runtime import hub as hubs
from rdm_jax.runtime.errors import InputError
from tests.support.paths import ROOT

FILES = {"config.json": b"1", "stage1.safetensors": b"2", "train.py": b"3"}


def listing(**files):
    """The list of a relay of these files."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    return json.dumps({"version": 1, "files": digests}).encode()


@pytest.fixture
def uploaded(hub, tmp_path):
    """The hub with one repository, 'a/relay', whose tag 'first' has another config."""
    folder = tmp_path / "made"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "relay.json").write_bytes(listing(**FILES))
    first = listing(**FILES | {"config.json": b"old"})
    hub.upload(folder, "a/relay", "first", **{"config.json": b"old", "relay.json": first})
    hub.upload(folder, "a/relay")
    return hub


def fetch(url):
    return hubs.fetch(url, ["config.json", "captions.json"], "source")


def test_fetch_takes_the_named_files_alone_and_once(uploaded):
    folder = fetch("hf://a/relay")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "relay.json"]
    assert (folder / "config.json").read_bytes() == b"1"
    assert fetch("hf://a/relay") == fetch(hubs.at("hf://a/relay@main", folder.name)) == folder
    assert sorted(uploaded.fetched) == ["config.json", "relay.json"]


def test_fetch_takes_a_revision(uploaded):
    assert (fetch("hf://a/relay@first") / "config.json").read_bytes() == b"old"
    commit = uploaded.commit_of("a/relay", "first")
    assert fetch(f"hf://a/relay@{commit}").name == commit


@pytest.mark.parametrize(
    "url", ["hf://relay", "hf://a/b/c", "hf://a/relay@", "hf://", "hf://a/../b", "hf://a/b--c"]
)
def test_fetch_refuses_what_is_no_name(hub, url):
    with pytest.raises(InputError, match=r"is not the name of a rep.*Use hf://OWNER/NAME\[@REV"):
        fetch(url)
    assert not hub.fetched


@pytest.mark.parametrize(
    "url, problem, fix",
    [
        ("hf://a/other", "source='hf://a/other': there is no such repository", "'hf auth login'"),
        ("hf://a/relay@2.0", "has no revision '2.0'", "Use a branch, a tag"),
        ("hf://a/gated", "source='hf://a/gated' asks for consent", "Accept them on"),
        ("hf://a/model", r"is not a shared relay: it has no relay\.json", "--mode=export without"),
    ],
)
def test_fetch_refuses_and_names_the_remedy(uploaded, url, problem, fix):
    main = uploaded.repositories["a/relay"]["main"]
    others = {name: data for name, data in main.items() if name != "relay.json"}
    commit = "0" * 40
    uploaded.repositories["a/model"] = {"main": others, commit: others}
    uploaded.repositories["a/gated"] = uploaded.repositories["a/relay"]
    uploaded.gated.add("a/gated")
    with pytest.raises(InputError, match=problem) as refusal:
        fetch(url)
    assert fix in refusal.value.fix


def test_fetch_refuses_a_config_that_differs_from_its_hash(uploaded, tmp_path):
    """Before anybody parses it."""
    main = uploaded.repositories["a/relay"]["main"]
    uploaded.repositories["a/torn"] = dict.fromkeys(["main", "1" * 40], main | {"config.json": b""})
    with pytest.raises(InputError, match=r"config\.json differs from its hash") as refusal:
        fetch("hf://a/torn")
    assert refusal.value.fix == f"Remove {tmp_path}/hub/models--a--torn, and run the same again."


@pytest.mark.parametrize("name", ["config.json", "stage1.safetensors"])
def test_fetch_keeps_what_is_there_of_an_incomplete_relay(uploaded, name):
    files = dict(uploaded.repositories["a/relay"]["main"])
    del files[name]
    uploaded.repositories["a/part"] = dict.fromkeys(["main", "2" * 40], files)
    with pytest.raises(InputError, match=rf"{name} is missing\. Load it once with a network"):
        hubs.fetch("hf://a/part", ["config.json", "stage1.safetensors"], "source")


OFFLINE = """
import sys
from rdm_jax.runtime import hub
for url in sys.argv[1:]:
    try:
        print(hub.fetch(url, ["config.json"], "source"))
    except ValueError as error:
        print(error)
"""


def test_fetch_without_a_network_takes_the_cache(uploaded, tmp_path):
    """In a process of its own: the library reads the variables when it is imported."""
    folder = fetch("hf://a/relay")
    variables = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "hf://a/relay", "hf://a/new", "hf://a/relay@2.0"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    cached, new, revision = done.stdout.splitlines()
    assert cached == str(folder)
    refused = f" is not in the cache ({tmp_path}/hub), and HF_HUB_OFFLINE is set. Unset it, or load"
    assert new.startswith(f"source='hf://a/new'{refused}")
    assert revision.startswith(f"source='hf://a/relay@2.0'{refused}")


def test_fetch_names_the_hub_that_does_not_answer(uploaded, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"and http://127\.0\.0\.1:9 does not answer\. Check the"):
        fetch("hf://a/relay")


@pytest.mark.parametrize(
    "status, fix", [(403, "Run 'hf auth login'"), (503, "Run the same again later.")]
)
def test_fetch_gives_the_status_of_a_hub_in_trouble(uploaded, status, fix):
    uploaded.status = status
    with pytest.raises(InputError, match=rf"answers with status {status}") as refusal:
        fetch("hf://a/relay")
    assert refusal.value.fix.startswith(fix)


def test_fetch_names_the_cache_that_is_full(uploaded, monkeypatch, tmp_path):
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(InputError, match=rf"cache \({tmp_path}/hub\): No space.*or set HF_HUB_C"):
        fetch("hf://a/relay")


def test_fetch_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InputError, match="'hf://a/relay' cannot be fetched: the package huggin"
    ) as e:
        fetch("hf://a/relay")
    assert e.value.fix == "Run pip install 'rdm_jax[hub]'."


@pytest.mark.parametrize(
    "folder, fix",
    [
        ("hub/models--a--relay/snapshots/1f", "Remove hub/models--a--relay, and run the same"),
        ("runs/snapshots/relay", "Get it again"),
    ],
)
def test_remedy_removes_no_other_folder_than_the_cache(folder, fix):
    assert hubs.to_get_again(Path(folder)).startswith(fix)
