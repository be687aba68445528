"""Pushing with the real client to a local Hub: one commit, all of it or none, on its parent."""

import json
import logging

import pytest
import torch
from small import CONFIGS, invented, same
from weather import cut_at_every_request

import natcupy
from natcupy import hub as hub_package
from natcupy.hub import attempt, card
from natcupy.hub.errors import (
    BadToken,
    CheckpointError,
    ConfigError,
    Conflict,
    Forbidden,
    NotFound,
    Offline,
    RevisionNotFound,
    Unavailable,
)

ALICE, BOB = "hf_alice", "hf_bob"
FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture
def load(tmp_path):
    return lambda name, **how: natcupy.from_pretrained(name, cache_dir=tmp_path / "c", **how)


def changed(model, by=1.0):
    with torch.no_grad():
        next(model.parameters()).add_(by)
    return model


def asked(hub, method):
    return [path for sent, path, _, _ in hub.requests if sent == method]


# ---------------------------------------------------------------- what arrives


def test_a_push_and_the_way_back(hub, load):
    model = invented("nat")
    done = model.push_to_hub("me/mine", token=ALICE, license="mit")
    assert set(hub.tree("me/mine")) - {".gitattributes"} == FILES == set(done.files)
    assert done.commit == hub.repos["me/mine"].refs["main"] and done.branch == "main"
    assert done.url == f"{hub.url}/me/mine/commit/{done.commit}" and done.pull_request is None
    assert not hub.repos["me/mine"].private
    back = load("me/mine")
    same(back.state_dict(), model.state_dict())
    assert back.config == model.config and back.source.commit == done.commit
    assert back.pretrained_cfg["license"] == "mit"
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(back(x), model(x))


def test_one_commit_whatever_there_is_to_send(hub):
    invented("nat").push_to_hub("me/mine", token=ALICE)
    invented("nat", 1).push_to_hub("me/mine", token=ALICE, max_shard_bytes=2000)
    repo = hub.repos["me/mine"]
    assert len(repo.commits) == 3  # the repository's first one, and one for each push
    assert len([path for path in asked(hub, "POST") if "/commit/" in path]) == 2


def test_the_same_again_sends_nothing(hub):
    first = invented("nat").push_to_hub("me/mine", token=ALICE)
    del hub.requests[:]
    again = invented("nat").push_to_hub("me/mine", token=ALICE)
    assert again.commit == first.commit and again.files == ()
    assert not asked(hub, "POST") and not asked(hub, "PUT")


def test_only_what_changed_is_sent(hub):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE)
    before = len(hub.blobs)
    done = model.push_to_hub("me/mine", token=ALICE, tags=["fine"])
    assert done.files == ("README.md",) and len(hub.blobs) == before


def test_shards_up_and_down(hub, load, tmp_path):
    model = invented("dinat")
    first = model.push_to_hub("me/mine", token=ALICE)
    assert "model.safetensors" in first.files
    done = changed(model).push_to_hub("me/mine", token=ALICE, max_shard_bytes=4000)
    names = set(hub.tree("me/mine"))
    assert "model.safetensors" not in names and "model.safetensors.index.json" in names
    assert len([n for n in names if n.startswith("model-0")]) > 3
    back = load("me/mine")
    same(back.state_dict(), model.state_dict())
    assert back.source.commit == done.commit and len(back.source.sha256) == 64
    last = changed(model).push_to_hub("me/mine", token=ALICE, max_shard_bytes=20_000)
    assert len(last.files) > 5  # shards of the other cut are gone, in the same commit
    same(load("me/mine").state_dict(), model.state_dict())
    changed(model).push_to_hub("me/mine", token=ALICE)
    assert {n for n in hub.tree("me/mine") if n.startswith("model")} == {"model.safetensors"}
    same(load("me/mine").state_dict(), model.state_dict())


def test_large_files_in_parts(hub, load):
    hub.multipart_over = 6_000_000
    try:
        config = CONFIGS["nat"].replace(embed_dim=256)
        model = natcupy.zoo.build_model(config)
        model.push_to_hub("me/mine", token=ALICE)
    finally:
        hub.multipart_over = 10_000_000
    assert len([path for path in asked(hub, "PUT") if path.count("/") == 4]) >= 2
    same(load("me/mine").state_dict(), model.state_dict())


# ---------------------------------------------------------------- checked before anything happens


@pytest.mark.parametrize("name", [
    "mine", "a/b/c", "me/", "/mine", "me/..", "me/a..b", "me/x--y", "me/x.git", "me/x-", "m e/x",
    "me/" + "x" * 97, "me/<b>", "me/x@main", "https://hub/me/x", None, 3,
])  # fmt: skip
def test_repository_names(hub, name):
    with pytest.raises(ValueError, match="owner/name"):
        invented("nat").push_to_hub(name, token=ALICE)
    assert hub.requests == []


