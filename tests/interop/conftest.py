"""What holds for every test of files that are not trusted."""

import os
import posix

import pytest


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """The file that every payload here would make; nothing may have made it, or have run a
    command."""
    path, ran = tmp_path / "canary", []
    for module in (os, posix):
        monkeypatch.setattr(module, "system", ran.append)
    yield path
    assert not path.exists()
    assert not ran
