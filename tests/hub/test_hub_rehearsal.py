"""A push that changes nothing says what the push then does: the real client, a local Hub."""

import json

import pytest
import torch
from small import invented

from natcupy import hub as hub_package
from natcupy.cli import main
from natcupy.hub.errors import BadToken, Conflict, NotFound, RevisionNotFound

ALICE, BOB = "hf_alice", "hf_bob"
FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


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
    assert plan.repo == done.repo and plan.private == hub.repos[name].private
    assert (plan.pull_request is None) == (done.pull_request is None)
    tree = hub.repos[name].commits[done.commit]
    assert plan.files == {file: len(tree[file]) for file in plan.files}
    assert plan.card is None or tree["README.md"].decode() == plan.card
    return done


def test_of_a_new_repository(hub):
    plan = planned(hub, invented("nat"), license="mit", private=True, commit_message="Mine.")
    assert plan.makes == ("repository",) and plan.branch == "main" and not plan.deleted
    assert plan.private and plan.message == "Mine."
    assert set(plan.files) == FILES and 'license: "mit"' in plan.card
    carried_out(hub, invented("nat"), plan, license="mit", private=True)


def test_of_a_branch_that_is_new(hub):
    plan = planned(hub, invented("nat"), branch="dev")
    assert plan.makes == ("repository", "branch") and plan.branch == "dev"
    carried_out(hub, invented("nat"), plan, branch="dev")
    invented("nat").push_to_hub("me/mine", token=ALICE)
    model = changed(invented("nat"))
    plan = planned(hub, model, revision="v2")  # begins as main is
    assert plan.makes == ("branch",) and set(plan.files) == {"model.safetensors"}
    carried_out(hub, model, plan, revision="v2")


def test_of_what_changes(hub):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE)
    plan = planned(hub, model)
    assert plan.makes == () and plan.files == {} and plan.deleted == () and not plan.private
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
    model, how = changed(invented("nat")), {"token": BOB, "create_pr": True}
    plan = planned(hub, model, **how)
    assert plan.pull_request == "new" and plan.branch == "main" and plan.makes == ()
    done = carried_out(hub, model, plan, **how)
    plan = planned(hub, model, **how)  # all of it is in the one that is open
    assert plan.pull_request == done.pull_request and plan.files == {}
    assert carried_out(hub, model, plan, **how).commit == done.commit
    assert planned(hub, changed(model), **how).pull_request == "new"


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
    for token in (None, "hf_wrong"):  # also where nothing else would ask for it
        with pytest.raises(BadToken):
            planned(hub, model, token=token)
    first = model.push_to_hub("me/mine", token=ALICE, private=True)
    with pytest.raises(Conflict, match="is private"):
        planned(hub, changed(model), private=False)
    changed(model).push_to_hub("me/mine", token=ALICE)
    with pytest.raises(Conflict, match="somebody else pushed"):
        planned(hub, changed(model), parent_commit=first.commit)
    for name in ("me/mine", "me/other"):
        with pytest.raises(RevisionNotFound, match="create_pr"):
            planned(hub, model, name, branch="refs/pr/9")
    with pytest.raises(ValueError, match="owner/name"):
        planned(hub, model, "mine")
    with pytest.raises(TypeError, match=r"^got an unexpected keyword argument 'licence'"):
        planned(hub, model, licence="mit")


def test_a_login_that_is_none_is_told_where_all_can_be_read(hub):
    model = invented("nat")
    model.push_to_hub("me/mine", token=ALICE)
    with pytest.raises(BadToken):
        planned(hub, model, token="hf_wrong")


def test_an_answer_that_gets_lost_is_asked_for_again(hub, monkeypatch):
    monkeypatch.setattr("natcupy.hub.attempt.time.sleep", lambda seconds: None)
    invented("nat").push_to_hub("me/mine", token=ALICE)
    hub.fault("/api/models/me/mine", times=1, status=503)
    assert set(planned(hub, changed(invented("nat"))).files) == {"model.safetensors"}
    assert [fault.times for fault in hub.faults] == [0]


# ---------------------------------------------------------------- the command


@pytest.fixture
def say(hub, tmp_path, capsys, monkeypatch):
    """Alice's dry run of a folder: its lines as {name: value}, and what comes behind them."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", ALICE)
    folder = invented("nat").save_pretrained(tmp_path / "model")

    def say(*options):
        assert main(["push", str(folder), "me/mine", "--dry-run", *options]) == 0
        lines, _, card = capsys.readouterr().out.partition("\n\n")
        return dict(line.split("  ", 1) for line in lines.splitlines()), card

    return say


def stripped(lines):
    return {name: value.strip() for name, value in lines.items()}


def test_the_command(hub, say, capsys):
    lines, card = say("--license", "mit", "--private")
    lines = stripped(lines)
    assert lines["dry run"] == "nothing was changed" and lines["to"] == "me/mine (private)"
    assert lines["would make"] == "a private repository" and lines["branch"] == "main"
    assert "model.safetensors (" in lines["would write"] and 'license: "mit"' in card
    assert "me/mine" not in hub.repos
    invented("nat").push_to_hub("me/mine", token=ALICE, max_shard_bytes=2000)
    hub.commit("me/mine", {"README.md": b"# Mine\n"})
    lines, card = say("--revision", "dev")
    lines = stripped(lines)
    assert lines["would make"] == "the branch" and lines["to"] == "me/mine (public)"
    assert lines["would delete"].endswith("model.safetensors.index.json")
    assert lines["README.md"] == "the edited one on the Hub is kept" and card == ""
    assert stripped(say("--create-pr")[0])["pull request"] == "a new one"


def test_the_command_in_json(hub, tmp_path, capsys, monkeypatch, say):
    folder = invented("nat").save_pretrained(tmp_path / "other")
    assert main(["push", str(folder), "me/mine", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["makes"] == ["repository"] and found["private"] is False
    assert set(found["files"]) == FILES
