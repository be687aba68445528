"""natcupy.data: what is found, in which order, how it is split, and every refusal."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import natcupy
from natcupy.data import DataError, Pictures, files, find, find_split, list_pictures, workers
from natcupy.data.files import Names
from natcupy.zoo.preprocess import Preprocess, open_picture
from tests.pictures import broken, class_folders, kinds, noise

RECIPE = Preprocess((3, 8, 8))


def keys(source):
    return [source.key(index) for index in range(len(source))]


# -- listing --------------------------------------------------------------------------------------


def test_names_are_a_list_in_one_piece():
    names = ["a/b.png", "", "ü/日本.png", os.fsdecode(b"\xff\xfe.png")]
    held = pickle.loads(pickle.dumps(Names(names)))
    assert list(held) == names and held[-1] == names[-1] and len(held) == 4
    with pytest.raises(IndexError):
        held[4]
    assert list(Names([])) == []


def test_listing_is_sorted_and_leaves_out_what_is_hidden(tmp_path):
    for name in ("b.png", "a.JPG", "B.png", "z/1.png", "c/2.png", ".h.png", ".dir/x.png", "n.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise(0).save(tmp_path / name, format="PNG")
    assert list_pictures(tmp_path) == ["B.png", "a.JPG", "b.png", "c/2.png", "z/1.png"]


def test_links_are_followed_and_loops_end(tmp_path):
    class_folders(tmp_path / "data", {"cat": 2, "dog": 1})
    class_folders(tmp_path, {"elsewhere": 2})
    (tmp_path / "data" / "owl").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "self").symlink_to(tmp_path / "data" / "cat")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dog" / "two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "dog" / "two-again").symlink_to(tmp_path / "elsewhere")
    source = find_split(tmp_path / "data").source
    assert source.counts().tolist() == [2, 3, 2]
    assert len(list_pictures(tmp_path / "data")) == 5  # elsewhere is listed once


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    class_folders(tmp_path, {"cat": 1, "dog": 1})
    real = os.scandir

    def closed(path):
        if os.fspath(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    problems = []
    assert list_pictures(tmp_path, problems) == ["dog/000.png"]
    assert problems == [("cat", "Permission denied")]
    with pytest.raises(DataError, match=r"cat cannot be listed: Permission denied"):
        find(tmp_path)


def test_the_longest_path_there_can_be(tmp_path):
    """4,095 bytes is the most that Linux opens; deeper files are told, not lost."""
    here, depth = os.getcwd(), 0
    longest = 4095
    try:
        os.chdir(tmp_path)
        length = len(os.fsencode(tmp_path))
        while length + 2 * 201 + len("/x.png") <= longest:
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
            length, depth = length + 201, depth + 1
        name = "x" * (longest - length - len("/.png")) + ".png"
        if len(name) > 255:
            os.mkdir("e" * 200)
            os.chdir("e" * 200)
            name = name[201:]
        noise(1).save(name)
        os.mkdir("f" * 250)
        os.chdir("f" * 250)
        noise(2).save("x" * 200 + ".png")
    finally:
        os.chdir(here)
    problems = []
    (found,) = list_pictures(tmp_path, problems)
    path = os.path.join(tmp_path, found)
    assert len(os.fsencode(path)) == longest
    assert open_picture(path).size == (12, 10)
    assert len(problems) <= 1 and all(reason == "File name too long" for _, reason in problems)


# -- opening --------------------------------------------------------------------------------------


def test_every_kind_of_picture_opens(tmp_path):
    expected = kinds(tmp_path / "all")
    source = find_split(tmp_path).source
    assert len(source) == len(expected)
    for index in range(len(source)):
        picture = source.picture(index)
        wanted = expected[os.path.basename(source.key(index))]
        assert picture.mode == wanted.mode, source.key(index)
        assert np.array_equal(np.asarray(picture), np.asarray(wanted)), source.key(index)


def test_a_recipe_and_the_plain_picture_agree(tmp_path):
    kinds(tmp_path / "all")
    source = find_split(tmp_path).source
    ready = Pictures(source, RECIPE)
    for index in range(len(source)):
        by_path, label = RECIPE(source.where(index))[0], 0
        assert torch.equal(ready[index][0], by_path) and ready[index][1] == label
        if "16-bit" not in source.key(index):  # whose resizing is not rounded to bytes on the way
            assert torch.equal(RECIPE(source.picture(index))[0], by_path)


def test_broken_files_say_which_and_why(tmp_path):
    reasons = broken(tmp_path / "all")
    source = find_split(tmp_path).source
    assert sorted(reasons) == sorted(os.path.basename(key) for key in keys(source))
    for index in range(len(source)):
        reason = reasons[os.path.basename(source.key(index))]
        for get in (source.open, source.picture, Pictures(source, RECIPE).__getitem__):
            with pytest.raises(DataError) as error:
                get(index)
            said = str(error.value)
            assert said.count(source.where(index)) == 1 and reason in said and ".." not in said


def test_a_models_own_preparation_names_a_broken_file(tmp_path):
    model = natcupy.from_pretrained("nat-digits")
    for name, reason in broken(tmp_path / "all").items():
        path = tmp_path / "all" / name
        with pytest.raises(OSError, match=r".") as error:
            model.preprocess(path)
        assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)
        copied = pickle.loads(pickle.dumps(error.value))  # on its way from a worker
        assert str(copied) == str(error.value)


class _Prepared(torch.utils.data.Dataset):
    """A user's own data set, which knows nothing of `DataError`."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return open_picture(self.path).size


