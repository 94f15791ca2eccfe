"One reader: which files are pictures, which pixels they have, and that these are the same however they come."
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import PILImage, load_learner
from PIL import Image

from attnpool.cli import main
from attnpool.cost.timing import write_costs
from attnpool.data import describe, get_dls, identify
from attnpool.data import check as check_room
from attnpool.data.check import check_pictures
from attnpool.data.listing import list_folder
from attnpool.data.pictures import empty_dls, picture_dls, valid_dl
from attnpool.data.reader import BrokenPicture, is_picture, load_picture, open_picture, picture_files
from attnpool.registry import BadInput


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fastai_cfg.cache_clear()


COLOURS = dict(red=(200, 40, 40), green=(40, 160, 40), blue=(40, 40, 200))


def noise(colour, seed, size=(32, 32)):
    "A picture of about one colour, no two alike."
    w, h = size
    levels = np.random.default_rng(seed).integers(-30, 30, (h, w, 3)) + np.array(colour)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def pictures(root, classes=("red", "green"), n=4, size=(32, 32), ext="png"):
    for c, name in enumerate(classes):
        (folder := Path(root, name)).mkdir(parents=True, exist_ok=True)
        for i in range(n): noise(COLOURS.get(name, (90, 90, 90)), 1000 * c + i, size).save(folder / f"{i}.{ext}")
    return Path(root)


def plain(dl): return torch.cat([b[0].as_subclass(torch.Tensor) for b in dl])


def png(size, depth, colour, rows, *chunks):
    "A PNG by hand: `colour` is its type, `rows` the bytes of all rows, each after its filter."
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(pixels, name, mode=None, **options):
    im = Image.fromarray(np.array(pixels))
    (im.convert(mode) if mode else im).save(name, **options)
    return Path(name).read_bytes()


def animation():
    frames = [Image.new("RGB", (2, 1), c) for c in ("red", "lime")]
    frames[0].save("x.gif", save_all=True, append_images=frames[1:])
    return Path("x.gif").read_bytes()


def palette():
    im = Image.new("P", (2, 1))
    im.putpalette([200, 0, 0, 0, 0, 200])
    im.putpixel((1, 0), 1)
    im.save("x.png", transparency=bytes([255, 0]))
    return Path("x.png").read_bytes()


f32, i32, u16, u8 = np.float32, np.int32, np.uint16, np.uint8
WHITE = (255, 255, 255)


