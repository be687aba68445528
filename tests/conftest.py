"""What every test starts from."""

import gc

import pytest
from cli_runs import closed, digits, run  # noqa: F401

from natcupy import known_calls


@pytest.fixture(autouse=True, scope="module")
def what_is_there_stays():
    """No collection of garbage has to walk all of torch, or what earlier modules left, again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_call_is_known():
    """A test that puts another backend in place must not meet what an earlier test's calls left."""
    known_calls._good.clear()
