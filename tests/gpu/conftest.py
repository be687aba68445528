"""The rig of a test in this folder: a GPU, or the simulated one."""

import pytest
from rigs import Rig


@pytest.fixture
def rig(request):
    made = Rig(request.param, notes=request.node.user_properties)
    with made.active():
        yield made
