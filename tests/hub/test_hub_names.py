"""Names: what each of them resolves to without a network, and the table of released weights."""

import shutil

import pytest
import torch
from small import invented

import natcupy
from natcupy import hub
from natcupy.cli import main
from natcupy.hub import converting, verify
from natcupy.hub.client import Access
from natcupy.hub.errors import NotFound, Offline
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


def test_publish_tells_what_it_does_not_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name, what in (("nat-digits", "part of the package"), ("run", "of your own")):
        with pytest.raises(ValueError, match=f"{what}.*natcupy push {name} OWNER/NAME"):
            converting.released(name)
    with pytest.raises(ValueError, match="the nearest are") as caught:
        converting.released("nat-digit")
    assert "nat-digits" not in str(caught.value)


# ---------------------------------------------------------------- folders misspelt


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with runs/one and runs/two in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)


def unknown(name, **how):
    with pytest.raises((NotFound, Offline)) as caught:
        hub.from_pretrained(name, local_files_only=True, **how)
    return caught.value


@pytest.mark.usefixtures("here")
def test_a_folder_misspelt_is_told_before_the_hub():
    error = unknown("runs/none")
    text = "there is no folder or file runs/none here (runs holds one, two). As a Hub repository: "
    assert isinstance(error, Offline) and str(error).startswith(text)
    assert "not in the cache" in str(error)


@pytest.mark.usefixtures("here")
def test_a_repository_that_may_be_a_folder():
    text = str(unknown("somebody/else"))
    assert text.startswith("somebody/else@main is not in the cache")
    assert text.endswith("there is no folder or file somebody/else here.")
    for name, how in (
        ("somebody/else@v1", {}),
        ("runs/none", {"revision": "v1"}),
        ("hf-hub:runs/none", {}),
        ("nat-tiny", {}),
    ):
        assert "folder or file" not in str(unknown(name, **how))


@pytest.mark.usefixtures("here")
def test_more_than_one_slash_is_a_path():
    error = unknown("runs/on/model")
    assert isinstance(error, NotFound) and str(error).startswith(
        "there is no folder or file runs/on/model here (runs holds one, two)"
    )
    assert "org/name" in str(error)
    assert str(unknown("a/b/c")).startswith("there is no folder or file a/b/c here, and")


@pytest.mark.usefixtures("here")
def test_verify_tells_of_folders_too():
    with pytest.raises(Offline, match=r"no folder or file runs/none here \(runs holds one, two\)"):
        verify.verify("runs/none", access=Access(local_files_only=True))
    with pytest.raises(
        NotFound, match=r"no such folder: nat-tinny\. verify takes .*natcupy models"
    ):
        verify.verify("nat-tinny")
    with pytest.raises(NotFound, match=r"\.pth file only"):
        verify.verify("vitrpb-base")
    with pytest.raises(Offline, match="shi-labs/nat-tiny-in1k-224@main is not in the cache"):
        verify.verify("nat-tiny", access=Access(local_files_only=True))


def test_verify_the_bundled_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report = verify.verify("nat-digits")
    assert report.ok and {"config.json", "model.safetensors"} <= {f.file for f in report.files}
    states = {file.file: file.status for file in report.files}
    assert states["config.json"] == states["model.safetensors"] == verify.OK
    assert main(["verify", "nat_digits"]) == 0 and capsys.readouterr().out.endswith(": ok\n")
    invented("nat").save_pretrained("nat-digits")  # what is here comes first, as its path
    assert verify.verify("nat-digits").name == "nat-digits"


def test_a_bundled_model_that_was_changed(tmp_path, monkeypatch):
    shutil.copytree(hub.weights.EMBEDDED, tmp_path / "embedded")
    monkeypatch.setattr(hub.weights, "EMBEDDED", tmp_path / "embedded")
    invented("nat").save_pretrained(tmp_path / "embedded" / "nat-digits")
    report = verify.verify("nat-digits")
    states = {file.file: file.status for file in report.files}
    assert states["model.safetensors"] == states["config.json"] == verify.DIFFERS
    assert not report.ok and report.problem is None


def test_every_bundled_model_has_its_hashes():
    assert hub.weights.EMBEDDED_SHA256.keys() == set(hub.embedded_names())


# ---------------------------------------------------------------- both ways to say it


def test_fresh_weights_are_the_other_way():
    for name, words in (
        ("upernet-nat-mini", "--backbone nat-mini"),
        ("upernet-dinat-s-tiny", "--backbone path/to/dinat_s_tiny_in1k_224.pth"),
        ("dinat-s-tiny", "--from-scratch"),
    ):
        text = str(unknown(name))
        for each in (words, f"create_model('{name}')", "natcupy finetune --from-scratch",
                     "natcupy convert path/to/", "as the model on the command line"):  # fmt: skip
            assert each in text
        assert ("--backbone" in text) == ("--backbone" in words)


# ---------------------------------------------------------------- the bundled model, fresh


def test_the_bundled_model_with_fresh_weights():
    torch.manual_seed(0)
    fresh, trained = natcupy.create_model("nat-digits"), natcupy.from_pretrained("nat_digits")
    assert fresh.config == trained.config and fresh.name == "nat_digits" and fresh.training
    assert not torch.equal(fresh.head.weight, trained.head.weight)
    kept = {key: value for key, value in trained.pretrained_cfg.items() if key != "license"}
    assert fresh.pretrained_cfg == kept | {"tag": ""}
    assert natcupy.is_model("NAT_digits") and not natcupy.is_model("nat-digit")
    same = natcupy.create_model("nat-digits", pretrained=True)
    assert torch.equal(same.head.weight, trained.head.weight)


def test_the_bundled_model_with_overrides():
    other = natcupy.create_model("nat-digits", num_classes=3, in_chans=2, global_pool="")
    assert "label_names" not in other.pretrained_cfg and other.global_pool == ""
    assert other.pretrained_cfg["input_size"] == (2, 32, 32)
    assert other(torch.zeros(1, 2, 32, 32)).shape == (1, 4, 4, 3)
    maps = natcupy.create_model("nat-digits", features_only=True)(torch.zeros(1, 1, 32, 32))
    assert [each.shape[1] for each in maps] == [32, 64]
    assert model_config("nat-digits").num_classes == 10
    with pytest.raises(ValueError, match="the nearest are nat-digits"):
        natcupy.create_model("nat-digit")