@pytest.mark.parametrize("name", ["truncated.jpg", "empty.png"])
def test_a_broken_file_is_named_from_a_worker(tmp_path, name):
    reason = broken(tmp_path)[name]
    with pytest.raises(OSError, match=re.escape(str(tmp_path / name)) + ".*" + reason):
        next(iter(DataLoader(_Prepared(tmp_path / name), num_workers=1)))


@pytest.mark.parametrize("error", [TimeoutError("30 s are over"), MemoryError("no more")])
def test_what_is_not_the_pictures_fault_stays(tmp_path, monkeypatch, error):
    noise(1, (8, 8)).save(tmp_path / "a.png")

    def fail(image):
        raise error

    monkeypatch.setattr("natcupy.zoo.preprocess._upright", fail)
    with pytest.raises(type(error)) as caught:
        open_picture(tmp_path / "a.png")
    assert caught.value is error


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    noise(1, (8, 8)).save(tmp_path / "a.png")

    def fail(image):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("natcupy.zoo.preprocess._upright", fail)
    with pytest.raises(OSError, match=r"a\.png: Input/output error") as caught:
        open_picture(tmp_path / "a.png")
    assert caught.value.errno == 5


def test_a_blank_drawing_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "a" / "blank.png")
    ready = Pictures(find_split(tmp_path).source, Preprocess((1, 8, 8), crop_mode="ink"))
    with pytest.raises(DataError, match=r"blank\.png"):
        ready[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same(tmp_path, workers):
    source = find_split(class_folders(tmp_path, {"cat": 5, "dog": 4})).source
    loader = DataLoader(Pictures(source, RECIPE), batch_size=4, num_workers=workers)
    pictures, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert labels.tolist() == [0] * 5 + [1] * 4
    assert torch.equal(pictures, torch.cat([RECIPE(source.where(i)) for i in range(9)]))


# -- layouts --------------------------------------------------------------------------------------


def test_a_folder_per_class_is_split_by_class(tmp_path):
    split = find(class_folders(tmp_path, {"dog": 30, "cat": 20, "Owl": 4, "ant": 1}))
    assert split.classes == split.train.classes == split.val.classes == ("Owl", "ant", "cat", "dog")
    assert split.val.counts().tolist() == [1, 0, 2, 3]
    assert split.train.counts().tolist() == [3, 1, 18, 27]
    assert not set(keys(split.train)) & set(keys(split.val))
    assert split.name == tmp_path.name and "10 % of every class" in split.notes[0]
    assert split.notes[1] == "no picture is held out of 1 of the classes: ant"
    for source in (split.train, split.val):
        for index in range(len(source)):
            assert source.key(index).startswith(source.classes[source.label(index)])
            assert source.where(index) == str(tmp_path / source.key(index))


def test_the_split_is_the_same_everywhere_and_stable(tmp_path):
    """Pinned: keys that a hash puts aside on every machine, whatever the order of creation."""
    class_folders(tmp_path, {"cat": 10, "dog": 10})
    held = keys(find(tmp_path, seed=3, val_fraction=0.2).val)
    assert held == ["cat/005.png", "cat/006.png", "dog/003.png", "dog/007.png"]
    assert keys(find(tmp_path, seed=4, val_fraction=0.2).val) != held
    noise(99).save(tmp_path / "cat" / "010.png")
    after = keys(find(tmp_path, seed=3, val_fraction=0.2).val)
    assert after[-2:] == held[-2:] and len({*after} & {*held}) >= 3
    assert find(tmp_path, val_fraction=0).val is None


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Validation"), ("training", "test")])
def test_a_folder_with_parts(tmp_path, names):
    class_folders(tmp_path / names[0], {"cat": 3, "dog": 2})
    class_folders(tmp_path / names[1], {"dog": 2})
    split = find(tmp_path)
    assert split.classes == ("cat", "dog")
    assert split.train.counts().tolist() == [3, 2] and split.val.counts().tolist() == [0, 2]
    assert split.notes[1].endswith("of the classes: cat")
    assert find_split(tmp_path).name == f"{tmp_path.name}, {names[1].lower()}"
    assert len(find_split(tmp_path, names[0]).source) == 5


def test_val_can_be_another_part_or_other_data(tmp_path):
    for part in ("train", "val", "test"):
        class_folders(tmp_path / "d" / part, {"cat": 3 + len(part), "dog": 2})
    class_folders(tmp_path / "e", {"cat": 1})
    assert len(find(tmp_path / "d").val) == 8
    assert len(find(tmp_path / "d", val="test").val) == 9
    assert len(find(tmp_path / "d", val=tmp_path / "e").val) == 1
    with pytest.raises(DataError, match="another part"):
        find(tmp_path / "d", val="train")
    told = r"others than those trained on, got 10 of 10 that are the same: .*\.png\. Name other"
    with pytest.raises(DataError, match=told):  # the part by its path
        find(tmp_path / "d", val=os.path.join(tmp_path, "d", ".", "train"))
    with pytest.raises(DataError, match="got 2 of 2 that are the same"):
        find(class_folders(tmp_path / "e", {"dog": 1}), val=tmp_path / "e" / ".." / "e")


def test_train_can_be_a_class(tmp_path):
    split = find(class_folders(tmp_path, {"bus": 2, "train": 2}))
    assert split.classes == ("bus", "train")


def test_accents_match_however_they_are_encoded(tmp_path):
    class_folders(tmp_path / "train", {"caf\u00e9": 2, "tea": 1})
    class_folders(tmp_path / "val", {"cafe\u0301": 2})
    assert find(tmp_path).val.counts().tolist() == [2, 0]
    class_folders(tmp_path / "train", {"cafe\u0301": 2})
    with pytest.raises(DataError, match="accents"):
        find(tmp_path)


def test_loose_pictures_are_mentioned(tmp_path):
    class_folders(tmp_path, {"cat": 2, "dog": 2})
    noise(1).save(tmp_path / "sheet.png")
    assert "1 pictures in" in find(tmp_path).notes[0]


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda d: None, "no folder and no pictures"),
        (lambda d: noise(1).save(d / "x.png"), "got 1 pictures and no folder"),
        (lambda d: class_folders(d, {"cat": 2}), "at least two classes, got 1 in .*: cat"),
        (lambda d: class_folders(d, {"cat": 2, "dog": 0, "owl": 1}), "got 1 without any in .*dog"),
        (lambda d: class_folders(d, {"cat": 1, "dog": 1}), "two pictures.*val_fraction to 0"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path, make, text):
    make(tmp_path)
    with pytest.raises(DataError, match=text):
        find(tmp_path)