@pytest.mark.parametrize("make, want", [
    (lambda: saved(u8([[[9, 8, 7], [1, 2, 3]]]), "x.png"), [(9, 8, 7), (1, 2, 3)]),
    (lambda: saved(u8([[[9, 8, 7, 255], [200, 0, 0, 0]]]), "x.png"), [(9, 8, 7), WHITE]),
    (lambda: saved(u8([[[0, 100, 200, 51]]]), "x.png"), [(204, 224, 244)]),   # a fifth of it, four of white
    (lambda: saved(u8([[[90, 255], [90, 0]]]), "x.png"), [(90, 90, 90), WHITE]),
    (palette, [(200, 0, 0), WHITE]),
    (lambda: png((2, 1), 8, 2, b"\0\1\2\3\4\5\6", (b"tRNS", struct.pack(">3H", 4, 5, 6))), [(1, 2, 3), WHITE]),
    (lambda: png((2, 1), 16, 2, b"\0" + struct.pack(">6H", 0x1234, 0, 0, 0xff00, 0, 0), (b"tRNS", struct.pack(">3H", 0x1234, 0, 0))), [WHITE, (255, 0, 0)]),
    (lambda: png((2, 1), 16, 0, b"\0" + struct.pack(">2H", 0x1234, 0x8000), (b"tRNS", struct.pack(">H", 0x1234))), [WHITE, (128,) * 3]),
    (lambda: png((4, 1), 2, 0, b"\0\x1b", (b"tRNS", b"\0\1")), [(0,) * 3, WHITE, (170,) * 3, WHITE]),   # levels 0 to 3, of which 1 is clear
    (lambda: png((4, 1), 2, 0, b"\0\x1b"), [(0,) * 3, (85,) * 3, (170,) * 3, WHITE]), (lambda: png((2, 1), 1, 0, b"\0\x80", (b"tRNS", b"\0\0")), [WHITE, WHITE]),
    (lambda: png((2, 1), 4, 0, b"\0\x0f", (b"tRNS", b"\0\0")), [WHITE, WHITE]), (lambda: png((2, 1), 4, 0, b"\0\x1f", (b"tRNS", b"\0\x0f")), [(17,) * 3, WHITE]),
    (lambda: png((1, 1), 16, 6, b"\0" + struct.pack(">4H", 0x8000, 0x4000, 0, 0xffff)), [(128, 64, 0)]),
    (lambda: saved(np.array([[True, False]]), "x.png"), [WHITE, (0, 0, 0)]),
    (lambda: saved(u8([[7, 250]]), "x.png"), [(7,) * 3, (250,) * 3]),
    (lambda: saved(u16([[0, 255, 256, 40_000, 65535]]), "x.png"), [(v,) * 3 for v in (0, 0, 1, 156, 255)]),
    (lambda: saved(np.array([[0, 256, 65535]], ">u2"), "x.tif"), [(v,) * 3 for v in (0, 1, 255)]),
    (lambda: saved(i32([[-5, 256, 65535, 10**6]]), "x.tif"), [(v,) * 3 for v in (0, 1, 255, 255)]),
    (lambda: saved(f32([[-1, 0, .5, 1]]), "x.tif"), [(v,) * 3 for v in (0, 0, 128, 255)]),
    (lambda: saved(f32([[-1, 0, .5, 1.5, 255]]), "x.tif"), [(v,) * 3 for v in (0, 0, 0, 2, 255)]),
    (lambda: saved(f32([[0, 255, 256, 65535, 10**6]]), "x.tif"), [(v,) * 3 for v in (0, 0, 1, 255, 255)]),
    (lambda: saved(u8([[[200, 100, 40]]]), "x.tif", "CMYK"), [(200, 100, 40)]),
    (animation, [(255, 0, 0), (255, 0, 0)])])
def test_every_kind_of_picture_becomes_eight_bits_of_rgb(make, want):
    Path("picture.png").write_bytes(content := make())
    for given in (Path("picture.png"), "picture.png", content):
        im = open_picture(given)
        assert im.mode == "RGB" and np.abs(np.array(im)[0].astype(int) - want).max() <= (1 if want[0] == (200, 100, 40) else 0)


# Blocks a b c over d e f; the same, as EXIF stores what should be seen so
UPRIGHT = np.arange(6).reshape(2, 3) * 40
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.T, 6: np.rot90(UPRIGHT), 7: np.rot90(UPRIGHT, 2).T, 8: np.rot90(UPRIGHT, -1)}


@pytest.mark.parametrize("ext, options", [("jpg", dict(quality=100)), ("png", {}), ("webp", dict(lossless=True)), ("tif", {})])
def test_a_picture_is_seen_upright(ext, options):
    for number, blocks in STORED.items():
        exif = Image.Exif()
        exif[0x112] = number
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1).astype(u8)).convert("RGB").save(f"x.{ext}", exif=exif, **options)
        seen = np.array(open_picture(f"x.{ext}"))[4::8, 4::8, 0].astype(int)
        assert seen.shape == UPRIGHT.shape and np.abs(seen - UPRIGHT).max() <= 2, number


