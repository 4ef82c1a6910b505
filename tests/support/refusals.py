"""Asserts that files are refused, and measures what that costs."""

import tracemalloc

import pytest

from rdm_jax.interop.torch_files import open_torch
from rdm_jax.runtime.errors import InputError
from tests.support.torch_standins import Module, state_of


def refuse(path, *named, key=None):
    """Asserts that the file is refused by an error with a remedy, which has these words in it."""
    with pytest.raises(InputError) as caught, open_torch(path, key):
        pass
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be used (")
    assert caught.value.fix.startswith("Use ") and caught.value.fix.endswith(".")
    assert "\n" not in message
    assert len(message) < 700 or "only 'key0" in message
    assert "TypeCheckError" not in message  # types are only checked in tests
    for words in named:
        assert words in message, message


def of_changed(path, places, random, read) -> list:
    """What is read of a file after changing one byte, for each place; None where it is refused."""
    content, found = path.read_bytes(), []
    for place in places:
        changed = bytearray(content)
        changed[place] ^= random.integers(1, 256)
        path.write_bytes(changed)
        try:
            found.append(read(path))
        except InputError:
            found.append(None)
    return found


def with_tensor(view) -> Module:
    return Module("EDMPrecond", state_of({"weight": view}, {}, {}, _init_args=(), _init_kwargs={}))


def peak_of(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
