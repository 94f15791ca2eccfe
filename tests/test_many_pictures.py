"Very many pictures: what is listed and checked, how a sample stands for all, and what that costs for each."
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastai.data.external import fastai_cfg
from PIL import Image

from attnpool.data import check as room
from attnpool.data import describe, identify
from attnpool.data import listing as listings
from attnpool.data.check import check_pictures, doubles_of, every_picture, without_broken
from attnpool.data.listing import Listing, digests, fingerprint, list_folder
from attnpool.data.pictures import labelled_dls, picture_dls
from attnpool.data.reader import BrokenPicture, load_picture, open_picture, picture_files, with_progress
from attnpool.data.splits import members_of, share_of_each
from attnpool.registry import BadInput
from attnpool.runs.probe import doubles_in
from attnpool.runs.shown import find_evaluated
from attnpool.runs.spec import make_spec
from attnpool.runs.tested import ask_tests, find_tests
from attnpool.runs.train import run

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fastai_cfg.cache_clear()


@pytest.fixture
def few(monkeypatch):
    "More than 60 pictures are many, and 30 are a sample; of more than 100, ten are read."
    monkeypatch.setattr(room, "SAMPLED_ABOVE", 60)
    monkeypatch.setattr(room, "SAMPLE", 30)
    monkeypatch.setattr(listings, "_READ", 10)


def photos(root="photos", classes=("ant", "bee", "cat"), n=(30, 10), size=(12, 10), ext="jpg"):
    rng = np.random.default_rng(0)
    for part, k in zip(("train", "val"), n):
        for c in classes:
            (folder := Path(root, part, c)).mkdir(parents=True)
            for i in range(k): Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i:03}.{ext}")
    return Path(root)


def test_names_come_in_the_order_of_paths_whatever_they_are_called():
    for name in ("b/c/1.jpg", "b/c.jpg", "b c/2.jpg", "b/c 2/3.JPG", "b-c/4.png", "a", "b/.hidden/5.jpg", "b/notes.txt", "b/._6.jpg"):
        Path("all", name).parent.mkdir(parents=True, exist_ok=True)
        if name != "a": Image.new("RGB", (3, 3)).save(Path("all", name), "PNG") if "notes" not in name else Path("all", name).write_text("hello")
    os.symlink(os.path.abspath("all"), "all/b/loop")
    found, left_out = picture_files("all")
    assert found == sorted(found) and [str(f.relative_to("all")) for f in found] == ["b/c/1.jpg", "b/c 2/3.JPG", "b/c.jpg", "b c/2.jpg", "b-c/4.png"]
    assert len(found) == 5 and [f.name for f in left_out] == sorted(f.name for f in left_out) == ["._6.jpg", ".hidden", "notes.txt"]


def test_a_share_of_each_class_is_drawn_as_ever():
    labels = np.array(list("cabbaacccb") * 20)
    rng, wanted = np.random.default_rng(5), np.zeros(200, bool)
    for c in "abc":   # as it was written before
        mine = rng.permutation(np.flatnonzero(labels == c))
        wanted[mine[:round(len(mine) * .3)]] = True
    assert (share_of_each(labels, .3, 5) == wanted).all() and [len(m) for m in members_of(labels)] == [60, 60, 80] and members_of([]) == []


def test_a_sample_of_each_class_is_checked_and_says_so(few, capsys):
    root = photos()
    listing = list_folder(root)
    check = check_pictures(listing)
    assert check.looked == 30 and (check.sizes > 0).all(1).sum() == 30 and {tuple(s) for s in check.sizes[check.sizes[:, 0] > 0]} == {(10, 12)}
    seen = np.array(listing.labels)[check.sizes[:, 0] > 0]
    assert {c: int((seen == c).sum()) for c in "ant bee cat".split()} == dict(ant=10, bee=10, cat=10)
    assert (check_pictures(listing).sizes == check.sizes).all()
    whole = check_pictures(listing, every=True)
    assert whole.looked is None and (whole.sizes > 0).all() and np.allclose(check.mean, whole.mean, atol=.02) and check.mean != whole.mean
    assert check_pictures(listing).looked is None   # all have been looked at by now
    one = replace(listing, name="other", labels=["rare", *listing.labels[1:]])
    assert check_pictures(one).sizes[0].tolist() == [10, 12]   # a class of one picture too
    assert [every_picture(o) for o in (None, "all")] == [False, True]
    with pytest.raises(BadInput, match="^check: expected all, got 'some'"): every_picture("some")


def test_what_a_sample_missed_is_named_when_it_comes(few):
    root = photos()
    listing = list_folder(root)
    missed = [f for f, s in zip(listing.files, check_pictures(listing).sizes) if not s[0]]
    for f in missed: os.utime(root / f, ns=(1, (root / f).stat().st_mtime_ns))
    bad = missed[5]   # fastai looks at the first one itself
    (root / bad).write_bytes(b"no picture")
    sample = check_pictures(list_folder(root))
    assert sample.looked == 30 and sample.broken == {}   # the same pictures were drawn
    for workers in (0, 1):
        dls = picture_dls(root, 8, 4, "cpu", cache_gb=0, augment="imagenet", num_workers=workers)
        with pytest.raises(BrokenPicture, match=f"{bad} cannot be read as a picture \\(.*Only a sample was checked before: --check all names every"):
            for _ in dls.train: pass
            for _ in dls.valid: pass
    with pytest.raises(BadInput, match="^data: 1 of 120 pictures .* are broken"): picture_dls(root, 8, 4, "cpu")   # they fit the file of pixels: all are looked at
    assert len(picture_dls(root, 8, 4, "cpu", skip_broken=True).listing.files) == 119


