"""What every test starts from."""

import pytest
from cli_runs import closed, digits, run  # noqa: F401

from natcupy import known_calls


@pytest.fixture(autouse=True)
def no_call_is_known():
    """A test that puts another backend in place must not meet what an earlier test's calls left."""
    known_calls._good.clear()
