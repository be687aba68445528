"""`natcupy verify`: folders and repositories, against what they should be, with a local Hub."""

import pytest
from small import invented
from test_hub_commands import ALICE, run

from natcupy.cli import main
from natcupy.cli.verify import _verdict
from natcupy.hub import verify
from natcupy.hub.client import Access
from natcupy.hub.pull import pull


def test_verify_a_folder(hub, tmp_path, capsys):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE)
    folder = model.save_pretrained(tmp_path / "x")
    status, report, _ = run(capsys, "verify", folder)
    assert (
        status == 0 and report["ok"] and {f["status"] for f in report["files"]} == {verify.UNKNOWN}
    )
    assert main(["verify", str(folder)]) == 0
    assert "compared with nothing (--against REPO" in capsys.readouterr().out
    (folder / "README.md").write_bytes(hub.tree("me/mine")["README.md"])
    assert main(["verify", str(folder), "--against", "me/mine"]) == 0
    assert capsys.readouterr().out.endswith(": ok\n")
    status, report, _ = run(capsys, "verify", folder, "--against", "me/mine")
    assert status == 0 and {f["status"] for f in report["files"]} == {verify.OK}
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").unlink()
    status, report, _ = run(capsys, "verify", folder, "--against", "me/mine")
    states = {f["file"]: f["status"] for f in report["files"]}
    assert status == 1 and states["model.safetensors"] == verify.DIFFERS
    assert states["config.json"] == verify.MISSING and states["README.md"] == verify.OK
    (folder / "model.safetensors").write_bytes(data[:100])
    status, report, error = run(capsys, "verify", folder)
    assert status == 1 and "ends inside" in report["problem"] and "ends inside" in error
    assert run(capsys, "verify", tmp_path / "absent")[0] == 1


def test_verify_a_repository(hub, tmp_path, capsys):
    invented("nat").push_to_hub("me/mine", token=ALICE)
    cache = ("--cache-dir", tmp_path / "cache")
    status, report, _ = run(capsys, "verify", "me/mine", *cache)
    assert status == 0 and report["commit"] == hub.repos["me/mine"].refs["main"]
    assert {f["status"] for f in report["files"]} == {verify.OK} and len(report["files"]) == 4
    hub.fault(r"/blobs/", times=100, flip=True)
    status, report, _ = run(capsys, "verify", "me/mine", "--cache-dir", tmp_path / "other")
    states = {f["file"]: f["status"] for f in report["files"]}
    assert status == 1 and states["model.safetensors"] == verify.DIFFERS
    hub.faults.clear()
    assert main(["verify", "me/mine", *map(str, cache)]) == 0
    assert "ok" in capsys.readouterr().out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def states(report):
    return {each["file"]: each["status"] for each in report["files"]}


def test_files_that_only_one_side_has(hub, tmp_path, capsys):
    """They are told; what a model needs must be there, and what both have must be equal."""
    folder = invented("nat").save_pretrained(tmp_path / "x")
    more = {"pytorch_model.bin": b"PK", "figures/a.png": b"png", "train.log": b"log"}
    hub.commit("me/more", {**contents(folder), **more, "../x.txt": b"outside", "b/.c": b"hidden"})
    pull("me/more", tmp_path / "pulled", access=Access(cache_dir=tmp_path / "cache"))
    (tmp_path / "pulled/notes.txt").write_text("my own")
    (tmp_path / "x.txt").write_text("another file")
    status, report, _ = run(capsys, "verify", tmp_path / "pulled", "--against", "me/more")
    found = states(report)
    assert status == 0 and {found.pop(name) for name in more} == {verify.ABSENT}
    assert found.pop("notes.txt") == verify.UNKNOWN
    assert set(found.values()) == {verify.OK} and set(found) == set(contents(folder))
    (folder / "figures").mkdir()
    (folder / "figures/a.png").write_bytes(b"png")
    (folder / "train.log").write_bytes(b"another log")
    status, report, _ = run(capsys, "verify", folder, "--against", "me/more")
    found = states(report)
    assert status == 1 and found["figures/a.png"] == verify.OK
    assert found["train.log"] == verify.DIFFERS
    (folder / "train.log").unlink()
    (folder / "preprocessor_config.json").unlink()
    status, report, _ = run(capsys, "verify", folder, "--against", "me/more")
    assert status == 1 and states(report)["preprocessor_config.json"] == verify.MISSING


def test_weights_in_several_files_must_all_be_there(hub, tmp_path, capsys):
    folder = invented("dinat").save_pretrained(tmp_path / "x", max_shard_bytes=8000)
    hub.commit("me/parts", contents(folder))
    assert run(capsys, "verify", folder, "--against", "me/parts")[0] == 0
    next(folder.glob("model-00001-*")).unlink()
    status, report, error = run(capsys, "verify", folder, "--against", "me/parts")
    assert status == 1 and "model-00001" in report["problem"] and "model-00001" in error
    (folder / "model.safetensors.index.json").unlink()
    _, report, _ = run(capsys, "verify", folder, "--against", "me/parts")
    assert states(report)["model.safetensors.index.json"] == verify.MISSING


def test_nothing_in_common_is_not_called_ok():
    report = verify.Report("x", "0" * 40, (
        verify.Checked("config.json", 1, "", verify.UNKNOWN),
        verify.Checked("train.log", 1, "", verify.ABSENT),
    ), None)  # fmt: skip
    assert report.ok and "compared with nothing" in _verdict(report)


def test_the_revision_is_that_of_the_reference(hub, tmp_path, capsys):
    folder = invented("nat").save_pretrained(tmp_path / "x")
    hub.commit("me/model", contents(folder))
    hub.add_commit("me/model", "v1", contents(folder))
    newer = contents(invented("nat", 1).save_pretrained(tmp_path / "newer"))
    hub.commit("me/model", newer)
    assert run(capsys, "verify", folder, "--against", "me/model")[0] == 1
    for how in (("me/model", "--revision", "v1"), ("me/model@v1",),
                ("me/model@v1", "--revision", "v1")):  # fmt: skip
        status, report, _ = run(capsys, "verify", folder, "--against", *how)
        assert status == 0 and report["commit"] == hub.repos["me/model"].refs["v1"]
    with pytest.raises(ValueError, match="give the revision once"):
        verify.verify(folder, revision="v1", against="me/model@main")
    with pytest.raises(ValueError, match=r"org/name\[@revision\]"):
        verify.verify(folder, revision="a..b", against="me/model")


def test_what_cannot_be_meant_is_refused(hub, tmp_path, monkeypatch):
    folder = invented("nat").save_pretrained(tmp_path / "x")
    hub.commit("me/copy", contents(folder))
    with pytest.raises(ValueError, match="natcupy verify FOLDER --against me/original"):
        verify.verify("me/copy", against="me/original")
    for name in (folder, "nat-digits"):
        with pytest.raises(ValueError, match=r"belongs to a Hub repository.*--against"):
            verify.verify(name, revision="v1")
    monkeypatch.chdir(folder)
    for name in ("", "  "):
        with pytest.raises(ValueError, match="the name of a folder or repository"):
            verify.verify(name)
    assert hub.requests == []