@pytest.mark.parametrize(("counts", "text"), [({}, "no folder"), ({"cat": 0}, "any in .*val: cat")])
def test_an_empty_part_says_what_goes_without_it(tmp_path, counts, text):
    class_folders(tmp_path / "train", {"cat": 2, "dog": 2})
    (tmp_path / "val").mkdir()
    class_folders(tmp_path / "val", counts)
    with pytest.raises(DataError, match=rf"{text}.*Without val, a share of every") as error:
        find(tmp_path)
    assert "`train`" not in str(error.value)


def test_a_label_in_val_but_not_in_train(tmp_path):
    class_folders(tmp_path / "train", {"cat": 2, "dog": 2})
    class_folders(tmp_path / "val", {"cat": 1, "owl": 3})
    with pytest.raises(DataError, match=r"got 1 that are not: owl \(3\)"):
        find(tmp_path)


def test_what_is_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise(1).save("x.png")
    with pytest.raises(DataError, match="got the file"):
        find("x.png")
    with pytest.raises(DataError, match="there is no folder"):
        find("./missing")
    with pytest.raises(ValueError, match="val_fraction"):
        find(".", val_fraction=1.0)
    class_folders(tmp_path / "d" / "val", {"cat": 1})
    with pytest.raises(DataError, match="part called train, got val"):
        find("d")
    with pytest.raises(DataError, match="got test; d has the parts val"):
        find_split("d", "test")