def test_damaged_notes_of_a_camera_leave_the_picture_whole():
    for exif in (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x06\0\0\0\xff\xff\0\0"):
        Image.new("RGB", (8, 8), "red").save("x.jpg", exif=exif)
        assert open_picture("x.jpg").size == (8, 8)


def torn(name, cut): return lambda: Path(name).write_bytes(saved(np.array(noise((9, 9, 9), 0)), "whole.png")[:cut])


def damaged():
    content = bytearray(saved(np.array(noise((9, 9, 9), 0)), "whole.png"))
    content[content.index(b"IDAT") + 40] ^= 255
    Path("x.png").write_bytes(content)


BROKEN = [
    (torn("x.png", 60), "truncated"), (torn("x.png", 8), "not a picture"), (damaged, "."), (lambda: Path("x.png").touch(), "zero bytes"),
    (lambda: Path("x.png").write_text("<html>404</html>"), "not a picture"), (lambda: Path("x.png").mkdir(), "Is a directory"),
    (lambda: os.mkfifo("x.png"), "not a file"), (lambda: os.symlink("nowhere", "x.png"), "No such file"),
    (lambda: Path("x.png").write_bytes(png((20_000, 20_000), 8, 0, b"\0")), "400000000 pixels"),
    (lambda: Path("x.png").write_bytes(png((1, 1), 8, 0, b"\0\0", (b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))))), "too large"),
    (lambda: Path("x.png").write_bytes(png((1, 1), 8, 0, b"\0\0", (b"tRNS", b""))), "."),
    (lambda: Path("x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"), "not a picture"),
    (lambda: saved(f32([[np.nan, 1]]), "x.tif") and os.rename("x.tif", "x.png"), "NaN"),
    (lambda: saved(f32([[np.inf, 1]]), "x.tif") and os.rename("x.tif", "x.png"), "infinity")]


@pytest.mark.parametrize("make, why", BROKEN)
def test_what_cannot_be_read_is_one_kind_of_error_everywhere(make, why):
    make()
    with pytest.raises(BrokenPicture, match=f"^file: x.png cannot be read as a picture .*{why}") as e: open_picture("x.png")
    assert "\n" not in str(e.value) and why.strip(".") in e.value.why and isinstance(e.value, BadInput)
    back = pickle.loads(pickle.dumps(e.value))   # as a process that loads hands it on
    assert str(back) == str(e.value) and back.why == e.value.why
    dls = empty_dls(16, ["a", "b"], [.5] * 3, [.2] * 3, device="cpu")
    with pytest.raises(BrokenPicture): dls.test_dl(["x.png"]).one_batch()
    root = pictures("pets")
    if Path("x.png").is_dir(): return   # in a folder it is a folder
    shutil.move("x.png", root / "red/x.png")
    assert identify(root).fingerprint and check_pictures(list_folder(root)).broken == {"red/x.png": e.value.why}
    with pytest.raises(BadInput, match="^data: 1 of 9 pictures in pets are broken: red/x.png"): get_dls("./pets", 16, 4, "cpu")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_whatever_is_damaged_is_read_or_broken_and_nothing_else(kind):
    noise((90, 90, 90), 0, (24, 24)).save(whole := io.BytesIO(), kind)
    rng, broken = np.random.default_rng(0), 0
    for i in range(60):
        content = bytearray(whole.getvalue())
        for at in rng.integers(len(content), size=3): content[at] ^= rng.integers(1, 256)
        try: assert open_picture(bytes(content[:rng.integers(1, len(content))] if i % 3 else content)).mode == "RGB"
        except BrokenPicture as e: broken += "\n" not in str(e) and bool(e.why)
    assert broken > 10


def test_without_the_right_to_read(monkeypatch):
    if os.geteuid() == 0: pytest.skip("root may read all")
    noise((9, 9, 9), 0).save("x.png")
    os.chmod("x.png", 0)
    with pytest.raises(BrokenPicture, match="Permission denied"): open_picture("x.png")


# The same pixels

