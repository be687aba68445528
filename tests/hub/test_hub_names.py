"""Names: what each of them resolves to without a network, and the table of released weights."""

import pytest
import torch
from small import invented

import natcupy
from natcupy import hub
from natcupy.hub import converting
from natcupy.hub.errors import NotFound
from natcupy.zoo import model_config


@pytest.fixture(autouse=True)
def offline(no_sockets):
    """Nothing in this file needs a network."""
    yield
    assert no_sockets == []


def test_unknown_names_show_the_nearest():
    with pytest.raises(NotFound, match="nat-small"):
        hub.from_pretrained("nat-smal")
    with pytest.raises(NotFound, match="org/name"):
        hub.from_pretrained("a b c")
    with pytest.raises(NotFound, match="no such"):
        hub.from_pretrained("./nat-small")


@pytest.mark.parametrize("name", ["dinat-s-tiny", "dinat_large_21k.in22k", "vitrpb-base"])
def test_weights_that_are_on_no_repository(name):
    with pytest.raises(
        NotFound, match=r"https://shi-labs\.com/.*\.pth.*from_pretrained\('path/to/"
    ):
        hub.from_pretrained(name)


def test_the_table():
    assert len(hub.WEIGHTS) == len(natcupy.zoo.MODELS)
    assert {row.arch for row in hub.WEIGHTS.values()} == set(natcupy.zoo.MODELS)
    assert sum(row.repo is not None for row in hub.WEIGHTS.values()) == 11
    for tag, row in hub.WEIGHTS.items():
        assert tag == row.tag and row.license == "mit" and row.original.endswith(".pth")
        assert hub.weights.find(row.arch.replace("_", "-")) is not None
        if row.repo:
            assert hub.weights.find_repo(row.repo) is row
            # float32, and room for names
            size = natcupy.zoo.num_parameters(model_config(row.arch)) * 4 / 1e6
            assert abs(row.size_mb - size) < 0.01 * size + 1
    originals = [row.original for row in hub.WEIGHTS.values()]
    assert len(set(originals)) == len(originals)
    assert hub.weights.find("NAT_Small.in1k").repo == "shi-labs/nat-small-in1k-224"


def test_embedded_weights_are_found_by_name(tmp_path, monkeypatch):
    model = invented("nat")
    monkeypatch.setattr(hub.weights, "EMBEDDED", tmp_path)
    hub.save_pretrained(model.half(), tmp_path / "nat-digits")
    assert hub.embedded_names() == ["nat-digits"]
    for name in ("nat-digits", "nat_digits"):
        loaded = natcupy.from_pretrained(name)
        assert loaded.source.kind == "embedded"
        assert loaded.head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="revision"):
        natcupy.from_pretrained("nat-digits", revision="v1")


def test_a_name_like_no_other_is_told_where_names_are():
    with pytest.raises(
        ValueError, match=r"called 'qqqq'; natcupy.hub.WEIGHTS, or `natcupy models`"
    ):
        converting.released("qqqq")
