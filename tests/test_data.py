"Data sets of files: real pictures, archives and records, whole and damaged in every way."
import http.server
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.all import CategoryBlock, DataBlock, GrandparentSplitter, get_image_files, parent_label
from fastai.data.external import fastai_cfg, fastai_path
from fastai.vision.all import FlipItem, Hue, ImageBlock, Normalize, PILImage, RandomResizedCrop, Saturation, aug_transforms, set_seed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from attnpool.data import describe, get_dls, identify, loading_rate
from attnpool.data.augment import AUGMENTS, STATS, augment_name
from attnpool.data.cache import fastai_folder, made_once, unpack, write_file
from attnpool.data.check import check_pictures, make_pixels, open_picture, PixelFile
from attnpool.data.digits import cluttered_digits, digits_dls
from attnpool.data.listing import (
    differences, digests, family_of, fingerprint, list_csv, list_folder, OFFICIAL, read_digests, WORDNET, write_digests)
from attnpool.data.petals import unpack_tfrecords
from attnpool.data.pictures import (
    blog_version, data_name, DATASETS, find_pictures, picture_dls, SOURCES, valid_dl, validation_pictures)
from attnpool.data.transfer import fetch
from attnpool.registry import BadInput

FORK = multiprocessing.get_context("fork")
IMAGENETTE, IMAGEWOOF = WORDNET["imagenette"], WORDNET["imagewoof"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fastai_cfg.cache_clear()
    return tmp_path / "home" / "data" / "attnpool"


def picture(file, size=(20, 16), seed=0):
    "A smooth picture, so that JPEG changes little."
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.BICUBIC).save(file, **(dict(quality=95) if file.suffix == ".jpg" else {}))
    return file


def pictures(root, classes=("cat", "dog"), n_train=6, n_valid=2, valid="val", size=(20, 16), ext="png"):
    for c, name in enumerate(classes):
        for split, n in (("train", n_train), (valid, n_valid)):
            for i in range(n): picture(Path(root) / split / name / f"{i}.{ext}", size, hash_of(c, split == valid, i))
    return Path(root)


def hash_of(*numbers): return sum(n * 1000**i for i, n in enumerate(numbers))


def tarred(root, name="x.tar", mode="w"):
    with tarfile.open(name, mode) as tar: tar.add(root)
    return Path(name)


def plain(dl): return [(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)) for x, y in dl]
def same(a, b): return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y))
def left_in(cache): return sorted(f.name for f in cache.glob("*") if f.suffix != ".lock") if cache.exists() else []


# Which pictures there are

@pytest.mark.parametrize("valid", ["val", "valid", "validation"])
def test_a_folder_with_a_split(valid):
    root = pictures("pets", ("dog", "cat"), 3, 2, valid)
    picture("pets/test/cat/0.png")   # left alone
    picture("pets/train/cat/deep/er/7.png")
    l = list_folder(root)
    assert (l.name, l.n_train, len(l.files)) == ("pets", 7, 11) and list(l.classes) == ["cat", "dog"]
    assert l.files[:4] == ["train/cat/0.png", "train/cat/1.png", "train/cat/2.png", "train/cat/deep/er/7.png"]
    assert l.labels == ["cat"] * 4 + ["dog"] * 3 + ["cat"] * 2 + ["dog"] * 2 and l.files[-1] == f"{valid}/dog/1.png"


def test_a_random_split_takes_the_same_share_of_each_class():
    for c, n in (("a", 10), ("b", 25), ("c", 1), ("d", 2)):
        for i in range(n): picture(f"things/{c}/{i}.png")
    l = list_folder("things", valid_pct=.4)
    assert Counter(l.labels[:l.n_train]) == dict(a=6, b=15, c=1, d=1) and Counter(l.labels[l.n_train:]) == dict(a=4, b=10, d=1)
    assert sorted(l.files) == sorted(str(f) for f in (p.relative_to("things") for p in Path("things").rglob("*.png")))
    assert [Path(f).parts[0] for f in l.files] == l.labels
    assert l == list_folder("things", valid_pct=.4) and l.files != list_folder("things", valid_pct=.4, split_seed=1).files


def test_a_table_with_and_without_a_split():
    pictures("pets")
    rows = ["val,2,pets/val/cat/0.png", "train,10,pets/train/dog/1.png", "valid,10,pets/val/dog/0.png", "training,2,pets/train/cat/3.png"]
    Path("t.csv").write_text("split,label,path\n" + "\n".join(rows) + "\n")
    l = find_pictures("t.csv")
    assert l.n_train == 2 and l.files == ["pets/train/dog/1.png", "pets/train/cat/3.png", "pets/val/cat/0.png", "pets/val/dog/0.png"]
    assert list(l.classes) == ["2", "10"] and l.labels == ["10", "2", "2", "10"]   # numbers as numbers
    Path("t.csv").write_text("\ufeffpath,label\r\n" + "".join(f'"{f}",{f.parent.name}\r\n' for f in sorted(Path("pets").rglob("*.png"))), encoding="utf-8")
    l = find_pictures("t.csv")
    assert l.n_train == 12 and Counter(l.labels) == dict(cat=8, dog=8) and l.root == Path(".")


@pytest.mark.parametrize("name,mode", [("x.tar", "w"), ("x.tar.gz", "w:gz"), ("x.tgz", "w:gz"), ("x.tar.xz", "w:xz")])
def test_an_archive_is_the_folder_in_it(name, mode, home):
    root = pictures("outer/pets")
    archive = tarred("outer", name, mode)
    a, b = find_pictures(archive), find_pictures(root)
    assert (a.files, a.labels, a.n_train, a.name) == (b.files, b.labels, b.n_train, "x")
    for f in a.files: assert (a.root / f).read_bytes() == (b.root / f).read_bytes()
    before = (made := home / left_in(home)[0]).stat().st_mtime_ns
    assert find_pictures(name).files == a.files and made.stat().st_mtime_ns == before   # not unpacked again


@pytest.mark.parametrize("family,names", [("imagenette", IMAGENETTE), ("imagewoof", IMAGEWOOF)])
def test_known_classes_bring_their_names_and_statistics(family, names):
    ids = list(names)[3:6]
    l = find_pictures(pictures("my-128", ids))
    assert l.family == family and l.classes == {i: names[i] for i in ids} and l.name == "my-128"
    dls = picture_dls("my-128", size=16, bs=4, device="cpu")
    assert list(dls.vocab) == [names[i] for i in ids] and dls.c == 3
    norm = next(f for f in dls.train.after_batch.fs if isinstance(f, Normalize))
    assert np.allclose(norm.mean.flatten(), STATS[family][0]) and np.allclose(norm.std.flatten(), STATS[family][1])
    assert STATS["imagewoof"] == ([.496, .461, .399], [.257, .249, .258])   # not Imagenette's, as printed
    assert find_pictures(pictures("mixed", [*ids, "cat"])).family == ""
    assert len(IMAGENETTE) == len(IMAGEWOOF) == 10 and not IMAGENETTE.keys() & IMAGEWOOF.keys()


def test_a_family_is_told_by_its_classes_and_not_by_its_name(home):
    assert find_pictures(pictures("imagenette-cats")).family == "" == identify("./imagenette-cats").family
    dls = picture_dls("./imagenette-cats", 16, 4, "cpu")
    assert dls.family == "" and digits_dls(20, n_train=40, n_valid=20).family == "digits" == identify("digits").family
    ids = list(IMAGEWOOF)[:2]
    Path("t.csv").write_text("path,label\n" + "".join(f"{i}.png,{ids[i % 2]}\n" for i in range(8)))
    assert list_csv("t.csv").family == "imagewoof" and list_csv("t.csv", family="petals").family == "petals"
    assert family_of(["0", "1"]) == "" and family_of([*ids, *list(IMAGENETTE)[:1]]) == ""