def kinds(root):
    "Training and validation pictures of every kind, in several sizes."
    pictures(root / "train", n=6, size=(90, 70))
    for c, name in enumerate(("red", "green")):
        (folder := root / "val" / name).mkdir(parents=True)
        for i, size in enumerate(((20, 16), (33, 47), (64, 64), (120, 90))):
            im = noise(COLOURS[name], 50 + i, size)
            exif = Image.Exif()
            exif[0x112] = 6
            im.save(folder / f"side{i}.jpg", exif=exif)
            im.putalpha(Image.linear_gradient("L").resize(size))
            im.save(folder / f"clear{i}.png")
            Image.fromarray(np.array(im.convert("L")).astype(u16) * 200).save(folder / f"deep{i}.png")
    return root


@pytest.mark.parametrize("size", [16, 48])
def test_validation_sees_a_file_as_it_is_seen_when_it_comes_otherwise(size):
    root = kinds(Path("pets"))
    dls = picture_dls(root, size, 8, "cpu")
    files = [root / f for f in dls.listing.files[dls.listing.n_train:]]
    seen = plain(dls.valid)
    ways = dict(path=files, text=list(map(str, files)), bytes=[f.read_bytes() for f in files], number=list(range(12, 12 + len(files))),
                pillow=[Image.open(f) for f in files])
    for way, items in ways.items(): assert torch.equal(plain(dls.test_dl(items)), seen), way
    assert torch.equal(plain(picture_dls(root, size, 8, "cpu", cache_gb=0).valid), seen)
    assert torch.equal(plain(picture_dls(root, size, 8, "cpu", num_workers=1).valid), seen)
    assert torch.equal(plain(empty_dls(**dls.about, device="cpu").test_dl(files)), seen)
    for other in (16, 24, 48, 100):
        wanted = plain(picture_dls(root, other, 8, "cpu").valid)
        for gb in (4., 0.): assert torch.equal(plain(valid_dl(picture_dls(root, size, 8, "cpu", cache_gb=gb), other)), wanted)


def test_pixels_of_plain_pictures_are_those_of_pillow():
    root = pictures("pets", size=(90, 61), ext="jpg")
    dls = picture_dls(root, 16, 4, "cpu", augment="none")
    for i, f in enumerate(dls.listing.files):
        with Image.open(root / f) as im: shrunk = im.convert("RGB").resize((47, 32), Image.BILINEAR, reducing_gap=3.)
        assert np.array_equal(dls.train_ds.tls[0].tfms[0].pixels[i], np.asarray(shrunk))
        assert np.array_equal(np.asarray(load_picture(root / f, 32)), np.asarray(shrunk))
        assert load_picture(root / f, 61).size == (90, 61)


def test_an_exported_learner_sees_the_same_and_knows_no_file():
    from attnpool.recipe import recipe_learner
    root = kinds(Path("secretpets"))
    dls = picture_dls(root, 16, 8, "cpu")
    files = [root / f for f in dls.listing.files[dls.listing.n_train:]]
    learn = recipe_learner(dls, "xeca_resnext_tiny", "avg", epochs=1)
    seen = plain(dls.valid)
    learn.export("x.pkl")
    assert b"clear0" not in (content := b"".join(inside("x.pkl"))) and b"secretpets" not in content and b"pixels.bin" not in content
    shutil.move(root, "elsewhere")
    files = [Path("elsewhere") / f.relative_to(root) for f in files]
    code = f"import torch; from fastai.vision.all import load_learner; dl = load_learner('x.pkl').dls.test_dl({list(map(str, files))}); torch.save(torch.cat([b[0] for b in dl]), 'seen.pt')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    assert torch.equal(torch.load("seen.pt", weights_only=False).as_subclass(torch.Tensor), seen)
    again = load_learner("x.pkl")
    with learn.no_bar(), again.no_bar():
        for f in files[:3]: assert torch.equal(again.predict(f)[2], again.predict(PILImage.create(load_picture(f, 32)))[2])
    assert list(again.dls.vocab) == ["green", "red"] and len(again.dls.train_ds) == 0


