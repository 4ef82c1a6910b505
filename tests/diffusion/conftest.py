import pytest

from tests.support.precision import enable_x64


@pytest.fixture
def x64():
    with enable_x64(True):
        yield
