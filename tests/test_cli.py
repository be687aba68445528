"""The command `natcupy`: what it prints, and the exit status, for right and for wrong use."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

import natcupy
from natcupy import cache, cli
from natcupy.cli import demo, doctor, main, pictures
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


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder, without a Hub; gives (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("NATCUPY_DEBUG", raising=False)

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def digits(tmp_path):
    """A folder with three digits, one of them a level down, and a file that is no picture."""
    folder = tmp_path / "digits"
    (folder / "more").mkdir(parents=True)
    for digit, name in ((4, "a.png"), (7, "b.jpg"), (2, "more/c.PNG")):
        sheet = Image.new("RGB", (90, 120), "white")
        pen = ImageDraw.Draw(sheet)
        pen.text((20, 10), str(digit), "black", ImageFont.load_default(80))
        sheet.save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "paper.pdf").write_text("what Pillow can write but not read")
    (folder / ".hidden.png").write_text("")
    return folder


def one_error_line(stderr):
    assert stderr.startswith("natcupy: error: ") and stderr.count("\n") == 1, stderr
    return stderr


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


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m natcupy models | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("name") and done.stderr == ""


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


# -- classify -------------------------------------------------------------------------------------


def test_classify_prints_a_table(run, digits):
    status, out, err = run("classify", digits / "a.png")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0].split() == ["file", "answer", "confidence", "next"]
    assert lines[2].split()[:2] == [str(digits / "a.png"), "4"]
    assert "nat-digits is the default" in out and "backend" in out


def test_classify_takes_folders_and_gives_json(run, digits):
    more = ("--topk", "3", "--batch-size", "2", "--device", "cpu")
    status, out, err = run("classify", digits, "--json", *more)
    found = json.loads(out)
    assert (status, err, found["model"], found["device"]) == (0, "", "nat-digits", "cpu")
    names = [Path(result["file"]).name for result in found["results"]]
    assert names == ["a.png", "b.jpg", "c.PNG"]
    for result, label in zip(found["results"], "472", strict=True):
        chances = [answer["probability"] for answer in result["answers"]]
        assert result["answers"][0]["label"] == label == str(result["answers"][0]["index"])
        assert len(chances) == 3 and chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1 and result["seconds"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode elsewhere")
@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii"])
def test_names_that_are_no_text_are_printed(digits, encoding):
    name = os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    (digits / "a.png").rename(digits / name)
    command = [sys.executable, "-m", "natcupy", "classify", str(digits)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = subprocess.run([*command, "--json"], capture_output=True, env=environment, check=True)
    files = [found["file"] for found in json.loads(done.stdout.decode())["results"]]
    assert str(digits / name) in files
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert len(done.stdout.decode().splitlines()) == 8


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix closes the streams")
def test_closed_streams_are_no_error():
    command = f"{sys.executable} -m natcupy models >&- 2>&-"
    assert subprocess.run(command, shell=True, check=False).returncode == 0


def test_all_classes_sum_to_one(run, digits):
    _, out, _ = run("classify", digits / "a.png", "--json", "--topk", "99")
    answers = json.loads(out)["results"][0]["answers"]
    assert len(answers) == 10
    assert abs(sum(answer["probability"] for answer in answers) - 1) < 1e-5


def test_bad_files_are_named_and_the_others_answered(run, digits, tmp_path):
    (tmp_path / "empty.png").touch()
    Image.new("L", (30, 30), 128).save(tmp_path / "blank.png")
    cut = (digits / "a.png").read_bytes()[:60]
    (tmp_path / "cut.png").write_bytes(cut)
    bad = (
        "empty.png",
        "blank.png",
        "cut.png",
        digits / "notes.txt",
        "missing.png",
        digits / "a.png",
    )
    status, out, err = run("classify", *bad)
    lines = err.splitlines()
    assert status == 1 and len(lines) == 5
    for line, name in zip(lines, bad, strict=False):
        assert line.startswith(f"natcupy: error: {name}: ") and len(line) < 300
    assert "no such file" in lines[4] and "something drawn" in lines[1]
    assert f"{digits / 'a.png'}" in out and " 4 " in out
    status, out, _ = run("classify", *bad, "--json")
    results = json.loads(out)["results"]
    assert status == 1 and [("error" in result) for result in results] == [True] * 5 + [False]


def test_classify_with_a_saved_model_without_names(run, digits, tmp_path):
    numbers = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 3}
    model = natcupy.create_model("nat-mini", **numbers)
    natcupy.save_pretrained(model, tmp_path / "small")
    status, out, _ = run("classify", digits / "a.png", "--model", tmp_path / "small", "--json")
    answers = json.loads(out)["results"][0]["answers"]
    assert status == 0 and {a["label"] for a in answers} == {"class 0", "class 1", "class 2"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nat-tny"), "nat-tiny"),
        (("--model", "./no-such-folder"), "no-such-folder"),
        (("--device", "gpu9"), "--device"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, digits, arguments, words):
    status, out, err = run("classify", digits / "a.png", *arguments)
    assert (status, out) == (1, "") and words in one_error_line(err)


@pytest.mark.parametrize("model", ["nat-tiny", "somebody/else"])
def test_offline_and_not_in_the_cache(digits, tmp_path, model):
    """In a process of its own: the Hub client reads its environment once, at import."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "natcupy", "classify", str(digits / "a.png"), "--model", model],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, **offline},
    )
    assert (done.returncode, done.stdout) == (1, "")
    line = one_error_line(done.stderr)
    assert "not in the cache" in line and "natcupy demo" in line


