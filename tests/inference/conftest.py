"""A small model and its pictures, for every test in this folder."""

import pytest
import torch

from tests.inference.cases import small
from tests.pictures import class_folders


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes of torchrun have it; and small matrices are quicker so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture
def seven(tmp_path):
    """53 pictures in folders named like some of the model's classes."""
    return class_folders(tmp_path / "data", {"ant": 11, "dog": 20, "honey_bee": 13, "GNU": 9})