def missing_split(root): pictures(root); [f.unlink() for f in (root / "val").rglob("*.png")]; [d.rmdir() for d in (root / "val").iterdir()]
def only_val(root): pictures(root); (root / "train").rename(root.parent / "elsewhere")
def one_class(root): pictures(root, ["cat"])
def unknown_class(root): pictures(root); picture(root / "val/emu/0.png")
def empty_class(root): pictures(root); (root / "train/emu").mkdir()
def bare(root): pictures(root); picture(root / "train/0.png")
def empty(root): root.mkdir()
def empty_splits(root): (root / "train").mkdir(parents=True); (root / "val").mkdir()
def no_pictures(root): root.mkdir(); (root / "notes.txt").write_text("hello")
def flat(root): picture(root / "a.png")


@pytest.mark.parametrize("make,message", [
    (missing_split, "has no validation pictures"), (only_val, "has a folder val but no folder train"), (one_class, "one class only, 'cat'"),
    (unknown_class, "validation but no training pictures: emu"), (empty_class, "class folders without pictures in x: train/emu"),
    (bare, "1 pictures lie outside of a class's folder: x/train/0.png"), (empty, "holds no pictures. Expected train/CLASS"),
    (empty_splits, "holds no pictures"), (no_pictures, "holds no pictures"), (flat, "(outside of a class's folder|one class only)")])
@pytest.mark.parametrize("packed", [False, True])
def test_folders_that_cannot_be_meant(make, message, packed):
    make(Path("x"))
    if packed: message = message.replace(" in x", " in .*x").replace(": x/", ": .*x/")
    with pytest.raises(ValueError, match=f"^data: .*{message}"): get_dls(tarred("x") if packed else "./x", bs=2)


@pytest.mark.parametrize("text,message", [
    ("", "has no rows"), ("path,label\n", "has no rows"), ("file,class\na.png,cat\n", "no column path and no column label; its columns are 'file', 'class'"),
    ("path,label\na.png,\n", "without a path or a label: lines 2"), ("path,label\n\na.png,cat\n,dog\n", "lines 4"), ("path,label\na.png\n", "lines 2"),
    ("path,label,split\na.png,cat,later\n", "has 'later' in its column split"), ("path,label,split\na.png,cat,\n", "has '' in its column split"),
    ("path,label\na.png,cat\na.png,dog\n", "more than once: a.png"), ("path,label,split\na.png,cat,train\nb.png,dog,val\n", "one class only")])
def test_tables_that_cannot_be_meant(text, message):
    Path("x.csv").write_text(text)
    with pytest.raises(ValueError, match=f"^data: .*{message}"): find_pictures("x.csv")


def test_a_table_in_another_encoding():
    Path("x.csv").write_bytes("path,label\ncäfe.png,x\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not a CSV in UTF-8"): find_pictures("x.csv")


def test_names_and_paths():
    with pytest.raises(ValueError, match="^data: 'imagenete' is unknown. Did you mean 'imagenette'?"): get_dls("imagenete")
    for path in ("nowhere/x", "x.tar", Path("nowhere"), "../y"):
        with pytest.raises(FileNotFoundError, match="^data: there is no file or folder"): get_dls(path)
    with pytest.raises(FileNotFoundError, match="^data: there is no folder"): list_folder("nowhere")
    with pytest.raises(ValueError, match="^data: 'digits' is a data set without files"): find_pictures("digits")
    Path("zero.tar").touch()
    with pytest.raises(ValueError, match="^data: zero.tar has zero bytes"): data_name("zero.tar") and get_dls("zero.tar")
    Path("x.txt").write_text("hello")
    with pytest.raises(ValueError, match="^data: x.txt is neither an archive"): get_dls("x.txt")
    pictures("digits")
    assert data_name("digits") == "digits" and len(get_dls("digits", size=20).train_ds) == 1500   # the name wins
    assert len(get_dls("./digits", size=16, bs=4).train_ds) == 12
    Path("imagenette-128.tar.gz").touch()
    assert [data_name(p) for p in ("imagenette-128.tar.gz", "./digits", "petals")] == ["imagenette-128", "digits", "petals"]
    assert {"digits", "imagenette", "imagenette-160", "imagewoof", "imagewoof-320", "petals"} <= set(DATASETS)


# Pictures, whole and broken

def test_every_mode_becomes_rgb():
    rgb = (200, 100, 40)
    for mode, colour, file, want in [
            ("RGB", rgb, "a.png", rgb), ("L", 90, "b.png", (90,) * 3), ("RGBA", (*rgb, 10), "c.png", (253, 249, 247)), ("LA", (90, 0), "d.png", (255,) * 3),
            ("1", 1, "e.png", (255,) * 3), ("I;16", 40_000, "f.png", (156,) * 3), ("CMYK", (0, 128, 255, 0), "g.jpg", (255, 127, 0)), ("L", 90, "h.jpg", (90,) * 3)]:
        Image.new(mode, (12, 9), colour).save(file)
        im = open_picture(file)
        assert im.mode == "RGB" and im.size == (12, 9)
        assert np.abs(np.array(im.getpixel((5, 5))) - want).max() <= 2, (mode, im.getpixel((5, 5)))
    Image.new("RGB", (12, 9), rgb).quantize(4).save("p.png")
    assert open_picture("p.png").getpixel((5, 5)) == rgb


def break_some(root):
    whole = (root / "train/cat/0.png").read_bytes()
    broken = {"train/cat/cut.png": whole[:-30], "train/dog/cut.jpg": picture("z.jpg", (200, 200)).read_bytes()[:700], "val/dog/zero.jpg": b"",
              "train/dog/text.jpg": b"<html>404</html>", "val/cat/header.png": whole[:8]}
    for f, content in broken.items(): (root / f).write_bytes(content)
    return broken


def test_broken_pictures_are_named_together_and_can_be_left_out():
    root = pictures("pets", ext="png")
    good = list_folder(root).files
    broken = break_some(root)
    check = check_pictures(list_folder(root))
    assert check.broken.keys() == broken.keys() and check.broken["val/dog/zero.jpg"] == "zero bytes" and check.broken["train/dog/text.jpg"] == "not a picture"
    assert (check.sizes[[f in good for f in list_folder(root).files]] == (20, 16)).all() and (check.sizes == 0).all(1).sum() == 5
    with pytest.raises(ValueError, match="^data: 5 of 21 pictures in pets are broken: .*--skip-broken") as e: get_dls("./pets", size=16, bs=4)
    assert all(f in str(e.value) for f in broken)
    dls = get_dls("./pets", size=16, bs=4, skip_broken=True)
    assert dls.listing.files == good and len(dls.train_ds) == 12 and len(dls.valid_ds) == 4
    assert sum(len(y) for _, y in dls.valid) == 4 and sum(len(y) for _, y in dls.train) == 12


def test_many_broken_pictures_make_a_short_message():
    root = pictures("pets")
    for i in range(30): (root / f"train/cat/x{i:02}.png").touch()
    with pytest.raises(ValueError, match=r"30 of 46 pictures .* x09.png \(zero bytes\)|30 of 46 .* and 20 more") as e: get_dls("./pets", bs=2)
    assert "x09" in str(e.value) and "x10" not in str(e.value)