@pytest.mark.parametrize("bad", [
    {"license": "MIT"}, {"license": "my-own"}, {"license": 3}, {"metrics": {"accuracy": 0.5}},
    {"metrics": {"accuracy": float("nan")}, "dataset": "cifar10"}, {"metrics": {"accuracy": "high"},
    "dataset": "cifar10"}, {"metrics": {"accuracy": True}, "dataset": "cifar10"},
    {"metrics": {"](http://x)": 1.0}, "dataset": "cifar10"}, {"metrics": "high"},
    {"metrics": [{"type": "accuracy", "value": 1, "dataset": "x", "extra": 1}]},
    {"metrics": [{"type": "accuracy", "value": 1, "dataset": "x", "name": "<b>"}]},
    {"metrics": [1.0]}, {"metrics": {"accuracy": 1.0}, "dataset": "a b"}, {"datasets": ["a/b/c"]},
    {"datasets": "cifar10"}, {"tags": ["A B"]}, {"tags": "nat"}, {"base_model": "x"},
    {"branch": "a..b"}, {"branch": "0" * 40}, {"branch": "-x"}, {"branch": "a", "revision": "b"},
    {"create_pr": True, "branch": "dev"}, {"parent_commit": "abc"}, {"private": "yes"},
    {"commit_message": "  "}, {"max_shard_bytes": 0}, {"max_shard_bytes": 1},
], ids=str)  # fmt: skip
def test_arguments_are_checked_first(hub, bad):
    config = CONFIGS["nat"].replace(depths=(60, 40)) if bad.get("max_shard_bytes") else None
    model = natcupy.zoo.build_model(config) if config else invented("nat")
    with pytest.raises(ValueError):
        model.push_to_hub("me/mine", token=ALICE, **bad)
    assert hub.requests == [] and not hub.repos


def test_models_are_checked_first(hub):
    model = invented("nat")
    model.head = torch.nn.Linear(16, 9)
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        model.push_to_hub("me/mine", token=ALICE)
    model = invented("nat")
    model.pretrained_cfg["crop_pct"] = 7
    with pytest.raises(ConfigError, match="crop_pct"):
        model.push_to_hub("me/mine", token=ALICE)
    model = invented("nat")
    model.pretrained_cfg["license"] = "MIT"
    with pytest.raises(ValueError, match="unknown to the Hub"):
        model.push_to_hub("me/mine", token=ALICE)
    assert hub.requests == []


def test_binding_licences_stay(hub):
    model = invented("nat")
    model.pretrained_cfg["license"] = "cc-by-nc-4.0"
    with pytest.raises(ValueError, match="keep that licence"):
        model.push_to_hub("me/mine", token=ALICE, license="mit")
    model.push_to_hub("me/mine", token=ALICE)
    assert b'license: "cc-by-nc-4.0"' in hub.tree("me/mine")["README.md"]


# ---------------------------------------------------------------- who may


def test_without_a_login(hub):
    with pytest.raises(BadToken, match="hf auth login"):
        invented("nat").push_to_hub("me/mine")
    assert hub.requests == []
    with pytest.raises(BadToken, match="did not accept"):
        invented("nat").push_to_hub("me/mine", token="hf_wrong")
    assert not hub.repos


def test_without_rights(hub):
    with pytest.raises(Forbidden, match="write rights"):
        invented("nat").push_to_hub("me/mine", token=BOB)
    assert not hub.repos
    invented("nat").push_to_hub("me/mine", token=ALICE)
    before = dict(hub.repos["me/mine"].refs)
    with pytest.raises(Forbidden, match="create_pr=True"):
        invented("nat", 1).push_to_hub("me/mine", token=BOB)
    assert hub.repos["me/mine"].refs == before


def test_private(hub, load):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE, private=True)
    assert hub.repos["me/mine"].private
    with pytest.raises(NotFound):
        load("me/mine")
    same(load("me/mine", token=ALICE).state_dict(), model.state_dict())
    changed(model).push_to_hub("me/mine", token=ALICE)  # stays what it is
    assert hub.repos["me/mine"].private
    for branch in ("main", "dev"):
        before = dict(hub.repos["me/mine"].refs)
        with pytest.raises(Conflict, match="is private"):
            changed(model).push_to_hub("me/mine", token=ALICE, private=False, branch=branch)
        assert hub.repos["me/mine"].refs == before
    with pytest.raises((Forbidden, NotFound)):
        model.push_to_hub("me/mine", token=BOB, create_pr=True)


