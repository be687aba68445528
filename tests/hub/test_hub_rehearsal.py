"""A push that changes nothing says what the push then does: the real client, a local Hub."""

import json

import pytest
import torch
from small import invented

from natcupy import hub as hub_package
from natcupy.cli import main
from natcupy.hub.errors import BadToken, Conflict, NotFound, RevisionNotFound

ALICE, BOB = "hf_alice", "hf_bob"


def changed(model):
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return model


def state_of(hub):
    return {
        name: (dict(repo.refs), len(repo.commits), repo.private) for name, repo in hub.repos.items()
    }, set(hub.blobs)


def planned(hub, model, name="me/mine", token=ALICE, **options):
    """The plan, made without a trace."""
    before = state_of(hub)
    del hub.requests[:]
    plan = hub_package.plan_push(model, name, token=token, **options)
    assert state_of(hub) == before and {sent for sent, *_ in hub.requests} <= {"GET", "HEAD"}
    return plan


def carried_out(hub, model, plan, name="me/mine", token=ALICE, **options):
    """The plan's own push does what it said."""
    done = model.push_to_hub(name, token=token, **options)
    assert set(done.files) == {*plan.files, *plan.deleted}
    assert plan.repo == done.repo and plan.pull_request == (done.pull_request is not None)
    tree = hub.repos[name].commits[done.commit]
    assert plan.files == {file: len(tree[file]) for file in plan.files}
    assert plan.card is None or tree["README.md"].decode() == plan.card
    return done


def test_of_a_new_repository(hub):
    plan = planned(hub, invented("nat"), license="mit", private=True)
    assert plan.makes == ("repository",) and plan.branch == "main" and not plan.deleted
    assert set(plan.files) == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    assert 'license: "mit"' in plan.card
    carried_out(hub, invented("nat"), plan, license="mit", private=True)


def test_of_a_branch_that_is_new_too(hub):
    plan = planned(hub, invented("nat"), branch="dev")
    assert plan.makes == ("repository", "branch") and plan.branch == "dev"
    carried_out(hub, invented("nat"), plan, branch="dev")
    plan = planned(hub, invented("nat"), revision="v2")
    assert plan.makes == ("branch",)
    carried_out(hub, invented("nat"), plan, revision="v2")


def test_of_what_changes(hub):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE)
    plan = planned(hub, model)
    assert plan.makes == () and plan.files == {} == dict.fromkeys(plan.deleted)
    plan = planned(hub, model, tags=["fine"])
    assert list(plan.files) == ["README.md"]
    carried_out(hub, model, plan, tags=["fine"])
    plan = planned(hub, model, max_shard_bytes=2000)
    assert plan.deleted == ("model.safetensors",) and len(plan.files) > 3
    carried_out(hub, model, plan, max_shard_bytes=2000)


def test_of_a_pull_request(hub):
    with pytest.raises(NotFound, match="does not exist"):
        planned(hub, invented("nat"), create_pr=True)
    invented("nat").push_to_hub("me/mine", token=ALICE)
    model = changed(invented("nat"))
    plan = planned(hub, model, token=BOB, create_pr=True)
    assert plan.pull_request and plan.branch == "main" and plan.makes == ()
    carried_out(hub, model, plan, token=BOB, create_pr=True)


def test_an_edited_card_is_kept(hub):
    invented("nat").push_to_hub("me/mine", token=ALICE)
    hub.commit("me/mine", {"README.md": b"# Mine\n"})
    model = changed(invented("nat"))
    plan = planned(hub, model)
    assert plan.card is None and set(plan.files) == {"model.safetensors"}
    plan = planned(hub, model, overwrite_card=True)
    assert plan.card.startswith("---") and "README.md" in plan.files


def test_what_would_fail_fails(hub):
    model = invented("nat")
    first = model.push_to_hub("me/mine", token=ALICE, private=True)
    for token in (None, "hf_wrong"):
        with pytest.raises(BadToken):
            planned(hub, model, token=token)
    with pytest.raises(Conflict, match="is private"):
        planned(hub, changed(model), private=False)
    changed(model).push_to_hub("me/mine", token=ALICE)
    with pytest.raises(Conflict, match="somebody else pushed"):
        planned(hub, changed(model), parent_commit=first.commit)
    with pytest.raises(RevisionNotFound, match="create_pr"):
        planned(hub, model, branch="refs/pr/9")
    with pytest.raises(RevisionNotFound, match="create_pr"):
        planned(hub, model, "me/other", branch="refs/pr/9")
    with pytest.raises(ValueError, match="owner/name"):
        planned(hub, model, "mine")
    with pytest.raises(TypeError, match="licence"):
        planned(hub, model, licence="mit")


def test_the_command(hub, tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", ALICE)
    folder = invented("nat").save_pretrained(tmp_path / "model")
    words = ["push", str(folder), "me/mine", "--license", "mit", "--dry-run"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["makes"] == ["repository"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "nothing was changed" in printed and "would make   repository\n" in printed
    assert "model.safetensors (" in printed and 'license: "mit"' in printed
    assert "me/mine" not in hub.repos