def inside(file):
    import zipfile
    with zipfile.ZipFile(file) as z:
        for name in z.namelist(): yield z.read(name)


def test_what_processes_are_handed_is_complete():
    dls = picture_dls(pictures("pets"), 16, 4, "cpu")
    for ds in (dls.train_ds, dls.valid_ds):
        copy = pickle.loads(pickle.dumps(ds))   # as for processes that are not forked
        assert len(copy) == len(ds) and all(np.array_equal(np.asarray(a[0]), np.asarray(b[0])) and a[1] == b[1] for a, b in zip(copy, ds))


def test_what_another_reader_has_decoded_is_decoded_again(monkeypatch):
    l = list_folder(pictures("pets"))
    now = check_pictures(l).path
    monkeypatch.setattr(check_room, "READER", 1)
    assert check_pictures(l).path != now


def test_data_of_one_name_and_of_files_of_one_size_and_time_are_decoded_apart():
    for where, colour in (("a", 10), ("b", 200)):
        for c in range(2):
            for i in range(4):
                (f := Path(where, "photos", f"class{c}", f"{i}.bmp")).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 16), (colour + 20 * c,) * 3).save(f)
                os.utime(f, (1, 1))
    a, b = (picture_dls(f"{where}/photos", 16, 4, "cpu") for where in "ab")
    assert a.about["mean"] != b.about["mean"] and a.train_ds[0][0].getpixel((0, 0)) == (10,) * 3 and b.train_ds[0][0].getpixel((0, 0)) == (200,) * 3


# Which files

def test_pictures_are_told_by_endings_of_our_own_and_by_content(capfd):
    root = pictures("pets")
    whole, names = (root / "red/0.png").read_bytes(), ["a.JPG", "b.jfif", "c.webp", "d.Tiff", "e.jpe", "noending", "odd.xyz", "f.AVIF"]
    for name in names: (root / "red" / name).write_bytes(whole)
    none = {"red/._0.png": whole, "red/.DS_Store": b"x", "red/a.pdf": b"%PDF-1.4", "green/a.txt": b"hello", "green/a.svg": b"<svg/>", "green/empty": b""}
    for name, content in none.items(): (root / name).write_bytes(content)
    (root / "green/.hidden").mkdir()
    (root / "green/.hidden/0.png").write_bytes(whole)
    l = list_folder(root)
    assert sorted(f for f in l.files if f.startswith("red")) == sorted(f"red/{n}" for n in [*names, *(f"{i}.png" for i in range(4))])
    found, left_out = picture_files(root)
    assert [str(f.relative_to(root)) for f in left_out] == sorted([*none, "green/.hidden"]) and len(found) == len(l.files) == 16
    assert not is_picture(root / "red/._0.png") and is_picture(root / "red/noending")
    note, = l.notes
    assert note == "left out, as they are no pictures: 7 (green/.hidden, green/a.svg, green/a.txt and 4 more)"
    assert note in describe(root, size=16).text and capfd.readouterr().err == ""
    identify(root)
    assert capfd.readouterr().err == ""   # it has been told
    assert identify(shutil.copytree(root, "others")).fingerprint == identify(root).fingerprint
    assert capfd.readouterr().err == f"attnpool: others: {note}.\n"


def test_a_folder_of_other_files_only_says_what_they_are():
    for i in range(9): (f := Path(f"phone/red/{i}.heic")).parent.mkdir(parents=True, exist_ok=True) or f.write_bytes(b"ftypheic")
    with pytest.raises(BadInput, match=r"^data: phone holds no pictures, but 9 other files \(0.heic, 1.heic, 2.heic and 6 more\). Expected"): list_folder("phone")


def test_a_picture_by_its_ending_that_is_none_is_broken_and_not_left_out():
    root = pictures("pets")
    (root / "red/page.jpg").write_text("<html>")
    os.symlink("nowhere", root / "red/link.png")
    assert check_pictures(list_folder(root)).broken == {"red/page.jpg": "not a picture", "red/link.png": "No such file or directory"}