def test_a_folder_without_pictures(run, tmp_path):
    (tmp_path / "none").mkdir()
    status, _, err = run("classify", "none")
    assert status == 1 and "must hold pictures" in one_error_line(err)


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("NATCUPY_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("classify", "x.png", "--model", "nat-tny")


# -- demo -----------------------------------------------------------------------------------------


def test_the_demo_shows_what_it_does(run):
    status, out, err = run("demo", "--device", "cpu")
    assert (status, err) == (0, "")
    assert "12 of 12 right" in out and "no network was used" in out and "on cpu, backend" in out
    rows = [line.split() for line in out.splitlines() if line.endswith("right")]
    assert len(rows) == 12
    assert all(row[0][0] == row[1] == row[2] for row in rows)


def test_a_wrong_answer_is_told_and_counts(run, monkeypatch, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("2-plotter.png", "5-plotter.png"):
        (tmp_path / "pictures" / name).write_bytes((demo.SAMPLES / "2-plotter.png").read_bytes())
    monkeypatch.setattr(demo, "SAMPLES", tmp_path / "pictures")
    status, out, _ = run("demo")
    assert status == 1 and "1 of 2 right" in out and "WRONG" in out


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
    assert found["weights"]["licence"] == "mit" and found["published"]["top1"] == 83.2
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


# -- train-digits ---------------------------------------------------------------------------------


def test_train_digits_makes_a_model(run, tmp_path, monkeypatch):
    """From pictures to card; the examination with few pictures of each kind."""
    pytest.importorskip("sklearn", reason="the scans ship with scikit-learn")
    pytest.importorskip("matplotlib", reason="the fonts ship with matplotlib")
    from natcupy.digits import datasets, training

    few = datasets.examinations.__wrapped__(per_digit=2)
    monkeypatch.setattr(training, "examinations", lambda: few)
    status, out, err = run("train-digits", "--output", "made", "--pictures", 64, "--epochs", 1)
    assert status == 0, err
    assert "scikit-learn digits" in out
    model = natcupy.from_pretrained(tmp_path / "made")
    assert model.config == natcupy.from_pretrained("nat-digits").config
    assert "64 pictures drawn" in (tmp_path / "made" / "README.md").read_text()


def test_train_digits_refuses_an_output_that_cannot_be(run, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = run("train-digits", "--output", "file", "--pictures", 10**9)
    assert status == 1
    one_error_line(err)


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


# ---------------------------------------------------------------- odd machines


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("models",), ("--version",)])
def test_an_output_that_is_full(run, monkeypatch, capsys, arguments):
    """The device is named by what it is to the user, since the system's error has no file."""
    full = os.open("/dev/full", os.O_WRONLY)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(full, "w", buffering=1))
        assert main(arguments) == 1
    assert capsys.readouterr().err == "natcupy: error: standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "this needs more memory than there is"),
        (MemoryError("Unable to allocate 3 GiB"), "Unable to allocate 3 GiB"),
        (cache.CacheWarning("kept in memory,\nbecause"), "kept in memory, because"),
        (OSError(28, "No space left on device", "x.png"), "x.png: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (BlockingIOError(11, "Try again"), "no process can be started (Try again); try --workers"),
    ],
)
def test_errors_of_the_machine_are_one_line(run, monkeypatch, error, text):
    def fails(arguments):
        raise error

    monkeypatch.setattr("natcupy.cli.models.run", fails)
    status, _, err = run("models")
    assert status == 1 and err.startswith(f"natcupy: error: {text}") and err.count("\n") == 1