def test_a_description_of_many_pictures(few):
    root = photos()
    text = describe(root).text
    assert "Looked at: 30 pictures of all classes; --check all looks at all" in text.splitlines() and "Doubles: not sought among more than 60 pictures; --check all does" in text
    assert doubles_of(list_folder(root)).near == [] and "Doubles: none" in describe(root, every=True).text and "Looked at" not in describe(root).text


def test_doubles_that_were_not_sought_are_no_number(few, tmp_path):
    root = photos()
    shutil.copytree(root / "val", root / "test")
    assert doubles_of(list_folder(root)).number() is None and doubles_in(picture_dls(root, 8, 4, "cpu", cache_gb=0)) is None
    r = run(make_spec(root, "avg", arch="xeca_resnext_tiny", epochs=1, size=8, bs=16, lr=1e-3), tmp_path / "runs", "cpu")
    tested, = ask_tests([r], find_tests(root), "cpu", say=lambda text: None)
    assert tested.test["pictures"] == 30 and tested.test["doubles"] is None
    assert check_pictures(list_folder(root), every=True).looked is None and doubles_of(list_folder(root)).number() == 0


def test_evaluate_says_of_broken_pictures_that_a_sample_was_looked_at(few):
    root = photos(n=(0, 30)) / "val"
    for f in (root / "bee").iterdir(): f.write_bytes(b"no picture")
    with pytest.raises(BadInput, match="10 of 90 pictures .* are broken: .* Only 30 were looked at: --check all finds all"): find_evaluated(root)


def test_the_fingerprint_of_many_pictures_reads_a_sample_and_all_sizes(few):
    root = photos()
    found, before = digests(list_folder(root)), identify(root).fingerprint
    read = [name for name, (*_, mark) in found.items() if not mark.endswith(" bytes")]
    assert read == sorted(found)[::12] and len(found) == 120 and fingerprint(found) == before
    other = next(root / f for f in found if f not in read)
    content = bytearray(other.read_bytes())
    content[-3] ^= 1
    other.write_bytes(content)
    assert identify(root).fingerprint == before   # what a sample costs
    other.write_bytes(bytes(content) + b"x")
    assert identify(root).fingerprint != before
    other.write_bytes(content)
    (root / read[3]).write_bytes(bytes(Path(root / read[3]).read_bytes()[:-3]) + b"abc")
    assert identify(root).fingerprint != before


def test_large_jpegs_are_decoded_coarsely_for_training_only():
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for c in "ab":
            (folder := Path("large", part, c)).mkdir(parents=True)
            for i in range(2): Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    assert open_picture("large/val/a/0.jpg", enough=64).size == (100, 75) and load_picture("large/val/a/0.jpg", None).size == (400, 300)
    dls = picture_dls("large", 16, 2, "cpu", augment="imagenet")
    assert dls.train_ds[0][0].size == (100, 75) and dls.valid_ds[0][0].size == (400, 300)
    assert picture_dls("large", 48, 2, "cpu", augment="imagenet").train_ds[0][0].size == (400, 300)
    assert picture_dls("large", 16, 2, "cpu", augment="light", cache_gb=0).train_ds[0][0].size == (43, 32)   # as ever


def test_long_work_says_how_far_it_is(capsys):
    assert list(with_progress(range(300), "counting", 300, every=0)) == list(range(300))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and said[0].startswith("attnpool: counting: 64 of 300, ") and said[0].endswith("minutes left")
    assert list(with_progress(range(300), "counting")) == list(range(300)) and capsys.readouterr().err == ""


def test_labels_of_many_pictures_are_told_in_one_go():
    n = 20_000
    dls = picture_dls(photos(), 8, 4, "cpu")
    dls = labelled_dls(dls, Listing("many", dls.listing.root, dls.listing.files[:1] * n, ["ant", "bee"] * (n // 2), n // 2))   # was quadratic: minutes
    assert len(dls.train_ds) == len(dls.valid_ds) == n // 2


SCRIPT = """
import resource, sys
from pathlib import Path
from attnpool.data.check import check_pictures
from attnpool.data.listing import list_folder
from attnpool.data import check as room
room.SAMPLED_ABOVE, room.SAMPLE = 10_000, 1000
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
check_pictures(list_folder("small"))
before = peak()
listing = list_folder("many")
check = check_pictures(listing)
print((peak() - before) / len(listing.files), len(listing.files), check.looked)
"""


def test_listing_and_check_by_sample_take_little_memory_a_picture():
    photos("small", n=(300, 100))
    for part, k in (("train", 190), ("val", 10)):
        for c in range(100):
            (folder := Path("many", part, f"n{c:08}")).mkdir(parents=True)
            for i in range(k): os.link(f"small/train/ant/{i % 300:03}.jpg", folder / f"n{c:08}_{i}.JPEG")
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    a_picture, n, looked = map(float, done.stdout.split())
    assert (n, looked) == (20_000, 1000) and a_picture < 300, done.stdout