def test_links_are_followed_and_circles_survived():
    root = pictures("far/away", ("red", "green"))
    Path("pets").mkdir()
    os.symlink(root.resolve() / "red", "pets/red")
    (Path("pets") / "green").mkdir()
    for f in (root / "green").iterdir(): os.symlink(f.resolve(), Path("pets/green") / f.name)
    os.symlink(Path("pets").resolve(), "pets/green/circle")
    os.symlink(Path("pets").resolve(), root / "red/back")
    l = list_folder("pets")
    assert sorted(l.files) == sorted(f"{c}/{i}.png" for c in ("red", "green") for i in range(4)) and l.notes == ()
    assert len(picture_files("pets")[0]) == 8


# Which folders

@pytest.mark.parametrize("train, valid", [
    ("Train", "Valid"), ("TRAINING", "VAL"), ("training", "Validation"), ("seg_train/seg_train", "seg_val/seg_val"), ("my-train", "my-valid"),
    ("train2017", "val2017"), ("trainset", "validation_set"), ("data/Train/train", "data/Val/val"), ("a/a/train/train/train", "a/a/val"), ("train", "my val")])
def test_the_folders_of_a_split_in_any_case_and_wrapping(train, valid):
    pictures(f"pets/{train}", n=3)
    pictures(f"pets/{valid}", n=2)
    Path("pets/README.md").touch()
    l = list_folder("pets").checked()
    assert l.n_train == 6 and len(l.files) == 10 and list(l.classes) == ["green", "red"] and l.name == "pets"
    assert all((l.root / f).is_file() for f in l.files) and l.notes == ()
    assert all(f"{train}/" in str(l.root / f) for f in l.files[:6]) and all(f"{valid}/" in str(l.root / f) for f in l.files[6:])


@pytest.mark.parametrize("train, test", [("train", "test"), ("Training", "TESTING"), ("seg_train/seg_train", "seg_test/seg_test")])
def test_a_test_folder_validates_where_there_is_no_other_and_it_is_said(train, test, capfd):
    pictures(f"pets/{train}", n=3)
    pictures(f"pets/{test}", n=2)
    l = list_folder("pets")
    said = f"there is no folder val, so the pictures of {test.split('/')[0]} validate"
    assert (l.n_train, len(l.files)) == (6, 10) and l.notes == (said,)
    assert said in describe("./pets", size=16).text.splitlines()
    shutil.copytree("pets", "cats")
    get_dls("./cats", 16, 4, "cpu")
    assert capfd.readouterr().err == f"attnpool: cats: {said}.\n"
    pictures("pets/val", n=1)
    l = list_folder("pets")
    assert len(l.files) == 8 and l.notes == (f"the pictures of {test.split('/')[0]} are left alone; attnpool bench --test tries each run on them once, at its end",)


@pytest.mark.parametrize("inside", ["", "images", "unknown/more"])
def test_a_test_folder_without_the_classes_does_not_validate(inside):
    pictures("pets/train", n=5)
    (folder := Path("pets/test", inside)).mkdir(parents=True)
    for i in range(3): noise((9, 9, 9), i).save(folder / f"{i}.png")
    l = list_folder("pets")
    assert (l.n_train, len(l.files)) == (8, 10) and all(f.startswith("train/") for f in l.files)
    assert l.notes == ("the folder test has no classes that train, so a part of the training pictures validates",)


def test_classes_that_are_called_like_a_split():
    l = list_folder(pictures("vehicles", ("car", "bus", "train")))
    assert set(l.labels) == {"car", "bus", "train"} and l.notes == ()
    pictures("vehicles", ("test",))   # now it looks like a split without classes
    with pytest.raises(BadInput, match="^data: 4 pictures lie outside of a class's folder: vehicles/train/0.png"): list_folder("vehicles")


