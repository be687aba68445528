"""The command `natcupy`: what it prints, and the exit status, for right and for wrong use."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import one_error_line

import natcupy
from natcupy import cache
from natcupy.cli import main
from natcupy.cli.console import blocks, facts, table
from natcupy.cli.parser import build_parser
from natcupy.cuda import tuning
from natcupy.zoo import TASKS
from natcupy.zoo.dense import DENSE_PUBLISHED

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "demo",
    "classify",
    "segment",
    "detect",
    "attend",
    "models",
    "info",
    "doctor",
    "train-digits",
)


# -- as processes ---------------------------------------------------------------------------------


def process(*arguments, code=None):
    command = [sys.executable, "-m", "natcupy", *arguments]
    if code is not None:
        command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_version():
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"natcupy {natcupy.__version__}\n",
        "",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["clasify", "a.png"], "natcupy: error: no command 'clasify'; did you mean classify?"),
        (["zzz"], "no command 'zzz'; there are demo, classify,"),
        (["classify", "a.png", "--modle", "x"], "natcupy classify: error: unrecognized arguments: "
         "--modle x; did you mean --model?"),
        (["classify", "a.png", "--zzz"], "classify: error: unrecognized arguments: --zzz\n"),
        (["classify", "a.png", "--modle=x"], "arguments: --modle=x; did you mean --model?"),
        (["push", "m", "a/b", "c", "--dryrun"], "arguments: c --dryrun; did you mean --dry-run?"),
        (["segment", "a.png", "--modle", "x"], "required: --model; did you mean --model?"),
        (["predict", "a", "--outt", "x.csv"], "required: --out; did you mean --out?"),
        (["finetune", "d", "--resume", "runs/k"], "arguments: runs/k; --resume takes no value\n"),
        (["finetune", "d", "--epcohs", "3"], "usage: natcupy finetune ... (natcupy finetune --hel"),
        (["attend", "a.png", "output.png"], "unrecognized arguments: output.png\n"),
        (["classify", "--topk", "0", "a.png"], "must be at least 1, got 0\n"),
        (["--zzz", "demo"], "natcupy: error: unrecognized arguments: --zzz"),
    ],
)  # fmt: skip
def test_what_is_misspelt_is_said_with_what_looks_like_it(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\n"
        "from natcupy.cli import main\n"
        "status = main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules)\n"
        "print('status', status, 'heavy', sorted(heavy))\n"
    )
    done = process(code=code)
    assert done.stdout.endswith("status 0 heavy []\n"), done.stdout + done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_the_demo_runs_as_a_process():
    done = process("demo", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["right"] == len(found["results"]) == 12


# -- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and f"natcupy {command}" in out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("classify",),
        ("classify", "x.png", "--topk", "0"),
        ("classify", "x.png", "--topk", "many"),
        ("classify", "x.png", "--batch-size", "-1"),
        ("attend", "x.png", "--query", "1"),
        ("attend", "x.png", "--query", "2,0"),
        ("attend", "x.png", "--query", "nan,0"),
        ("info",),
        ("segment", "x.png"),
        ("detect", "x.png", "--model", "y", "--score-threshold", "2"),
        ("train-digits",),
    ],
)
def test_wrong_usage_is_status_2(run, arguments):
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and "error: " in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("classify", "x.png", "--model", ""),
        ("segment", "x.png", "--model", "m", "--labels", ""),
        ("finetune", "data", "--model", "nat-tiny", "--output", ""),
        ("info", " "),
        ("pull", ""),
        ("pull", "nat-tiny", ""),
        ("push", "", "me/x"),
        ("convert", "", "out"),
        ("convert", "nat-digits", ""),
        ("verify", ""),
        ("finetune", "", "--model", "nat-tiny", "--output", "o"),
        ("finetune", "d", "--model", "nat-tiny", "--output", "o", "--val", ""),
        ("finetune", "d", "--model", "nat-tiny", "--output", "o", "--images", ""),
        ("finetune", "d", "--model", "nat-tiny", "--output", "o", "--val-images", " "),
        ("finetune", "d", "--model", "nat-tiny", "--output", "o", "--push", ""),
        ("evaluate", ""),
        ("evaluate", "d", "--class-map", ""),
        ("predict", "x.png", "", "--out", "p.csv"),
        ("classify", ""),
        ("detect", "x.png", " ", "--model", "m"),
        ("attend", ""),
        ("push", "m", ""),
        ("verify", "m", "--against", ""),
        ("pull", "nat-tiny", "--cache-dir", ""),
        ("publish", "", "--org", "me"),
        ("publish", "nat-tiny", "--org", ""),
        ("publish", "nat-tiny", "--org", "me", "--originals", ""),
    ],
)
def test_a_variable_of_the_shell_that_is_not_set(run, tmp_path, arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "") and "must be a name or a path" in one_error_line(err)
    assert not any(tmp_path.iterdir())


# -- models, info ---------------------------------------------------------------------------------


def test_models_lists_all_and_filters(run):
    status, out, _ = run("models", "--json")
    names = [row["name"] for row in json.loads(out)]
    assert status == 0 and names[0] == "nat-digits"
    every = [n for task in TASKS for n in natcupy.list_models(task=task)]
    assert len(names) == len(set(names)) == 1 + len(every) == 60
    status, out, _ = run("models", "DINAT_s*")
    rows = out.splitlines()[2:]
    assert status == 0 and len(rows) == len(natcupy.list_models("dinat_s*"))
    assert all(row.startswith("dinat-s") for row in rows)
    _, out, _ = run("models", "nat-tiny")
    assert "83.2 %" in out and "shi-labs/nat-tiny-in1k-224" in out and "mit" in out


def test_models_without_a_match_names_the_nearest(run):
    status, _, err = run("models", "nat-tny")
    assert status == 1 and "nat-tiny" in one_error_line(err)


@pytest.mark.parametrize("name", DENSE_PUBLISHED)
def test_models_lists_the_papers_numbers(name):
    from natcupy.cli.models import record

    row, printed = record(name.replace("_", "-")), DENSE_PUBLISHED[name]
    assert (row["parameters_millions"], row["gmacs"]) == (printed.params, printed.gmacs)
    assert tuple(row["scores"].values()) == printed.scores and row["licence"] == "mit"


def test_info_of_segmentation_and_detection_models(run):
    status, out, err = run("info", "upernet-nat-mini", "--json")
    found = json.loads(out)
    assert (status, err, round(found["parameters"] / 1e6, 2)) == (0, "", 49.78)
    assert round(found["macs"]["papers"] / 1e9) == found["published"]["gmacs"] == 900
    assert found["weights"]["file"].endswith("SEG/nat_mini_upernet.pth")
    status, out, _ = run("info", "mask_rcnn_dinat_s_tiny")
    assert status == 0 and "48 M parameters, 263 GMACs, box AP 46.6, mask AP 42.1" in out
    assert "1, 28; 1, 14" in out and "maskrcnn_dinat_s_tiny.pth" in out
    status, out, _ = run("models", "cascade*")
    assert status == 0 and len(out.splitlines()) == 2 + 13 and "mask AP" in out


def test_info_of_a_released_model_needs_no_network(run):
    status, out, err = run("info", "nat_tiny", "--json")
    found = json.loads(out)
    assert (status, err, found["parameters"]) == (0, "", 27_901_582)
    assert round(found["macs"]["papers"] / 1e9, 1) == float(found["published"]["gmacs"]) == 4.3
    assert found["weights"]["repo"] == "shi-labs/nat-tiny-in1k-224"
    assert json.loads(run("info", " NAT-Tiny", "--json")[1]) == found
    assert found["weights"]["licence"] == "mit" and found["published"]["top1"] == 83.2
    _, out, _ = run("info", "nat-tiny")
    assert "size         112 MB\n" in out and "nat_tiny.pth" not in out
    _, out, _ = run("info", "dinat-s-tiny")
    assert re.search(r"^file +https://.*/dinat_s_tiny_in1k_224\.pth$", out, re.MULTILINE)
    status, out, _ = run("info", "dinat-large")
    assert status == 0 and "note:" in out and "dilations" in out and "30.6 GMACs" in out


def test_info_of_the_bundled_model(run):
    model = natcupy.from_pretrained("nat-digits")
    status, out, _ = run("info", "nat-digits", "--json")
    found = json.loads(out)
    assert status == 0 and found["config"] == model.config.to_dict()
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["macs"]["at"] == [32, 32] and found["weights"]["licence"] == "mit"
    assert found["weights"]["sha256"] == model.source.sha256
    assert run("info", "nat-digits")[0] == 0


def test_info_of_nothing(run):
    status, _, err = run("info", "dinat-lrge")
    assert status == 1 and "dinat-large" in one_error_line(err)


# -- doctor ---------------------------------------------------------------------------------------


def test_doctor_checks_every_backend(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_neverprintthis")
    status, out, err = run("doctor", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and "neverprintthis" not in out
    assert found["hub"]["token"] is True and "nat-digits" in found["hub"]["bundled_models"]
    assert found["versions"]["torch"] and found["versions"]["natcupy"] == natcupy.__version__
    on_cpu = {b["backend"]: b for b in found["backends"] if b["device"] == "cpu"}
    assert on_cpu["torch"]["why_not"] is None and on_cpu["torch"]["error"] < 1e-5
    for record in on_cpu.values():
        assert (record["why_not"] is None) == (record["error"] is not None)
    assert found["chosen"]["cpu"] in on_cpu
    status, out, _ = run("doctor")
    assert status == 0 and "torch on cpu" in out and "Hub token" in out


def test_doctor_shows_measured_choices_and_forgets_them(run, monkeypatch, tmp_path):
    pytest.importorskip("cupy", reason="choices are bound to the compiler, which comes with CuPy")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    told = tuning.ingredients("a GPU", "90a", "forward, F16")
    record = b'{"choice": ["small", 7, 8, 1, 1], "seconds": 4e-5, "default": 5e-5}'
    cache.default_store().get_or_build(told, lambda: record)
    _, out, _ = run("doctor")
    assert "small 7 8 1 1 for forward, F16: 40.0 us, by the table 50.0 us" in out
    status, out, _ = run("doctor", "--json", "--forget-choices")
    assert status == 0 and json.loads(out)["choices"] == {"mode": "use", "measured": []}


def test_doctor_tells_of_a_backend_that_is_wrong(run, monkeypatch):
    from natcupy import reference

    right = reference.attention

    def wrong(*given):
        out, lse = right(*given)
        return out + 0.01, lse

    monkeypatch.setattr(reference, "attention", wrong)
    status, out, _ = run("doctor")
    lines = [line for line in out.splitlines() if line.startswith("  torch on cpu")]
    assert status == 1 and len(lines) == 1 and "WRONG" in lines[0]


# -- printing -------------------------------------------------------------------------------------


def test_tables_align():
    text = table(("name", "n"), [("a", "5 %"), ("long", "12 %")])
    assert text == "name     n\n----  ----\na      5 %\nlong  12 %"
    assert facts([("a", 1), ("long", "")]) == "a     1\nlong"


def test_blocks_show_two_rows_of_pixels_a_line():
    import numpy as np

    picture = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]])
    assert [line.translate(str.maketrans("':#", "▀▄█")) for line in blocks(picture)] == [
        "▀▄█ ",
        "▀▀  ",
    ]


def test_the_parser_names_rooms_that_exist():
    for command in COMMANDS:
        needed = {"classify": ["x"], "attend": ["x"], "info": ["x"], "train-digits": ["--output=x"]}
        needed |= {name: ["x", "--model=y"] for name in ("segment", "detect")}
        room = build_parser().parse_args([command, *needed.get(command, [])]).room
        assert (ROOT / "natcupy" / "cli" / f"{room}.py").is_file()


def test_stopping_a_command_while_it_is_imported(capsys, monkeypatch):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("natcupy.cli.import_module", stopped)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "natcupy: stopped\n"