def test_a_mended_picture_is_seen_and_what_skipping_leaves_must_still_make_sense():
    root = pictures("pets", n_valid=1)
    (root / "val/dog/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 14"): get_dls("./pets", bs=2)
    picture(root / "val/dog/0.png")
    assert len(get_dls("./pets", size=16, bs=2).valid_ds) == 2
    for f in (root / "train/dog").iterdir(): f.write_bytes(b"")
    with pytest.raises(ValueError, match="^data: pets has one class only"): get_dls("./pets", bs=2, skip_broken=True)
    for f in root.rglob("*.png"): f.write_bytes(b"")
    with pytest.raises(ValueError, match="^data: 14 of 14"): get_dls("./pets", bs=2)
    with pytest.raises(ValueError, match="^data: pets has no training pictures"): get_dls("./pets", bs=2, skip_broken=True)


def test_a_file_that_a_table_names_but_is_not_there():
    pictures("pets")
    Path("t.csv").write_text("path,label,split\npets/train/cat/0.png,a,train\npets/train/dog/0.png,b,train\nnope.png,a,val\npets,b,val\n")
    with pytest.raises(ValueError, match=r"2 of 4 pictures in \. are broken: nope.png \(No such file or directory\), pets \(Is a directory\)"): get_dls("t.csv", bs=2)


def test_statistics_are_those_of_the_training_pixels():
    root = pictures("pets", size=(9, 7))
    picture(root / "train/cat/big.png", (30, 40), 5)
    l, c = list_folder(root), check_pictures(list_folder(root))
    x = [np.asarray(Image.open(root / f), np.float64) / 255 for f in l.files[:l.n_train]]
    mean = np.mean([p.mean((0, 1)) for p in x], 0)
    std = np.sqrt(np.mean([((p - mean)**2).mean((0, 1)) for p in x], 0))   # each picture counts the same
    assert np.allclose(c.mean, mean, atol=1e-4) and np.allclose(c.std, std, atol=1e-4)


# DataLoaders

def blog_dls(root, size, bs, stats):
    "The block of the blog's appendix, in fastai's own words."
    return DataBlock(blocks=(ImageBlock, CategoryBlock), splitter=GrandparentSplitter(valid_name="val"), get_items=lambda p: sorted(get_image_files(p)), get_y=parent_label,
                     item_tfms=[RandomResizedCrop(size, min_scale=0.35), FlipItem(0.5)],
                     batch_tfms=[*aug_transforms(max_zoom=1, max_rotate=20, xtra_tfms=[Hue(), Saturation()]), Normalize.from_stats(*stats, cuda=False)],
                     ).dataloaders(root, bs=bs, val_bs=2 * bs, num_workers=0, device="cpu")


def test_batches_are_those_of_the_printed_block():
    root = pictures("nette", list(IMAGENETTE)[:3], 8, 5, size=(50, 38), ext="jpg")
    def batches(make):
        set_seed(7)
        dls = make()
        set_seed(8)
        return plain(dls.valid), plain(dls.train)
    theirs = batches(partial(blog_dls, root, 24, 8, STATS["imagenette"]))
    ours = batches(partial(picture_dls, root, 24, 8, "cpu"))
    assert Counter(y.item() for _, ys in ours[1] for y in ys) == Counter(y.item() for _, ys in theirs[1] for y in ys)
    for mine, its in zip(ours, theirs):   # fastai warps by another order of the same products
        assert len(mine) == len(its) and all(torch.equal(a[1], b[1]) for a, b in zip(mine, its))
        for a, b in zip(mine, its): torch.testing.assert_close(a[0], b[0], rtol=0, atol=2e-4)   # a grey level is .015


def test_petals_turn_and_flip_vertically_and_imagenette_does_not():
    own = {f: AUGMENTS[augment_name("own", f)] for f in ("petals", "imagenette", "")}
    turn = {f: {g.func.__name__: g.keywords for g in own[f].batch()[0].aff_fs} for f in ("petals", "imagenette")}
    assert turn["petals"]["rotate_mat"]["max_deg"] == 45 and "dihedral_mat" in turn["petals"] and "flip_mat" not in turn["petals"]
    assert turn["imagenette"]["rotate_mat"]["max_deg"] == 20 and "flip_mat" in turn["imagenette"]
    assert [type(t).__name__ for t in own["petals"].items(16)] == ["RandomResizedCrop", "ToTensor"]
    assert [type(t).__name__ for t in own[""].items(16)] == ["RandomResizedCrop", "FlipItem", "ToTensor"]


def test_the_same_seed_gives_the_same_batches_decoded_once_or_each_time():
    pictures("pets", n_train=9, size=(33, 47))
    def batches(seed, **options):
        set_seed(seed)
        dls = picture_dls("./pets", 24, 6, "cpu", **options)
        set_seed(seed + 1)
        return plain(dls.train) + plain(dls.train) + plain(dls.valid)
    once = batches(1)
    assert same(once, batches(1)) and same(once, batches(1, cache_gb=0)) and not same(once, batches(2))
    assert not torch.equal(once[0][0], once[3][0])   # another epoch, other crops


def test_workers_give_the_same_validation_and_the_same_training_again():
    pictures("pets", n_train=9)
    def batches(n):
        set_seed(1)
        dls = picture_dls("./pets", 16, 6, "cpu", num_workers=n, augment=False)
        return plain(dls.valid), plain(dls.train)
    zero, two, again = batches(0), batches(2), batches(2)
    assert same(zero[0], two[0]) and same(two[1], again[1]) and all(torch.equal(a[1], b[1]) for a, b in zip(zero[1], two[1]))
    assert picture_dls("./pets", 16, 6, "cpu").train.fake_l.num_workers == 0


def test_without_augmentation_only_crop_and_flip_are_left():
    root = pictures("pets")
    dls = picture_dls("./pets", 16, 4, "cpu", augment=False)
    assert [type(f).__name__ for f in dls.train.after_batch.fs] == ["IntToFloatTensor", "Normalize"]
    for f in root.rglob("*.png"): Image.new("RGB", (20, 16), (255, 0, 51)).save(f)
    x, _ = picture_dls("./pets", 16, 4, "cpu", augment=False).train.one_batch()
    assert x.std((2, 3)).max() < 1e-4   # one colour stays one colour
    x, _ = picture_dls("./pets", 16, 4, "cpu").train.one_batch()
    assert torch.isfinite(x).all()


def test_augmentations_go_by_name():
    pictures("pets", size=(40, 30))
    def batches(**options):
        set_seed(3)
        return plain(picture_dls("./pets", 16, 4, "cpu", **options).train)
    own, light = batches(), batches(augment="light")
    assert same(own, batches(augment="own")) and same(own, batches(augment=True)) and same(own, batches(augment="blog"))
    assert same(light, batches(augment=False)) and not same(own, light) and not same(own, batches(augment="petals"))
    x, u = (plain(get_dls("./pets", 16, 4, "cpu", augment).valid)[0][0] for augment in ("own", "none"))
    assert torch.allclose(x, u, atol=1e-4)   # validation pictures are the same but for fastai's rounding
    for make in (partial(get_dls, "./pets"), partial(picture_dls, "./pets"), partial(picture_dls, "./nowhere")):
        with pytest.raises(BadInput, match="^augment: 'blug' is unknown. Did you mean 'blog'?"): make(size=16, bs=4, augment="blug")