def test_own_warnings_are_one_line():
    told = cli._format_warning(cache.CacheWarning("a\nb"), cache.CacheWarning, "cache.py", 3)
    assert told == "natcupy: warning: a b\n"
    usual, other = warnings.formatwarning, ("x", UserWarning, "other.py", 3)
    assert cli._format_warning(*other) == usual(*other)
    assert main(["--version"]) == 0 and warnings.formatwarning is usual


def test_doctor_without_a_home(monkeypatch):
    def unreadable(access):
        raise PermissionError(13, "Permission denied", "/home/someone/token")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~no-such-user/hub")
    monkeypatch.setattr("natcupy.hub.client.has_login", unreadable)
    found = doctor._hub()
    assert (found["cache"], found["cache_exists"], found["token"]) == (None, False, None)
    home, token = found["problems"]
    assert "~no-such-user/hub, and this user has no home folder. Set HF_HOME" in home
    assert token == "the token cannot be read: /home/someone/token: Permission denied"


def test_what_cannot_be_looked_at_stops_no_other_picture(run, digits):
    (digits / "circle.png").symlink_to("circle.png")
    status, out, err = run("classify", digits, "--json")
    assert status == 1 and err.startswith(f"natcupy: error: {digits / 'circle.png'}: ")
    assert sum("answers" in result for result in json.loads(out)["results"]) == 3


def test_a_picture_that_cannot_be_saved(tmp_path):
    """The error names the place that was asked for, and nothing is left."""

    class Full:
        def save(self, path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        pictures.save(Full(), tmp_path / "out.png")
    assert caught.value.filename == str(tmp_path / "out.png") and not list(tmp_path.iterdir())


def test_a_result_that_cannot_be_written_is_told_by_its_own_name(digits):
    def work(number, pixels):
        raise OSError(28, "No space left on device", "out.png")

    (record,) = pictures.each([digits / "a.png"], 1, work)
    assert record == {"file": str(digits / "a.png"), "error": "out.png: No space left on device"}


def test_two_processes_save_one_picture(tmp_path):
    """What one of them writes meanwhile is not the other's."""

    class Slow:
        def save(self, path):
            Image.new("L", (3, 3)).save(path)
            pictures.save(Image.new("L", (2, 2)), tmp_path / "out.png")

    pictures.save(Slow(), tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (3, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_that_is_ended_tidies_up(run, monkeypatch, name):
    number, tidied = getattr(signal, name), []

    def working(arguments):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            tidied.append(True)

    monkeypatch.setattr("natcupy.cli.models.run", working)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert run("models") == (128 + number, "", "natcupy: stopped\n")
        assert tidied and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