# ---------------------------------------------------------------- branches, parents, pull requests


def test_branches_are_made(hub, load):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE, branch="dev/new")  # with the repository
    repo = hub.repos["me/mine"]
    assert set(hub.tree("me/mine")) == {".gitattributes"}
    same(load("me/mine@dev/new").state_dict(), model.state_dict())
    done = changed(model).push_to_hub("me/mine", token=ALICE, revision="v2")  # beside others
    assert done.branch == "v2" and repo.refs["v2"] == done.commit
    assert set(repo.refs) == {"main", "dev/new", "v2"}


def test_somebody_else_pushed_meanwhile(hub):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE)

    def other():
        hub.commit("me/mine", {"notes.txt": b"mine"})

    for where in (r"/preupload/", r"/commit/"):
        hub.fault(where, times=1, call=other)
        with pytest.raises(Conflict, match="run the same call again"):
            changed(model).push_to_hub("me/mine", token=ALICE)
        tree = hub.tree("me/mine")
        assert "notes.txt" in tree
    done = model.push_to_hub("me/mine", token=ALICE)
    assert done.files == ("model.safetensors",) and "notes.txt" in hub.tree("me/mine")


def test_a_parent_of_the_callers_own(hub):
    model = invented("nat")
    first = model.push_to_hub("me/mine", token=ALICE)
    second = changed(model).push_to_hub("me/mine", token=ALICE, parent_commit=first.commit)
    with pytest.raises(Conflict, match=f"is at {second.commit}"):
        changed(model).push_to_hub("me/mine", token=ALICE, parent_commit=first.commit)
    with pytest.raises(NotFound, match="Push without it first"):
        model.push_to_hub("me/new", token=ALICE, parent_commit=first.commit)
    assert "me/new" not in hub.repos


def test_pull_requests(hub, load):
    model = invented("nat")
    with pytest.raises(NotFound, match="Push without it first"):
        model.push_to_hub("me/mine", token=BOB, create_pr=True)
    first = model.push_to_hub("me/mine", token=ALICE)
    done = changed(model).push_to_hub("me/mine", token=BOB, create_pr=True)
    assert done.branch == "refs/pr/1" and done.pull_request.endswith("/me/mine/discussions/1")
    assert hub.repos["me/mine"].refs["main"] == first.commit
    same(load("me/mine@refs/pr/1").state_dict(), model.state_dict())
    again = model.push_to_hub("me/mine", token=BOB, create_pr=True)
    assert (again.files, again.branch, again.pull_request) == ((), "refs/pr/1", done.pull_request)
    other = changed(model).push_to_hub("me/mine", token=BOB, create_pr=True)
    assert other.branch == "refs/pr/2"
    more = changed(model).push_to_hub("me/mine", token=ALICE, branch="refs/pr/2")
    assert hub.repos["me/mine"].refs["refs/pr/2"] == more.commit
    with pytest.raises(RevisionNotFound):
        model.push_to_hub("me/mine", token=ALICE, branch="refs/pr/9")


def test_an_empty_pull_request_is_finished(hub):
    """The client opens it first where it uploads through Xet; a cut leaves it without a commit."""
    model = invented("nat")
    first = model.push_to_hub("me/mine", token=ALICE)
    repo = hub.repos["me/mine"]
    title = attempt.make_target("me/mine").message
    repo.requests.append({
        "num": 1, "title": title, "status": "draft", "isPullRequest": True,
        "author": {"name": "bob"}, "createdAt": "2026-01-01T00:00:00.000Z",
    })  # fmt: skip
    repo.refs["refs/pr/1"] = first.commit
    done = changed(model).push_to_hub("me/mine", token=BOB, create_pr=True)
    assert done.branch == "refs/pr/1" and repo.refs["refs/pr/1"] == done.commit
    assert len(repo.requests) == 1


# ---------------------------------------------------------------- the card


def test_an_edited_card_is_kept(hub, caplog):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE, license="mit")
    ours = hub.tree("me/mine")["README.md"]
    assert card.is_generated(ours.decode())
    edited = ours.replace(b"## Use", b"## How I use it")
    hub.commit("me/mine", {"README.md": edited})
    done = changed(model).push_to_hub("me/mine", token=ALICE, license="apache-2.0")
    assert "README.md" not in done.files and hub.tree("me/mine")["README.md"] == edited
    assert "keeps its edited README.md" in caplog.text
    done = model.push_to_hub("me/mine", token=ALICE, license="apache-2.0", overwrite_card=True)
    assert done.files == ("README.md",)
    assert b"apache-2.0" in hub.tree("me/mine")["README.md"]