def test_without_augmentation_training_pictures_are_read_as_validation_pictures():
    root = pictures("pets", n_train=4, n_valid=1, size=(70, 45))
    for c in ("cat", "dog"):
        shutil.rmtree(root / "val" / c)
        shutil.copytree(root / "train" / c, root / "val" / c)
    for options in (dict(), dict(cache_gb=0), dict(num_workers=1)):
        dls = get_dls(root, 24, 8, "cpu", augment="none", **options)
        (x, y), (u, v) = plain(dls.train)[0], plain(dls.valid)[0]
        def by_picture(x): return sorted(x.flatten(1).tolist())
        assert by_picture(x) == by_picture(u) and sorted(y.tolist()) == sorted(v.tolist())
        assert not torch.equal(y, plain(dls.train)[0][1]) or not torch.equal(x, plain(dls.train)[0][0])   # the order is drawn anew


def test_digits_are_not_augmented():
    def batch(augment):
        set_seed(0)
        return get_dls("digits", 20, 16, "cpu", augment=augment, n_train=32, n_valid=8).train.one_batch()[0]
    assert torch.equal(batch("own"), batch("none")) and torch.equal(batch("own"), batch(True)) and augment_name("own", "digits") == "none"
    for bad in ("blog", "light", False):
        with pytest.raises(BadInput, match=f"^augment: digits are at random places.*got {bad!r}. Type 'own' or 'none'"): batch(bad)