# -- workers --------------------------------------------------------------------------------------

ORPHAN = """
import multiprocessing, os, sys, time
from pathlib import Path
from natcupy.data.workers import leave_with_parent
folder, dies = Path(sys.argv[1]), sys.argv[2] == "dies"

def worker(parent):
    if dies:
        while os.getppid() == parent:
            time.sleep(0.01)
    (folder / "asked").touch()
    leave_with_parent(0)
    (folder / "stayed").touch()

made = multiprocessing.get_context("fork").Process(target=worker, args=(os.getpid(),))
made.start()
if dies:
    os.kill(os.getpid(), 9)
made.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("dies", [True, False])
def test_a_worker_does_not_outlive_its_parent(tmp_path, dies):
    """Not even where the parent dies before torch has looked who that is."""
    subprocess.run(
        [sys.executable, "-c", ORPHAN, str(tmp_path), "dies" if dies else "lives"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    for _ in range(500):
        if (tmp_path / "asked").exists():
            break
        time.sleep(0.02)
    time.sleep(0.3)
    assert (tmp_path / "asked").exists() and (tmp_path / "stayed").exists() == (not dies)


def test_a_folder_that_vanishes_while_it_is_listed(tmp_path, monkeypatch):
    for name in ("a.png", "gone/b.png", "stays/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    entries = files._entries

    def removing(path):
        found = entries(path)
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        return found

    monkeypatch.setattr(files, "_entries", removing)
    assert list_pictures(tmp_path) == ["a.png", "stays/c.png"]
    with pytest.raises(FileNotFoundError):
        list_pictures(tmp_path / "gone")


@pytest.mark.parametrize(("cores", "processes", "wanted"), [(1, 1, 1), (3, 1, 3), (64, 4, 8)])
def test_workers_by_the_cores_that_may_be_used(monkeypatch, cores, processes, wanted):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert workers.usual_workers(processes) == wanted