def test_a_card_of_ones_own(hub):
    text = "---\nlicense: mit\n---\n# Mine\n"
    invented("nat").push_to_hub("me/mine", token=ALICE, card_text=text)
    assert hub.tree("me/mine")["README.md"] == text.encode()


def test_an_unedited_card_is_renewed_and_what_it_stated_goes_on(hub):
    model = invented("nat")
    model.push_to_hub(
        "me/mine", token=ALICE, license="mit", base_model="org/base", datasets=["a/b"],
        metrics={"accuracy": 0.5}, dataset="a/b", tags=["fine"],
    )  # fmt: skip
    first = card.stated(hub.tree("me/mine")["README.md"].decode())
    model.push_to_hub("me/mine", token=ALICE, tags=["finer"])
    renewed = card.stated(hub.tree("me/mine")["README.md"].decode())
    assert renewed["tags"][-1] == "finer"
    assert {**renewed, "tags": 0} == {**first, "tags": 0}
    changed(model).push_to_hub("me/mine", token=ALICE)  # other weights: their numbers are unknown
    last = card.stated(hub.tree("me/mine")["README.md"].decode())
    assert "model-index" not in last and last["base_model"] == "org/base"
    assert last["license"] == "mit" and last["datasets"] == ["a/b"]


def test_finetuned_models_name_their_base_and_licence(hub, load):
    base = invented("nat")
    base.push_to_hub("me/base", token=ALICE, license="cc-by-nc-sa-4.0")
    tuned = changed(load("me/base", num_classes=7))
    done = tuned.push_to_hub("me/tuned", token=ALICE)
    text = hub.tree("me/tuned")["README.md"].decode()
    meta = card.stated(text)
    assert meta["base_model"] == "me/base" and meta["license"] == "cc-by-nc-sa-4.0"
    assert tuned.source.commit in text and json.loads(hub.tree("me/tuned")["config.json"])
    again = load("me/tuned")
    assert again.pretrained_cfg["license"] == "cc-by-nc-sa-4.0" and again.num_classes == 7
    assert changed(again).push_to_hub("me/tuned", token=ALICE).commit != done.commit
    assert card.stated(hub.tree("me/tuned")["README.md"].decode())["base_model"] == "me/base"


# ---------------------------------------------------------------- a bad line


def test_passing_trouble_is_waited_out(hub):
    for number, where in enumerate(
        (
            r"/api/models/",
            r"/repos/create",
            r"/preupload/",
            r"/lfs/objects",
            r"/lfs/put",
            r"/commit/",
        )
    ):
        hub.fault(where, times=1, status=503)
        done = invented("nat").push_to_hub(f"me/m{number}", token=ALICE)
        assert hub.repos[done.repo].refs["main"] == done.commit


def test_without_network_it_fails_at_once(hub, no_sockets):
    from test_hub_cache import _close_connections

    _close_connections()
    with pytest.raises(Offline):
        invented("nat").push_to_hub("me/mine", token=ALICE)
    assert hub.pauses == []


def test_a_lost_answer_is_found_again(hub):
    """The commit is made, its answer is lost: the push finds it and makes no second one."""
    hub.fault(r"/commit/main", times=1, lost=True)
    done = invented("nat").push_to_hub("me/mine", token=ALICE)
    assert len(hub.repos["me/mine"].commits) == 2
    assert done.commit == hub.repos["me/mine"].refs["main"]


@pytest.mark.parametrize("how", ["drop", "lost"])
@pytest.mark.parametrize("case", ["new", "update", "branch", "shards", "request"])
def test_cut_at_every_request(hub, load, case, how, caplog):
    """The line dies at request n for good: the remote is as before or complete. Then again."""
    caplog.set_level(logging.CRITICAL)
    cuts, seen = cut_at_every_request(hub, load, case, how)
    assert cuts >= 5
    assert seen == ({"before", "after"} if how == "lost" else {"before"})


def test_nothing_is_left_on_disk(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    invented("nat").push_to_hub("me/mine", token=ALICE)
    hub.fault(r"/commit/", times=1000, status=500)
    with pytest.raises(Unavailable):
        invented("nat", 1).push_to_hub("me/mine", token=ALICE)
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_a_push(hub, capsys):
    """Nothing on stdout; the token nowhere."""
    secret = "hf_alice"
    done = invented("nat").push_to_hub("me/mine", token=secret)
    assert capsys.readouterr().out == "" and secret not in repr(done)
    assert isinstance(done, hub_package.Pushed)