def test_large_pictures_are_kept_at_twice_the_size():
    root = pictures("pets", size=(300, 200), ext="jpg")
    picture(root / "train/cat/long.jpg", (900, 20))
    picture(root / "train/cat/tiny.jpg", (3, 500))
    l = list_folder(root)
    c = check_pictures(l)
    p = make_pixels(l, c.sizes, 32, Path("store"))
    assert len(p) == len(l.files) and isinstance(PixelFile("store"), PixelFile)
    shapes = {f: p[i].shape for i, f in enumerate(l.files)}
    assert shapes["train/dog/0.jpg"] == (32, 48, 3) and shapes["train/cat/long.jpg"] == (20, 900, 3) and shapes["train/cat/tiny.jpg"] == (500, 3, 3)
    i = l.files.index("train/dog/0.jpg")
    assert np.abs(p[i].astype(int) - np.asarray(Image.open(root / l.files[i]).resize((48, 32), Image.LANCZOS), int)).mean() < 3
    dls = picture_dls("./pets", 16, 4, "cpu")
    assert dls.load == 32 and dls.train.one_batch()[0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("cache_gb", [4., 0.])
@pytest.mark.parametrize("size", [16, 24, 64])
def test_validation_at_another_size_is_what_a_loader_of_that_size_gives(cache_gb, size):
    pictures("pets", size=(100, 80))
    dls = picture_dls("./pets", 16, 4, "cpu", cache_gb=cache_gb)
    dl = valid_dl(dls, size)
    exact = picture_dls("./pets", size, 4, "cpu", cache_gb=0)
    x, y = (torch.cat(t) for t in zip(*plain(dl)))
    u, v = (torch.cat(t) for t in zip(*plain(exact.valid)))
    assert x.shape == u.shape == (4, 3, size, size) and torch.equal(y, v)
    assert (x - u).abs().max() < (.15 if cache_gb and size < 64 else 1e-6)   # shrunk in one step or in two
    assert valid_dl(dls, size, bs=3).bs == 3 and valid_dl(dls, 64).bs == 1 and plain(dls.valid)[0][0].shape[2] == 16
    assert len(list(dls.train)) == 3


def test_bad_sizes_and_batches():
    pictures("pets")
    with pytest.raises(ValueError, match="^size: expected 8"): get_dls("./pets", size=4)
    for bs in (0, 13):
        with pytest.raises(ValueError, match="^bs: expected 1 to 12"): get_dls("./pets", bs=bs)
    for share in (0, 1, -.1):
        with pytest.raises(ValueError, match="^valid_pct: expected a share"): get_dls("./pets/train", valid_pct=share)
    with pytest.raises(ValueError, match="^dls: these pictures have one size"): valid_dl(digits_dls(size=20), 40)
    with pytest.raises(ValueError, match="^size: expected 8"): valid_dl(get_dls("./pets", size=16, bs=2), 2)


def test_a_learner_trains_and_predicts_a_new_file():
    from attnpool.recipe import recipe_learner
    root = pictures("pets", n_train=8)
    dls = get_dls(root, size=16, bs=8, device="cpu")
    learn = recipe_learner(dls, "xeca_resnext_tiny", "avg", epochs=1)
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe()
        label, i, probs = learn.predict(PILImage.create(picture("new.jpg", (60, 50))))
    assert label in ("cat", "dog") and abs(probs.sum().item() - 1) < 1e-5
    assert loading_rate(dls.train, 1) > 0


# Archives

def member(name, content=b"x", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for k, v in fields.items(): setattr(info, k, v)
    return info, io.BytesIO(content)


@pytest.mark.parametrize("bad", [member("../evil.png"), member("a/../../evil.png"), member("l", b"", type=tarfile.SYMTYPE, linkname="../../.."),
                                 member("d", b"", type=tarfile.CHRTYPE), member("h", b"", type=tarfile.LNKTYPE, linkname="../../../etc/passwd")])
def test_archives_that_write_elsewhere(bad, home):
    pictures("pets")
    tarred("pets")
    with tarfile.open("x.tar", "a") as tar: tar.addfile(*bad)
    with pytest.raises(ValueError, match="^data: .*does not belong"): unpack("x.tar")
    assert left_in(home) == [] and not list(Path().rglob("evil*"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(.001, .999), kind=st.sampled_from(["", "gz"]))
def test_archives_cut_short_anywhere(share, kind, home):
    if not Path("pets").exists(): pictures("pets", size=(60, 60))
    whole = tarred("pets", "w.tar", "w:" + kind).read_bytes()
    end = len(whole) if kind else whole.rindex(b"\0" * 1024) // 512 * 512 - 9000   # behind it only zeros
    Path("short.tar").write_bytes(whole[:int(end * share)])
    with pytest.raises(ValueError, match="^data: "): get_dls("short.tar", size=16, bs=4)
    assert left_in(home) == []


def test_archives_cut_between_two_members(home):
    pictures("pets")
    with tarfile.open(tarred("pets")) as tar: at = tar.getmembers()[5].offset
    Path("x.tar").write_bytes(Path("x.tar").read_bytes()[:at])
    with pytest.raises(ValueError, match="^data: x.tar is cut short or damaged .its end is missing"): unpack("x.tar")
    assert left_in(home) == []


def test_a_damaged_header_in_the_middle(home):
    pictures("pets")
    with tarfile.open(tarred("pets")) as tar: at = tar.getmembers()[5].offset
    b = bytearray(Path("x.tar").read_bytes())
    b[at + 150] ^= 255   # its checksum
    Path("x.tar").write_bytes(b)
    with pytest.raises(ValueError, match="^data: x.tar is cut short or damaged"): unpack("x.tar")
    assert left_in(home) == []


def started(f, *args):
    "A process that runs `f`, and a connection with what it returns or raises."
    ours, theirs = FORK.Pipe()
    def work():
        try: theirs.send(f(*args))
        except Exception as e: theirs.send(f"{type(e).__name__}: {e}")
    process = FORK.Process(target=work)
    process.start()
    return process, ours


def result(process, connection):
    process.join()
    return connection.recv()


def store():
    l = list_folder("pets")
    return len(make_pixels(l, np.full((len(l.files), 2), 100), 100, Path("home/data/attnpool/store")))


@pytest.mark.parametrize("make,limit,whole", [(lambda: len(list(unpack("x.tar").rglob("*.png"))), 3000, 16), (store, 100_000, 16)])
def test_a_file_that_cannot_grow_leaves_nothing(make, limit, whole, home):
    pictures("pets", size=(100, 100))
    tarred("pets")
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return make()
    message = result(*started(limited))
    assert message.startswith("BadInput: cache: no room left in ") and "FASTAI_HOME" in message
    assert left_in(home) == []
    assert make() == whole   # with room it works


@pytest.mark.parametrize("what", ["x.tar", "./pets", "records"])
def test_a_full_disk_leaves_nothing(what, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode: pytest.skip("may not mount a small disk")
    try:
        pictures("pets", size=(100, 100), n_train=30)
        if what == "x.tar": tarred("pets")
        if what == "records": pytest.importorskip("tfrecord"); records("records", dict(train=[40, 40], val=[20]), size=(90, 90))
        with pytest.raises(ValueError, match="^cache: no room left in .*No space left on device"): get_dls(what, size=64, bs=4, cache=disk / "cache")
        assert not [f for f in left_in(disk / "cache") if "check" not in f]
    finally: subprocess.run(["umount", str(disk)], check=True)


def test_a_cache_that_cannot_be_written():
    pictures("pets")
    Path("file").touch()
    with pytest.raises(ValueError, match="^cache: cannot write to file"): get_dls("./pets", bs=2, cache="file/x")
    with pytest.raises(ValueError, match="^cache: .*"): get_dls("./pets", bs=2, cache="file")


def test_kills_leave_nothing_that_counts_as_whole(home):
    pictures("pets", n_train=60, size=(150, 150))
    tarred("pets")
    rng, kills = random.Random(0), 0
    for _ in range(20):
        process, _ = started(lambda: str(unpack("x.tar")))
        time.sleep(rng.uniform(0, .1))
        process.kill()
        process.join()
        whole = [f for f in home.glob("x-*") if f.suffix not in (".tmp", ".lock")]
        kills += not whole
        for f in whole:
            assert len(list(f.rglob("*.png"))) == 124
            shutil.rmtree(f)
    assert kills and len(list(unpack("x.tar").rglob("*.png"))) == 124 and not list(home.glob("*.tmp"))


def test_processes_that_start_together_make_it_once(home):
    def make(folder):
        (folder / f"{os.getpid()}").write_text("x" * 10**6)
        time.sleep(.3)
    runs = [started(lambda: [f.name for f in made_once(home / "once", make).iterdir()]) for _ in range(4)]
    results = [result(*r) for r in runs]
    assert all(r == results[0] and len(r) == 1 for r in results), results


# TFRecords

def records(root, files, size=(20, 16), name="{i:02}-20x16-{n}.tfrec", change=lambda i, fields: fields, classes=4):
    "Real TFRecords: the red of a picture is the number of its record."
    from tfrecord.writer import TFRecordWriter
    at = 0
    for split, counts in files.items():
        for i, n in enumerate(counts):
            file = Path(root, split, name.format(i=i, n=n))
            file.parent.mkdir(parents=True, exist_ok=True)
            writer = TFRecordWriter(str(file))
            for _ in range(n):
                b = io.BytesIO()
                im = Image.effect_noise(size, 90).convert("RGB") if size[0] > 50 else Image.new("RGB", size, (at % 256, 0, 0))
                im.save(b, "PNG")
                writer.write(change(at, dict(image=(b.getvalue(), "byte"), id=(f"id{at}".encode(), "byte")) | {"class": (at % classes, "int")}))
                at += 1
            writer.close()
    return Path(root)


@pytest.fixture
def tfrecord(): return pytest.importorskip("tfrecord")


def test_records_keep_their_order(tfrecord):
    root = records("petals-20", dict(train=[7, 5], val=[4], test=[3]))
    l = find_pictures(root)
    assert (l.name, l.family, l.n_train, len(l.files)) == ("petals-20", "petals", 12, 16) and l.labels == [str(i % 4) for i in range(16)]
    assert [Image.open(l.root / f).getpixel((0, 0))[0] for f in l.files] == list(range(16)) and l.files[13] == "val/00013-id13.jpg"
    dls = get_dls(root, size=16, bs=4, augment=False)
    norm = next(f for f in dls.train.after_batch.fs if isinstance(f, Normalize))
    assert np.allclose(norm.mean.flatten(), STATS["petals"][0]) and list(dls.vocab) == ["0", "1", "2", "3"]
    x, y = plain(dls.valid)[0]
    assert y.tolist() == [0, 1, 2, 3] and np.allclose((x[:, 0, 8, 8] * .282 + .453) * 255, [12, 13, 14, 15], atol=1e-3)
    assert find_pictures(tarred(root, "p.tar")).files == l.files and dls.family == "petals"
    turns = [g.keywords for t in get_dls(root, size=16, bs=4).train.after_batch.fs for g in getattr(t, "aff_fs", []) if g.func.__name__ == "rotate_mat"]
    assert [t["max_deg"] for t in turns] == [45]


@pytest.mark.slow
def test_all_petals_in_one_folder_are_split_by_number(tfrecord):
    root = records("petals", {"": [6000, 6000, 4465]}, size=(1, 1), name="p{i}.tfrec", classes=104)
    l = find_pictures("./petals")
    assert l.n_train == 12753 and len(l.files) - l.n_train == 3712 == OFFICIAL["petals"][1]
    assert l.labels == [str(i % 104) for i in range(16465)] and list(l.classes) == [str(i) for i in range(104)]
    Path("home/data").mkdir(parents=True, exist_ok=True)
    root.rename("home/data/petals")
    assert find_pictures("petals").n_train == 12753   # by name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(.001, .999))
def test_records_cut_short_anywhere(tfrecord, share, home):
    if not Path("r").exists(): records("r", dict(train=[5], val=[5]))
    file = Path("r/val/00-20x16-5.tfrec")
    if not Path("whole").exists(): Path("whole").write_bytes(file.read_bytes())
    whole = Path("whole").read_bytes()
    file.write_bytes(whole[:int(len(whole) * share)])
    with pytest.raises(ValueError, match="^data: .*00-20x16-5.tfrec is cut short"): find_pictures("r")
    assert left_in(home) == []


def without(*names): return lambda i, fields: {k: v for k, v in fields.items() if k not in names or i != 6}
def replaced(**new): return lambda i, fields: fields | ({k.rstrip("_"): v for k, v in new.items()} if i == 6 else {})


@pytest.mark.parametrize("change,message", [
    (without("class"), "record 1 of .*01-20x16-5.tfrec has no field class; it has id, image"), (without("image"), "has no field image; it has class, id"),
    (without("image", "class"), "no field image and no field class"), (replaced(class_=(2.5, "float")), "one whole number in class"),
    (replaced(class_=([1, 2], "int")), "one whole number in class"), (replaced(class_=(b"rose", "byte")), "one whole number in class"),
    (replaced(image=(3, "int")), "expected bytes in the field image")])
def test_records_with_wrong_fields(tfrecord, change, message, home):
    records("r", dict(train=[5, 5], val=[5]), change=change)
    with pytest.raises(ValueError, match=f"^data: .*{message}"): find_pictures("r")
    assert left_in(home) == []


def test_records_that_are_missing_or_nonsense(tfrecord, home):
    root = records("r", dict(train=[5, 5, 5], val=[5]))
    (root / "train/01-20x16-5.tfrec").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="^data: r/train lacks the file that begins with 01-"): find_pictures("r")
    (root / "elsewhere").rename(root / "train/01-20x16-6.tfrec")
    with pytest.raises(ValueError, match="has 5 of the 6 records in its name"): find_pictures("r")
    (root / "train/01-20x16-6.tfrec").write_bytes(b"PK\3\4" * 100)
    with pytest.raises(ValueError, match="cut short or not a TFRecord"): find_pictures("r")
    body = b"\xff" * 40
    (root / "train/01-20x16-6.tfrec").rename(root / "train/01.tfrec")
    (root / "train/01.tfrec").write_bytes(struct.pack("<Q", len(body)) + b"0000" + body + b"0000")
    with pytest.raises(ValueError, match="record 0 of .*01.tfrec cannot be read"): find_pictures("r")
    records("flat", {"": [5]}, name="p{i}.tfrec")
    with pytest.raises(ValueError, match="has 5 records, Kaggle Petals has 16,465"): find_pictures("flat")
    assert left_in(home) == []
    Path("nothing").mkdir()
    with pytest.raises(ValueError, match="holds no TFRecord files"): unpack_tfrecords("nothing")


def test_records_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tfrecord.reader", None)
    with pytest.raises(ValueError, match=r"pip install attnpool\[petals\]"): unpack_tfrecords("r")


def test_broken_pictures_in_records(tfrecord):
    records("r", dict(train=[8], val=[5]), change=replaced(image=(b"not a picture", "byte")))
    with pytest.raises(ValueError, match=r"1 of 13 pictures .*train/00006-id6.jpg \(not a picture\)"): get_dls("r", bs=2)
    assert len(get_dls("r", bs=2, size=16, skip_broken=True).train_ds) == 7


# Downloads

@pytest.fixture
def server(tmp_path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}"
        s.shutdown()


def test_names_download_once(server, monkeypatch, home):
    for k in ("http_proxy", "HTTP_PROXY"): monkeypatch.delenv(k, raising=False)
    pictures("imagenette2-160", list(IMAGENETTE)[:2])
    tarred("imagenette2-160", "imagenette2-160.tgz", "w:gz")
    monkeypatch.setitem(SOURCES, "imagenette-160", SOURCES["imagenette-160"]._replace(url=f"{server}/imagenette2-160.tgz"))
    dls = get_dls("imagenette-160", size=16, bs=4, device="cpu")
    assert list(dls.vocab) == ["tench", "English springer"] and len(dls.train_ds) == 12
    assert fetch("imagenette-160") == home.parent / "imagenette2-160" and left_in(home.parent) == ["attnpool", "imagenette2-160"]
    assert sorted(f.name for f in fetch("imagenette-160").iterdir()) == ["train", "val"] and fastai_path("data") == home.parent
    Path("imagenette2-160.tgz").unlink()
    assert len(get_dls("imagenette-160", size=16, bs=4).train_ds) == 12   # from the disk
    monkeypatch.setitem(SOURCES, "imagewoof", SOURCES["imagewoof"]._replace(url=f"{server}/imagewoof2.tgz"))
    with pytest.raises(ValueError, match="^data: imagewoof could not be downloaded .*pass the path of the archive"): get_dls("imagewoof")
    assert left_in(home.parent) == ["attnpool", "imagenette2-160"]


def test_no_network(monkeypatch, home):
    for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"): monkeypatch.setenv(k, "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="^data: imagenette could not be downloaded .*pass the path of the archive, or of its folder"): get_dls("imagenette")
    assert left_in(home.parent) == []
    with pytest.raises(ValueError, match="^data: Kaggle gives out petals only to its users.*tpu-getting-started"): get_dls("petals")


# The blog's versions

def versions(folder, n_valid=2, small="imagenette2-320", large="imagenette2"):
    "Two versions of the same pictures, as JPEG at 40 pixels and as PNG at 400."
    ids = list(IMAGENETTE)[:2]
    pictures(folder / small, ids, 3, n_valid, size=(50, 40), ext="jpg")
    pictures(folder / large, ids, 3, n_valid, size=(500, 400))
    return folder / small


def test_the_blog_trained_on_smaller_files():
    assert [blog_version(d) for d in ("imagenette", "imagewoof", "petals-512")] == ["imagenette-320", "imagewoof-320", "petals"]
    for other in ("imagenette-320", "imagenette-160", "petals", "digits", "./imagenette", Path("imagenette")): assert blog_version(other) == other
    assert all(s.larger in ("", *SOURCES) for s in SOURCES.values()) and set(SOURCES) < set(DATASETS)


@pytest.mark.parametrize("by", ["name", "path", "archive"])
def test_larger_validation_pictures_come_from_the_full_size_version(by, home, capfd):
    root = versions(home.parent)
    if by == "archive":
        with tarfile.open(home.parent / "imagenette2.tgz", "w:gz") as tar: tar.add(home.parent / "imagenette2", "imagenette2")
        shutil.rmtree(home.parent / "imagenette2")
    dls = get_dls("imagenette-320" if by == "name" else root, size=224, bs=4, device="cpu")
    full = picture_dls(home.parent / ("imagenette2.tgz" if by == "archive" else "imagenette2"), 256, 4, "cpu", cache_gb=0)
    (x, y), (u, v) = plain(valid_dl(dls, 256, bs=4))[0], plain(full.valid)[0]
    assert torch.equal(x, u) and torch.equal(y, v) and len(y) == 4
    small = plain(valid_dl(dls, 248, bs=4))[0][0]
    own = plain(picture_dls(root, 248, 4, "cpu", cache_gb=0).valid)[0][0]
    assert torch.equal(small, own) and dls.listing.root == Path(root) and capfd.readouterr().err == ""


def test_versions_must_show_the_same_pictures(home):
    root = versions(home.parent, n_valid=3)
    larger = root.with_name("imagenette2")
    for f in larger.glob("val/*/2.png"): f.rename(f.with_name("9.png"))
    dls = get_dls("imagenette-320", size=32, bs=4, device="cpu")
    with pytest.raises(BadInput, match="^data: .*imagenette2 should hold the validation pictures .* but 2 are not there .*val/n01440764/2,"): valid_dl(dls, 256)
    for f in larger.glob("val/*/9.png"): f.rename(f.with_name("2.png"))
    assert len(valid_dl(dls, 256).dataset) == 6
    (larger / "val/n01440764/2.png").write_bytes(b"")
    with pytest.raises(BadInput, match="^data: broken pictures in .*imagenette2: val/n01440764/2.png"): valid_dl(dls, 256)


def test_without_the_full_size_version_its_own_files_are_used_and_it_is_said(home, monkeypatch, capfd):
    for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"): monkeypatch.setenv(k, "http://127.0.0.1:9")
    shutil.rmtree(versions(home.parent).with_name("imagenette2"))
    dls = get_dls("imagenette-320", size=32, bs=4, device="cpu")
    x = plain(valid_dl(dls, 256, bs=4))[0][0]
    assert torch.equal(x, plain(picture_dls("imagenette-320", 256, 4, "cpu", cache_gb=0).valid)[0][0])
    assert "attnpool: the larger pictures of imagenette-320 are not at hand, its own files are used. data: imagenette could not" in capfd.readouterr().err


def test_petals_have_larger_records_beside_them(tfrecord, capfd):
    def change(size):
        def change(i, fields):
            Image.new("RGB", (size, size), (20 * i, 0, size // 4)).save(b := io.BytesIO(), "PNG")
            return fields | dict(image=(b.getvalue(), "byte"))
        return change
    for size in (224, 512): records(f"kaggle/tfrecords-jpeg-{size}x{size}", dict(train=[4], val=[4]), change=change(size), name="{i:02}-9x9-{n}.tfrec")
    dls = get_dls("kaggle/tfrecords-jpeg-224x224", size=32, bs=4, device="cpu")
    def channels(dl): return plain(dl)[0][0][:, :, 9, 9] * torch.tensor([.282, .245, .272]) + torch.tensor([.453, .415, .306])
    assert np.allclose(channels(valid_dl(dls, 256, bs=4))[:, 2] * 255, 128, atol=.1) and np.allclose(channels(dls.valid)[:, 2] * 255, 56, atol=.1)
    assert np.allclose(channels(valid_dl(dls, 256, bs=4))[:, 0] * 255, [80, 100, 120, 140], atol=.1)
    shutil.rmtree("kaggle/tfrecords-jpeg-512x512")
    assert np.allclose(channels(valid_dl(dls, 256, bs=4))[:, 2] * 255, 56, atol=.1)
    assert "not at hand" in (said := capfd.readouterr().err) and "tfrecords-jpeg-512x512" in said


# Identity

def test_the_same_pictures_have_one_fingerprint_wherever_they_lie(home, monkeypatch):
    root = pictures("photos")
    a = identify("./photos")
    assert len(a.fingerprint) == 16 and identify("photos/") == a == identify(root.resolve()) == identify(tarred("photos", "photos.tar"))
    shutil.copytree("photos", "else/where/photos")
    for f in Path("else").rglob("*.png"): os.utime(f, (1, 1))
    assert identify("else/where/photos") == a and identify("else/where/photos").path == "else/where/photos"
    monkeypatch.chdir("else")
    assert identify("where/photos") == a
    monkeypatch.chdir("..")
    shutil.copytree("photos", "other")
    b = identify("./other")
    assert b.fingerprint == a.fingerprint and b != a   # of another name
    assert identify("digits").fingerprint == ""


def test_swapped_classes_of_one_size_and_time_are_decoded_again(home):
    root = pictures("photos", ext="bmp")
    for f in root.rglob("*.bmp"): os.utime(f, (1, 1))
    def seen(): return get_dls("./photos", 16, 4, "cpu", augment="none").valid.one_batch()[0]
    before = seen()
    for split in ("train", "val"):
        for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")): (root / split / old).rename(root / split / new)
    assert torch.allclose(seen(), before.roll(2, 0), atol=1e-3)


@pytest.mark.parametrize("change", [
    lambda r: picture(r / "train/cat/0.png", seed=77), lambda r: (r / "train/cat/0.png").unlink(), lambda r: picture(r / "val/dog/9.png"),
    lambda r: (r / "train/cat/0.png").rename(r / "train/dog/new.png"), lambda r: (r / "train/cat/5.png").rename(r / "val/cat/5.png"),
    lambda r: (r / "train/cat/0.png").rename(r / "train/cat/zero.png"), lambda r: [(r / s / "cat").rename(r / s / "a_cat") for s in ("train", "val")]])
def test_whatever_changes_a_data_set_changes_its_fingerprint(change):
    root = pictures("photos")
    before = identify(root)
    change(root)
    assert identify(root).name == before.name and identify(root).fingerprint != before.fingerprint


@pytest.mark.parametrize("size,at,seen", [(60_000, 30_000, True), (65_536, 20_000, True), (200_000, 100, True), (200_000, 100_000, True),
                                          (200_000, 199_990, True), (200_000, 40_000, False)])
def test_large_files_are_read_at_head_middle_and_tail(size, at, seen):
    listing = list_folder(pictures("photos"))
    file = listing.root / listing.files[0]
    content = bytearray(np.random.default_rng(0).bytes(size))
    file.write_bytes(content)
    before = digests(listing)
    content[at] ^= 1
    file.write_bytes(content)
    assert (digests(listing) != before) == seen
    file.write_bytes(bytes(content[:at]) + b"x" + bytes(content[at:]))   # of another length
    assert digests(listing) != before


def test_a_table_has_the_same_digests_with_relative_and_absolute_paths():
    for place in ("a", "b/c"):
        pictures(f"{place}/pets")
        files = sorted(Path(place).rglob("*.png"))
        for name, paths in (("near", [f.relative_to(place) for f in files]), ("far", [f.resolve() for f in files])):
            Path(place, f"{name}.csv").write_text("path,label,split\n" + "".join(f"{p},{f.parent.name},{f.parts[-3]}\n" for p, f in zip(paths, files)))
    near, far = (digests(list_csv(f"a/{n}.csv")) for n in ("near", "far"))
    assert near == digests(list_csv("b/c/near.csv")) and far == digests(list_csv("b/c/far.csv"))
    assert list(near.values()) == list(far.values()) and "pets/train/cat/0.png" in near and "train/cat/0.png" in far
    Path("a/gone.csv").write_text("path,label,split\nnope.png,x,train\n./pets/train/cat/0.png,x,val\n")
    gone = digests(list_csv("a/gone.csv"))
    assert gone["nope.png"] == ("x", "train", "") and gone["pets/train/cat/0.png"][1:] == ("val", near["pets/train/cat/0.png"][2])


def test_digests_are_kept_as_a_table_and_compared():
    root = pictures("photos", ("cat", 'a "dog", or two'), ext="png")
    old = digests(list_folder(root))
    write_digests(list_folder(root), "p.csv")
    assert read_digests("p.csv") == old and fingerprint(read_digests("p.csv")) == identify(root).fingerprint
    assert list_csv("p.csv").labels == list_folder(root).labels and differences(old, old) == ""
    picture(root / "val/cat/new.png")
    (root / "train/cat/0.png").unlink()
    for i in range(1, 6): picture(root / f"train/cat/{i}.png", seed=100 + i)
    said = differences(old, digests(list_folder(root)))
    assert said == "1 added: val/cat/new.png; 1 removed: train/cat/0.png; 5 changed: train/cat/1.png, train/cat/2.png, train/cat/3.png and 2 more"
    new = {f: (l if f != "val/cat/0.png" else "dog", s if f != "val/cat/1.png" else "train", d) for f, (l, s, d) in old.items()}
    assert differences(old, new) == "1 relabelled: val/cat/0.png (cat, now dog); 1 moved between training and validation: val/cat/1.png"
    many = list_folder(root)
    many = type(many)("many", many.root, [f"{i}.png" for i in range(50_001)], ["x"] * 50_001, 40_000)
    write_digests(many, "many.csv")
    assert not Path("many.csv").exists()


# Pictures to look at

def test_pictures_to_look_at_come_from_all_classes_or_in_the_order_of_their_boxes():
    pictures("pets", ("ant", "bee", "cat"), n_valid=4)
    dls = get_dls("./pets", 16, 4, "cpu")
    x, y, boxes = validation_pictures(dls, 3)
    rows = torch.cat([x for x, _ in plain(dls.valid)])
    assert boxes is None and y.tolist() == [0, 1, 2] and torch.equal(x, rows[[0, 6, 11]]) and type(x) is torch.Tensor
    x, y, _ = validation_pictures(dls, 99)
    assert torch.equal(x, rows) and y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    d = digits_dls(20, 16, "cpu", n_train=32, n_valid=12)
    x, y, boxes = validation_pictures(d, 5)
    assert torch.equal(x, plain(d.valid)[0][0][:5]) and torch.equal(boxes, d.boxes[:5]) and y.tolist() == plain(d.valid)[0][1][:5].tolist()
    assert all(len(o) == 12 for o in validation_pictures(d, 13))
    with pytest.raises(BadInput, match="^n: expected 1 picture or more, got 0"): validation_pictures(d, 0)


def test_data_without_labels_or_without_pictures_to_look_at():
    from fastai.data.all import DataLoaders, Datasets
    from fastai.vision.all import ToTensor
    files = sorted(pictures("pets").rglob("*.png"))
    dls = Datasets(files, [[PILImage.create]], splits=(range(8), range(8, 16))).dataloaders(bs=4, after_item=ToTensor(), device="cpu")
    x, y, boxes = validation_pictures(dls, 4)
    assert x.shape == (4, 3, 16, 20) and y is None and boxes is None
    for empty in (get_dls("./pets", 16, 4, "cpu").new_empty(), DataLoaders(dls.train)):
        with pytest.raises(BadInput, match="^dls: it holds no validation pictures; an exported Learner keeps none"): validation_pictures(empty, 4)


# Digits

@pytest.mark.parametrize("n", [3, 4, 6, 8])
def test_small_digits_have_their_size_and_their_clutter_its_density(n):
    dls = get_dls(f"digits-{n}", 64, 16, "cpu", n_train=60, n_valid=40)
    assert identify(f"digits-{n}").family == dls.family == "digits"
    left, top, right, bottom = dls.boxes.T
    assert torch.equal(right - left, bottom - top) and dls.boxes.min() >= 0 and dls.boxes.max() <= 64
    assert round(.85 * 64 / n) <= (right - left).min() < 64 / n < (right - left).max() <= round(1.15 * 64 / n)
    d = cluttered_digits(64, 60, 40, share=1 / n)
    for image, (l, t, r, b) in zip(d.images, d.boxes.tolist()): image[t:b, l:r] = 0
    usual = cluttered_digits(64, 60, 40)
    for image, (l, t, r, b) in zip(usual.images, usual.boxes.tolist()): image[t:b, l:r] = 0
    def outside(d): return (d.images > 0).sum() / (64**2 - ((d.boxes[:, 2] - d.boxes[:, 0])**2).float().mean()) / 100
    assert .6 < outside(d) / outside(usual) < 1.4


@pytest.mark.parametrize("share", [1 / 20, 0, -1, .9, 2])
def test_digits_that_do_not_fit_are_told(share):
    with pytest.raises(BadInput, match="^share: digits of .* do not fit a canvas of 40"): cluttered_digits(40, 4, 4, share=share)


def test_digits_are_pasted_whole_and_split_by_original():
    from sklearn.datasets import load_digits
    d, originals = cluttered_digits(size=40, n_train=300, n_valid=100), load_digits()
    assert d.images.dtype == torch.uint8 and d.images.shape == (400, 40, 40)
    assert not set(d.sources[:300].tolist()) & set(d.sources[300:].tolist())
    assert torch.equal(d.labels, torch.tensor(originals.target)[d.sources])
    for image, (l, t, r, b), source in zip(d.images, d.boxes.tolist(), d.sources.tolist()):
        assert 0 <= l < r <= 40 and 0 <= t < b <= 40 and r - l == b - t
        small = torch.tensor(originals.images[source] / 16)[None, None]
        digit = torch.nn.functional.interpolate(small, size=(b - t, r - l), mode="bilinear")[0, 0]
        assert (image[t:b, l:r] >= (digit * 255).round() - 1).all()   # the digit shines through everything
    assert torch.equal(d.images, cluttered_digits.__wrapped__(size=40, n_train=300, n_valid=100).images)
    assert not torch.equal(d.images, cluttered_digits(size=40, n_train=300, n_valid=100, seed=1).images)


def test_digits_are_normalised_and_keep_their_boxes_in_order():
    dls = digits_dls(size=24, bs=50, n_train=200, n_valid=70)
    assert dls.c == 10 and len(dls.boxes) == 70 and (len(dls.train_ds), len(dls.valid_ds)) == (200, 70)
    x = torch.cat([xb for xb, _ in dls.train])
    assert x.shape[1:] == (3, 24, 24) and x.mean().abs() < .05 and (x.std() - 1).abs() < .05
    data = cluttered_digits(24, 200, 70)
    labels = torch.cat([yb for _, yb in dls.valid])
    assert torch.equal(labels.as_subclass(torch.Tensor), data.labels[200:]) and torch.equal(dls.boxes, data.boxes[200:])


# Describe

def test_a_description_counts_and_names(home):
    root = pictures("nette", list(IMAGENETTE)[:2], 6, 2, size=(40, 30))
    picture(root / "train/n01440764/wide.png", (100, 50))
    (root / "val/n01440764/zero.jpg").touch()
    d = describe(root, picture="b.png", size=32)
    assert d.name == "nette" and d.counts == {"tench": (7, 3), "English springer": (6, 2)} and d.broken == {"val/n01440764/zero.jpg": "zero bytes"}
    text = str(d)
    assert text == d.text and max(map(len, text.splitlines())) <= 80
    for line in ("nette: 13 training and 5 validation pictures of 2 classes", "imagenette: not the official split, which has 9,469 and 3,925",
                 "tench                   7      3", "  width            40      40    100", "  height           30      30     50", "Broken pictures: 1", "  val/n01440764/zero.jpg: zero bytes"):
        assert line in text.splitlines(), text
    bars = [l for l in text.splitlines() if l.endswith("#")]
    assert sum(int(l.split()[-2]) for l in bars) == 17
    assert Image.open("b.png").size[0] > 500
    state = torch.get_rng_state(), random.getstate()
    first = Path("b.png").read_bytes()
    describe(root, picture="b.png", size=32)
    assert Path("b.png").read_bytes() == first and torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    with pytest.raises(FileNotFoundError, match="^picture: there is no folder nowhere"): describe(root, picture="nowhere/b.png")
    with pytest.raises(ValueError, match="^data: 'imagenett' is unknown"): describe("imagenett")


def test_digits_are_described_too():
    d = describe("digits", picture="b.png")
    assert sum(a for a, _ in d.counts.values()) == 1500 and sum(b for _, b in d.counts.values()) == 1000 and d.counts.keys() == set(range(10))
    assert d.broken == {} and Path("b.png").stat().st_size > 1000


def test_a_file_is_replaced_whole_or_not_at_all(monkeypatch):
    write_file("a.txt", "one")
    write_file(Path("a.txt"), b"two")
    assert Path("a.txt").read_text() == "two" and os.listdir() == ["a.txt"]
    def fail(fd): raise OSError("the power went off")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="power"): write_file("a.txt", "three")
    assert Path("a.txt").read_text() == "two"


def test_a_config_of_fastais_that_another_process_is_just_writing(home, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(home / "new"))
    (home / "new").mkdir(parents=True)
    (config := home / "new" / "config.ini").touch()   # opened, and nothing written yet
    fastai_cfg.cache_clear()
    writer = subprocess.Popen([sys.executable, "-c", "import sys, time; time.sleep(.3); open(sys.argv[1], 'w').write('[DEFAULT]\\ndata = there\\n')", str(config)])
    assert fastai_folder() == home / "new" / "there" and writer.wait() == 0
    with pytest.raises(BadInput, match="^cache: .*config.ini names no folder for archive. Delete that file"): fastai_folder("archive")
    config.unlink()
    fastai_cfg.cache_clear()
    assert fastai_folder("archive") == home / "new" / "archive" and "data = data" in config.read_text()


def test_the_file_of_made_once_is_named_only_when_it_is_whole(home):
    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): made_once(home / "a", fail)
    assert left_in(home) == []
    with pytest.raises(FileNotFoundError, match="mine"): made_once(home / "a", lambda f: open("mine"))   # not the cache's fault