@pytest.mark.parametrize("folders, message", [
    (["train", "Train"], "has the folders Train and train, and only one can be train"), (["train", "val", "valid"], "has the folders val and valid, and only one can be val"),
    (["one", "two"], r"the folders one, two in pets all have the same subfolders \(green, red\), which are probably the classes.*pass one of them: pets/one"),
    (["train/one", "train/two", "val/red"], r"the folders one, two in pets/train all have the same subfolders"), (["Val"], "has a folder Val but no folder train"),
    (["cats/train", "cats/val", "dogs/train", "dogs/val"], "split lies one level too deep: the classes cats, dogs in pets have the folders train, val. Move cats/train to train/cats"),
    (["cats/Test", "cats/train", "dogs/train"], "split lies one level too deep.* have the folders Test, train")])
def test_folders_that_cannot_be_meant(folders, message):
    for f in folders: pictures(f"pets/{f}", n=2)
    with pytest.raises(BadInput, match=f"^data: .*{message}"): list_folder("pets").checked()


def test_classes_may_have_one_subfolder_each_or_some_of_their_own():
    for c in ("ant", "bee"): pictures(f"tiny/{c}", ("images",))   # as in Tiny ImageNet
    assert set(list_folder("tiny").labels) == {"ant", "bee"}
    pictures("some/ant", ("front", "side"))
    pictures("some/bee", ("front", "top"))
    assert set(list_folder("some").labels) == {"ant", "bee"}


# What this library writes

def called(*words):
    with pytest.raises(SystemExit) as e: main(list(words))
    return e.value.code


BENCH = "--heads avg --seeds 1 --epochs 1 --size 16 --bs 4 --device cpu".split()


def test_own_outputs_are_not_taken_for_data(monkeypatch, capfd):
    root = pictures("photos", n=6)
    before = identify(root)
    monkeypatch.chdir(root)
    for _ in range(2): assert called("data", ".", "--size", "16") == 0
    assert Path("photos.png").exists() and identify(".") == before
    for _ in range(2): assert called("bench", ".", *BENCH) == 0
    monkeypatch.chdir("..")
    outs = ("photos/results", "photos/deep/er", "photos", "photos/red")
    for out in outs:
        for _ in range(2): assert called("bench", "photos", *BENCH, "--out", out) == 0, capfd.readouterr()
    assert all(len(list(Path(out).glob("photos-avg-1-*/result.json"))) == 1 for out in (*outs, "photos/runs"))
    assert identify(root) == before and len(list_folder(root).files) == 12
    assert "left out" not in (said := capfd.readouterr()).err and "Traceback" not in said.err and "already" in said.out
    for result in root.rglob("result.json"): result.unlink()   # runs that did not finish
    write_costs(pd.DataFrame(dict(a=[1, 2])), root / "speed", "speed", plot=lambda t: t.plot().figure)
    assert identify(root) == before


