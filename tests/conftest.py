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


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A folder of three classes of drawn pictures."""
    from runs import draw_stripes

    return draw_stripes(tmp_path_factory.mktemp("data") / "stripes")


@pytest.fixture(scope="module")
def done(stripes, tmp_path_factory):
    """A finished run on them."""
    from runs import LONG, config, tiny

    from natcupy.train import finetune

    output = tmp_path_factory.mktemp("done") / "run"
    return finetune(tiny(), stripes, None, config(output, **LONG))