def test_no_word_of_the_decoder_at_the_command_line():
    root = pictures("photos")
    (root / "red/p.png").write_bytes(palette())
    Image.new("RGB", (16, 16)).save(root / "red/notes.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    code = "from PIL import Image; from attnpool.cli import main; Image.MAX_IMAGE_PIXELS = 600; main()"   # all are large
    words = [sys.executable, "-c", code, "data", "photos", "--size", "16"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | dict(PYTHONWARNINGS=""))
    assert done.returncode == 0 and done.stderr == "" and "Broken pictures: none" in done.stdout


@pytest.mark.parametrize("name", ["x.html", "x.xyz", "x.SVGG"])
def test_a_picture_of_the_batch_in_a_format_that_is_none(name, capfd):
    pictures("photos")
    with pytest.raises(BadInput, match=f"^picture: no picture can be written as .*, got {name}. Expected a name ending in .*pdf.*png.*svg"): describe("photos", name)
    assert called("data", "photos", "--out", name) == 2 and capfd.readouterr().err.count("\n") == 1
    assert not list(Path("home").rglob("*-check"))   # told before the work


@pytest.mark.parametrize("name, head", [("x.svg", b"<?xml"), ("x.PDF", b"%PDF"), ("x.jpg", b"\xff\xd8")])
def test_a_picture_of_the_batch_in_other_formats(name, head):
    describe(pictures("photos"), name, 16)
    assert Path(name).read_bytes().startswith(head)


# Labels of other files

def test_other_files_are_labelled_by_their_folders(monkeypatch):
    from attnpool.recipe import recipe_learner
    ids = ("n02102040", "n01440764")   # English springer, tench
    for split, n in (("train", 6), ("val", 3)): pictures(f"nette/{split}", ids, n)
    dls = picture_dls("nette", 16, 4, "cpu")
    learn = recipe_learner(dls, "xeca_resnext_tiny", "avg", epochs=1)
    files = [dls.listing.root / f for f in dls.listing.files[dls.listing.n_train:]]
    with learn.no_bar(): want = learn.validate()
    learn.export("x.pkl")
    other = [Path("more", ids[0] if ids[0] in f.parts else "tench", "images", f.name) for f in files]   # ids and names
    for f, o in zip(files, other):
        o.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, o)
    again, bare = load_learner("x.pkl"), empty_dls(**dls.about, bs=4, device="cpu")
    for some in (files, list(map(str, files)), other):
        for d in (dls, again.dls, bare):
            dl = d.test_dl(some, with_labels=True)
            assert torch.cat([y for _, y in dl]).tolist() == [dls.valid_ds[i][1].item() for i in range(len(files))]
        for l in (learn, again):
            with l.no_bar(): assert np.allclose(l.validate(dl=l.dls.test_dl(some, with_labels=True)), want, atol=1e-5)
    monkeypatch.chdir(f"nette/val/{ids[0]}")
    assert next(iter(bare.test_dl(["0.png"], with_labels=True)))[1].tolist() == [1]
    monkeypatch.chdir("../../..")
    pictures("tench/far/away", ("unknown",))   # another folder above is not that of the class
    with pytest.raises(BadInput, match="^files: tench/far/away/unknown/0.png lies in no folder of a class: tench, English springer"):
        next(iter(learn.dls.test_dl(["tench/far/away/unknown/0.png"], with_labels=True)))
    assert len(learn.dls.test_dl(["tench/far/away/unknown/0.png"]).one_batch()) == 1


def test_the_largest_size(capfd):
    pictures("photos", size=(8, 8))
    with pytest.raises(BadInput, match="^size: expected 8 to 2048 pixels, got 5000"): get_dls("./photos", 5000, 2, "cpu")
    assert called("data", "photos", "--size", "5000") == 2 and "got 5000" in capfd.readouterr().err
    assert valid_dl(picture_dls("photos", 16, 2, "cpu"), 2100, bs=1).one_batch()[0].shape[-1] == 2100


@pytest.mark.parametrize("options", [(), ("--skip-broken",)])
def test_a_table_whose_pictures_are_elsewhere(options, capfd):
    pictures("photos")
    Path("sub").mkdir()
    Path("sub/rel.csv").write_text("path,label\n" + "".join(f"{f},{f.parent.name}\n" for f in sorted(Path("photos").rglob("*.png"))))
    want = "data: none of the 8 pictures of rel is there: photos/green/0.png, "
    assert called("bench", "sub/rel.csv", *BENCH, *options) == 2 and want in (said := capfd.readouterr().err)
    assert f"relative to its folder, which is {Path('sub').resolve()}, or begin with /" in said
    assert called("data", "sub/rel.csv") == 2 and want in capfd.readouterr().err
    with pytest.raises(BadInput, match=want): picture_dls("sub/rel.csv", 16, 2, "cpu", skip_broken=bool(options))
