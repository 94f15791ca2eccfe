"Pictures with masks: layouts, what a mask may be, joint changes, loaders, scenes."
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.all import Pipeline
from fastai.vision.all import Learner, TensorImage, TensorMask, set_seed
from PIL import Image
from torchvision import tv_tensors

from attnpool.data import describe, get_dls, identify
from attnpool.data.augment import AUGMENTS, augment_name
from attnpool.data.check import check_pictures, doubles_of
from attnpool.data.dense import dense_dls, empty_dense_dls, labelled_dense_dls, made_dls, nuclei_dls, scenes_dls
from attnpool.data.digits import cluttered_digits
from attnpool.data.find import check_kind, find_pictures
from attnpool.data.joint import PADDED, KeepShape, MixedCrop, blank_padding, joint, kept_size
from attnpool.data.masked import check_masks, without_broken_masks
from attnpool.data.masks import list_masks, mask_layout, read_mask
from attnpool.data.pictures import picture_dls
from attnpool.data.scenes import ceiling, floor, nuclei, scenes
from attnpool.masks import IGNORED, confusion, iou
from attnpool.registry import BadInput


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path/"home"))


def save(file, array, **kwargs):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(file, **kwargs)


def mask_of(i, h=24, w=32, values=(0, 1)):
    out = np.full((h, w), values[0])
    for k, v in enumerate(values[1:]): out[4 + i % 3:, 6 * (k + 1):6 * (k + 1) + 8] = v
    return out


def picture_of(mask): return np.stack([mask * 20 % 256, 255 - mask * 20 % 256, np.full_like(mask, 90)], -1)


def pair(image, mask, i=0, values=(0, 1), **kwargs):
    its = mask_of(i, values=values, **kwargs)
    save(image, picture_of(its))
    save(mask, its)


def folder(n=6, at="data", values=(0, 1), classes="wall\ndoor\n"):
    for i in range(n): pair(f"{at}/images/{i}.png", f"{at}/masks/{i}.png", i, values)
    if classes: Path(at, "classes.txt").write_text(classes)
    return at


def checked(data, skip=False):
    listing = find_pictures(data)
    return without_broken_masks(check_masks(listing, check_pictures(listing)), skip)[0]


def dls_of(data, size=24, bs=2, **kwargs): return dense_dls(data, size, bs, "cpu", **kwargs)


# Layouts

def ade(n=3, m=2, names=True):
    for part, count in (("training", n), ("validation", m)):
        for i in range(count):
            name = f"{part}/ADE_{part[:5]}_{i:08}"
            its = mask_of(i, values=(0, 1, 150))
            save(f"ADEChallengeData2016/images/{name}.jpg", picture_of(its))
            save(f"ADEChallengeData2016/annotations/{name}.png", its)
    rows = [f"{i}\t.1\t9\t9\t1\tthing {i}, other" for i in range(1, 151)]
    if names: Path("ADEChallengeData2016/objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))
    return "ADEChallengeData2016"


def test_segment_ade20k_labels_are_shifted_and_zero_is_ignored():
    listing = checked(ade())
    assert (listing.family, listing.n_train, len(listing.files), len(listing.vocab)) == ("ade20k", 3, 5, 150)
    assert listing.vocab[0] == "thing 1" and listing.vocab[149] == "thing 150"
    assert any("20,210 and 2,000" in note for note in listing.notes)
    table = listing.table()
    assert [table[v] for v in (0, 1, 150, 151, 255)] == [255, 0, 149, 255, 255]
    y = torch.cat([y for _, y in dls_of("ADEChallengeData2016", augment="none").valid])
    assert set(y.unique().tolist()) == {0, 149, 255}
    raw = read_mask(listing.root/listing.masks[3])
    assert ((y[0] == 149).numpy() == (raw == 150)).all() and ((y[0] == 255).numpy() == (raw == 0)).all()


def test_segment_ade20k_without_names_has_numbers():
    assert list_masks(ade(names=False)).vocab[:2] == ("1", "2")


def test_segment_ade20k_with_the_official_counts_says_nothing():
    root = Path("ADEChallengeData2016")
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        for part, n in (("training", 20_210), ("validation", 2000)):
            (root/kind/part).mkdir(parents=True)
            for i in range(n): os.mknod(root/kind/part/f"ADE_{i}.{ending}")
    listing = list_masks(root)
    assert (listing.n_train, len(listing.files), len(listing.vocab), listing.notes) == (20_210, 22_210, 150, ())


def test_segment_voc_reads_its_lists_and_palette():
    root = Path("VOCdevkit/VOC2012")
    palette = np.zeros((256, 3), np.uint8)
    palette[1], palette[20], palette[255] = (128, 0, 0), (0, 64, 128), (224, 224, 192)
    for i in range(6):   # the sixth has no mask and is in no list
        save(root/f"JPEGImages/2007_{i}.jpg", np.full((24, 32, 3), 40 * i))
        if i == 5: continue
        im = Image.fromarray(mask_of(i, values=(0, 20, 255)).astype(np.uint8))
        im.putpalette(palette.tobytes())
        (root/"SegmentationClass").mkdir(exist_ok=True)
        im.save(root/f"SegmentationClass/2007_{i}.png")
    (root/"ImageSets/Segmentation").mkdir(parents=True)
    (root/"ImageSets/Segmentation/train.txt").write_text("2007_0\n2007_3\n2007_4\n")
    (root/"ImageSets/Segmentation/val.txt").write_text("2007_2\n2007_1\n")
    (root/"Annotations").mkdir()
    (root/"Annotations/2007_0.xml").write_text("<annotation/>")
    listing = checked("VOCdevkit")
    assert (listing.family, len(listing.vocab), listing.vocab[15], listing.n_train) == ("voc", 21, "person", 3)
    assert [Path(f).stem for f in listing.files] == ["2007_0", "2007_3", "2007_4", "2007_2", "2007_1"]
    y = torch.cat([y for _, y in dls_of("VOCdevkit").valid])
    assert set(y.unique().tolist()) == {0, 20, 255}
    (root/"ImageSets/Segmentation/val.txt").write_text("2007_2\n2007_9\n")
    with pytest.raises(BadInput, match="2007_9.jpg"): checked("VOCdevkit")


def camvid():
    for part, n in (("train", 4), ("val", 2), ("test", 3)):
        for i in range(n): pair(f"camvid/{part}/images/{part}{i}.png", f"camvid/{part}/masks/{part}{i}.png", i, (0, 1, 2))
    Path("camvid/classes.txt").write_text("sky\nroad\nunlabelled\n")
    return "camvid"


def test_segment_camvid_layout_keeps_its_parts_and_ignores_unlabelled():
    listing = checked(camvid())
    assert (listing.n_train, len(listing.files), listing.vocab, listing.ignored) == (4, 6, ("sky", "road"), (2, 255))
    assert "the pictures of test are left alone; attnpool bench --test tries each run on them once, at its end" in listing.notes
    tests = find_pictures("camvid", tests=True)
    assert [Path(f).stem for f in tests.files[tests.n_train:]] == ["test0", "test1", "test2"]
    shutil.rmtree("camvid/val")
    assert len(checked("camvid").files) == 7 and "the pictures of test validate" in " ".join(checked("camvid").notes)
    with pytest.raises(BadInput, match="^test: .*validate"): find_pictures("camvid", tests=True)
    shutil.rmtree("camvid/test/masks")
    with pytest.raises(BadInput, match="test/masks"): checked("camvid")


@pytest.mark.parametrize("archive", ["data.tar", "data.tar.gz", "data.zip"])
def test_segment_archives_give_what_their_folder_gives(archive):
    folder()
    if archive.endswith("zip"):
        with zipfile.ZipFile(archive, "w") as z:
            for f in sorted(Path("data").rglob("*.*")): z.write(f)
    else:
        with tarfile.open(archive, "w:gz" if archive.endswith("gz") else "w") as tar: tar.add("data")
    a, b = checked("data"), checked(archive)
    assert (a.files, a.masks, a.vocab, a.n_train) == (b.files, b.masks, b.vocab, b.n_train)
    assert identify("data").fingerprint == identify(archive).fingerprint
    whole = Path(archive).read_bytes()
    Path("cut" + archive[4:]).write_bytes(whole[:len(whole) * 2 // 3])
    with pytest.raises(BadInput, match="cut short"): find_pictures("cut" + archive[4:])


def test_segment_zip_that_leads_outside_or_holds_links_is_refused():
    for name, mode in (("../evil.png", 0), ("data/link", 0o120777 << 16)):
        info = zipfile.ZipInfo(name)
        info.external_attr = mode
        with zipfile.ZipFile("x.zip", "w") as z: z.writestr(info, "/etc/passwd")
        with pytest.raises(BadInput, match="does not belong"): find_pictures("x.zip")
        assert not Path("../evil.png").exists()


@pytest.mark.parametrize("layout", ["inside", "suffix", "names", "deep"])
def test_segment_folders_that_people_have(layout):
    for i in range(5):
        part = "train" if i < 3 else "val"
        image, mask = dict(
            inside=(f"d/images/{part}/{i}.png", f"d/masks/{part}/{i}.png"), suffix=(f"d/images/{i}.jpg", f"d/labels/{i}_P.png"),
            names=(f"d/Images/{i}.png", f"d/Masks/{i}.png"), deep=(f"d/images/a/{i}.png", f"d/masks/a/{i}.png"))[layout]
        pair(image, mask, i)
    listing = checked("d")
    assert len(listing.files) == 5 and listing.drawn == (layout != "inside")
    assert all(Path(f).stem == Path(m).stem.removesuffix("_P") for f, m in zip(listing.files, listing.masks))


def test_segment_split_is_drawn_by_its_seed_and_by_number():
    folder(20)
    a, b, c = (list_masks("data", split_seed=s) for s in (0, 0, 1))
    assert a.files == b.files != c.files and sorted(a.files) == sorted(c.files) and (a.n_train, a.drawn) == (16, True)
    other, numbers = a.split(3)
    assert [a.files[i] for i in numbers] == other.files and [a.masks[i] for i in numbers] == other.masks
    assert other.n_train == 16 and dls_of("data", split=3).listing.files == other.files
    assert list_masks("data", valid_pct=.5).n_train == 10
    with pytest.raises(BadInput, match="valid_pct: .*between 0 and 1"): list_masks("data", valid_pct=2)


# What the masks say

def test_segment_values_are_the_classes_where_none_are_named():
    listing = checked(folder(values=(3, 7, 255), classes=""))
    assert (listing.vocab, listing.values, listing.ignored) == (("3", "7"), (3, 7), (255,))
    y = torch.cat([y for _, y in dls_of("data").valid])
    assert set(y.unique().tolist()) == {0, 1, 255}


def test_segment_black_and_white_masks_are_two_classes():
    listing = checked(folder(values=(0, 255), classes=""))
    assert (listing.vocab, listing.values, listing.ignored) == (("0", "255"), (0, 255), ())
    y = torch.cat([y for _, y in dls_of("data", augment="none").train])
    assert set(y.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["1", "L", "P", "L;4", "RGB", "RGBA"])
def test_segment_each_kind_of_png_holds_the_same_numbers(kind):
    its = mask_of(0).astype(np.uint8)
    im = Image.fromarray(its)
    if kind == "1": im = Image.fromarray(its.astype(bool))
    elif kind == "P": im.putpalette([9, 9, 9, 250, 0, 0])
    elif kind in ("RGB", "RGBA"): im = im.convert(kind)
    if kind != "L;4": im.save("m.png")
    else:   # Pillow writes no grey of four bits, so by hand
        import struct, zlib
        rows = b"".join(b"\0" + bytes(a << 4 | b for a, b in zip(r[::2], r[1::2])) for r in its.tolist())
        def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        head = struct.pack(">IIBBBBB", its.shape[1], its.shape[0], 4, 0, 0, 0, 0)
        Path("m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert (read_mask("m.png") == its).all()


def spoil(what):
    "Data of which one picture or mask cannot be used, and what is said of it."
    folder(8)
    its = mask_of(2)
    if what == "size": save("data/masks/2.png", its[:12]); return "2.png .the mask is 32 x 12 pixels, the picture 32 x 24"
    if what == "values": save("data/masks/2.png", its * 9); return "masks/2.png: 9 is no class of the 2"
    if what == "no mask": os.remove("data/masks/2.png"); return "2.png .it has no mask"
    if what == "no picture": os.remove("data/images/2.png"); return "masks/2.png .a mask without a picture"
    if what == "16 bits": Image.fromarray(its.astype(np.uint16)).save("data/masks/2.png"); return "masks/2.png: more than 8 bits"
    if what == "colours": save("data/masks/2.png", picture_of(its)); return "masks/2.png: colours .RGB. without a palette"
    if what == "alpha": Image.fromarray(its.astype(np.uint8)).convert("LA").save("data/masks/2.png"); return "colours .LA."
    if what == "jpeg": os.remove("data/masks/2.png"); save("data/masks/2.jpg", its); return "masks/2.jpg: a JPEG, which blurs"
    if what == "cut": Path("data/masks/2.png").write_bytes(Path("data/masks/2.png").read_bytes()[:50]); return "masks/2.png: "
    if what == "empty": Path("data/masks/2.png").write_bytes(b""); return "masks/2.png: zero bytes"
    if what == "broken picture": Path("data/images/2.png").write_bytes(b"no"); return "2.png .not a picture"


@pytest.mark.parametrize("what", ["size", "values", "no mask", "no picture", "16 bits", "colours", "alpha", "jpeg", "cut",
                                  "empty", "broken picture"])
def test_segment_bad_mask_is_named_and_can_be_left_out(what):
    said = spoil(what)
    for _ in range(2):   # the second reads what was kept
        with pytest.raises(BadInput, match=f"^data: 1 of . pictures with masks .*{said}.*skip-broken"): dls_of("data")
    left = dls_of("data", skip_broken=True).listing
    assert len(left.files) == 7 and not any("2.png" in f for f in left.files)
    assert any("2." in f for f in describe("data").broken)


def test_segment_mask_of_a_turned_picture_is_upright_as_the_picture_is_shown():
    folder(6)
    its, exif = mask_of(2), Image.Exif()
    exif[0x112] = 6   # a camera held upright: to be turned by a quarter
    Path("data/images/2.png").unlink()
    Image.fromarray(picture_of(its).astype(np.uint8)).transpose(Image.Transpose.ROTATE_90).save("data/images/2.jpg", exif=exif)
    assert checked("data").files   # upright, both are 32 x 24
    save("data/masks/2.png", np.ascontiguousarray(np.rot90(its)))
    with pytest.raises(BadInput, match="2.jpg .the mask is 24 x 32 pixels, the picture 32 x 24 when upright, as its EXIF .*turn the mask"):
        checked("data")


def test_segment_many_bad_masks_stand_in_a_table():
    folder(15, values=(0, 1, 5))
    with pytest.raises(BadInput, match="15 of 15") as e: dls_of("data")
    table = Path(str(e.value).split("all of them are in ")[1].split(". Mend")[0])
    rows = table.read_text().splitlines()
    assert len(rows) == 16 and rows[0] == "file,why" and all("5 is no class" in r for r in rows[1:])


@pytest.mark.parametrize("classes", ["", "wall\ndoor\n", "wall\n"])
def test_segment_one_class_only_is_an_error(classes):
    folder(values=(0,), classes=classes)
    with pytest.raises(BadInput, match="^data: .*one class only, '(wall|0)'"): dls_of("data")


def test_segment_nothing_but_ignored_is_an_error_but_one_such_picture_is_not():
    folder(values=(255,))
    with pytest.raises(BadInput, match="^data: .*no class"): dls_of("data")
    folder(at="b")
    for i in range(6): save(f"b/masks/{i}.png", mask_of(i) if i else np.full((24, 32), 255))
    assert len(checked("b").files) == 6


def test_segment_shades_are_no_classes():
    folder(classes="")
    save("data/masks/0.png", np.arange(24 * 32).reshape(24, 32) % 256)
    with pytest.raises(BadInput, match="^data: .*rather shades"): dls_of("data")


@pytest.mark.parametrize("text,said", [("a\n\nb\n", "lines"), ("a\na\n", "'a' more than once"), ("\n", "lines")])
def test_segment_class_names_are_checked(text, said):
    folder(classes=text)
    with pytest.raises(BadInput, match=f"^data: .*classes.txt has .*{said}"): list_masks("data")


def test_segment_names_that_do_not_meet_are_told():
    for i in range(3): pair(f"d/images/photo{i}.png", f"d/masks/label{i}.png")
    with pytest.raises(BadInput, match="no picture of .* has a mask of its name"): list_masks("d")
    folder()
    shutil.copy("data/images/1.png", "data/images/1.jpg")
    with pytest.raises(BadInput, match="differ in their ending"): list_masks("data")


# Which data is for what

def classes_folder():
    for i in range(8): save(f"kinds/{'cat' if i % 2 else 'dog'}/{i}.png", np.full((24, 24, 3), 30 * i))
    return "./kinds"


def test_segment_data_and_classes_are_told_apart():
    with pytest.raises(BadInput, match="^data: .*pictures with masks, not of classes.*--task segment"): picture_dls(folder())
    with pytest.raises(BadInput, match="^data: .*no masks.*--task classify"): dls_of(classes_folder())
    with pytest.raises(BadInput, match="--task segment"): get_dls("scenes")
    with pytest.raises(BadInput, match="--task classify"): dls_of("digits")
    for data, masks in (("scenes", True), ("nuclei", True), ("data", True), ("digits", False), ("./kinds", False)):
        kinds = ("masks", "classes") if masks else ("classes", "masks")
        check_kind(data, kinds[0])
        with pytest.raises(BadInput, match="^data: "): check_kind(data, kinds[1])
    for name in ("blog", "petals", "imagenet"):
        with pytest.raises(BadInput, match="^augment: .*segment"): dls_of("data", augment=name)
    with pytest.raises(BadInput, match="^augment: .*blog"): picture_dls("./kinds", 16, augment="segment")
    assert augment_name("own", "", "masks") == "segment" and augment_name("own", "scenes", "masks") == "none"
    assert mask_layout("kinds") is None
    with pytest.raises(FileNotFoundError): dls_of("nowhere/")


def test_segment_boxes_beside_pictures_are_no_masks():
    for i in range(3): save(f"voc/JPEGImages/{i}.png", np.zeros((9, 9, 3)))
    Path("voc/Annotations").mkdir()
    Path("voc/Annotations/0.xml").write_text("<annotation/>")
    assert mask_layout("voc") is None


def test_segment_fingerprint_covers_masks_and_their_meaning():
    seen = {identify(folder()).fingerprint}
    shutil.copytree("data", "else/where")
    assert identify("else/where").fingerprint in seen
    its = mask_of(0)
    its[0, 0] = 1
    save("data/masks/0.png", its)
    seen.add(identify("data").fingerprint)
    Path("data/classes.txt").write_text("wall\nwindow\n")
    seen.add(identify("data").fingerprint)
    os.rename("data/masks/0.png", "data/masks/new.png"), os.rename("data/images/0.png", "data/images/new.png")
    seen.add(identify("data").fingerprint)
    assert len(seen) == 4


def test_segment_pictures_that_are_twice_are_no_conflict():
    folder()
    shutil.copy("data/images/0.png", "data/images/9.png"), shutil.copy("data/masks/1.png", "data/masks/9.png")
    assert doubles_of(find_pictures("data")).conflicts == []
    told = describe("data", "batch.png", 24)
    assert "door" in told.text and told.counts["door"][0] > 0 and Path("batch.png").stat().st_size > 1000


def test_segment_made_data_are_described():
    told = describe("scenes", "batch.png")
    assert told.counts["background"] == (1000, 300) and Path("batch.png").exists()
    assert told.text.startswith("scenes: 1,000 training and 300 validation pictures of 11 classes")


# Joint changes

def coded(h=40, w=60, seed=0):
    "A picture whose first channel is its mask, as blocks."
    rng = np.random.default_rng(seed)
    side = h // 4
    mask = rng.integers(0, 5, (4, w // side)).repeat(side, 0).repeat(side, 1).astype(np.uint8)
    return TensorImage(torch.tensor(np.stack([mask * 50] * 3))), TensorMask(torch.tensor(mask))


def test_segment_mask_goes_where_the_picture_goes():
    torch.manual_seed(0)
    change = Pipeline(joint(64, (.5, 2.), .75, .5), split_idx=0)
    moved = 0
    for seed in range(30):
        x, y = (o.as_subclass(torch.Tensor) for o in change(coded(80, 120, seed)))
        assert (x.shape, y.shape) == ((3, 64, 64), (64, 64))
        there = y != PADDED
        assert (x[:, ~there] == 0).all()
        same = ((x[0].float() / 50 - y.float()).abs() < .5)[there].float().mean()
        assert same > .85   # but along the blocks' borders, which the picture smooths
        moved += not torch.equal(y, coded(80, 120, seed)[1][:64, :64].as_subclass(torch.Tensor))
    assert moved > 25


def test_segment_light_changes_the_picture_alone_and_swaps_no_channel():
    torch.manual_seed(0)
    red = TensorImage(torch.tensor([200, 20, 20], dtype=torch.uint8)[:, None, None].expand(3, 24, 24))
    y = TensorMask(torch.ones(24, 24, dtype=torch.uint8))
    change, seen = Pipeline(joint(24, colour=True), split_idx=0), []
    for _ in range(60):
        a, b = change((red, y))
        assert (b == 1).all()
        seen.append(a.float().mean((1, 2)))
    seen = torch.stack(seen)
    assert seen.std(0).max() > 5 and (seen.argmax(1) == 0).all()


def test_segment_validation_keeps_the_whole_picture():
    x, y = coded(40, 60)
    for size, shape in ((20, (20, 30)), (40, (40, 60)), (80, (80, 120)), ((20, 50), (20, 30))):
        for augment in ("segment", "segment-light", "none"):
            change = Pipeline(AUGMENTS[augment].joint(size), split_idx=1)
            a, b = change((x, y))
            assert a.shape[1:] == b.shape == shape and set(b.unique().tolist()) <= set(y.unique().tolist())
            assert change((x,))[0].shape == (3, *shape)
    assert kept_size((40, 1000), 100) == (16, 400)
    for size in (4, 4000, (32, 4), 20.5, "20"):
        with pytest.raises(BadInput, match="^size: "): joint(size)


def test_segment_crop_is_not_of_one_class():
    mask = torch.zeros(40, 400, dtype=torch.uint8)
    mask[:, 200:260] = 1
    mask[:, :100] = IGNORED
    torch.manual_seed(0)
    def shares(most, tries):
        for _ in range(200):
            crop = MixedCrop((40, 40), most, tries)(tv_tensors.Image(mask[None]), tv_tensors.Mask(mask))[1]
            assert crop.shape == (40, 40)
            counts = torch.bincount(crop.flatten(), minlength=256)[:254]
            yield counts.max().item() / max(1, counts.sum().item()) if (counts > 0).sum() > 1 else 1.
    first, chosen = ([s < .75 for s in shares(*how)] for how in ((1., 10), (.75, 10)))
    assert sum(first) < 50 < 100 < sum(chosen)
    # a share below three quarters is met in one try by chance p; ten tries miss with (1 - p)^10
    p = sum(first) / 200
    assert abs(sum(chosen) / 200 - (1 - (1 - p)**10)) < .15


def test_segment_scales_are_even_between_their_ends():
    torch.manual_seed(0)
    sides = [KeepShape(100, (.5, 2.))(tv_tensors.Image(torch.zeros(1, 20, 30))).shape[1] for _ in range(300)]
    assert 50 <= min(sides) < 56 and 194 < max(sides) <= 200 and abs(np.mean(sides) - 125) < 8


def test_segment_padding_is_zero_after_normalising_and_ignored():
    folder(4)
    dls = dls_of("data", (60, 80), 2, augment="segment-light", stats=([.3, .4, .5], [.2, .2, .2]))
    x, y = dls.one_batch()
    assert x.shape == (2, 3, 60, 80) and (y == PADDED).sum() == 0
    outside = (x == 0).all(1)
    assert outside.any() and (y[outside] == IGNORED).all() and (y != IGNORED).any()
    a, b = torch.ones(1, 3, 2, 2), torch.tensor([[[0, PADDED], [IGNORED, 1]]])
    blank_padding(a, b)
    assert a[0, 0].tolist() == [[1, 0], [1, 1]] and b[0].tolist() == [[0, IGNORED], [IGNORED, 1]]


# Loaders

@pytest.mark.parametrize("workers", [0, 2])
def test_segment_batches_repeat_with_their_seed(workers):
    folder(6)
    def epoch(seed):
        dls = dls_of("data", 24, 2, num_workers=workers)
        set_seed(seed)
        dls.rng.seed(seed) if hasattr(dls, "rng") else dls.train.rng.seed(seed)
        return [(x.clone(), y.clone()) for x, y in dls.train]
    a, b, c = epoch(1), epoch(1), epoch(2)
    assert all((x == u).all() and (y == v).all() for (x, y), (u, v) in zip(a, b))
    assert not all((x == u).all() for (x, _), (u, _) in zip(a, c))
    first = [x for x, _ in a]
    assert not all(torch.equal(first[0], x) for x in first[1:])


def test_segment_pictures_of_several_sizes_come_whole_and_in_order():
    for i, (h, w) in enumerate([(24, 32), (32, 24), (24, 60), (24, 24), (30, 30), (24, 32), (40, 24), (24, 32)]):
        pair(f"d/images/{i}.png", f"d/masks/{i}.png", i, h=h, w=w)
    dls = dls_of("d", 24, 2, valid_pct=.5, num_workers=2)
    listing = dls.listing
    shapes = [tuple(y.shape[1:]) for _, y in dls.valid]
    expected = [kept_size(read_mask(listing.root/m).shape, 24) for m in listing.masks[listing.n_train:]]
    assert shapes == expected and len(set(shapes)) > 1
    assert [x.shape[2:] for x, in dls.test_dl([listing.root/f for f in listing.files])] == [
        kept_size(read_mask(listing.root/m).shape, 24) for m in listing.masks]


def test_segment_large_photos_are_shrunk_once_with_their_masks():
    for i in range(4):
        its = mask_of(i, 300, 400)
        save(f"d/images/{i}.png", picture_of(its)), save(f"d/masks/{i}.png", its)
    dls = dls_of("d", 30, 2, augment="none")
    x, y = dls.valid.one_batch()
    assert x.shape[2:] == y.shape[1:] == (30, 40) and set(y.unique().tolist()) <= {0, 1}
    item = dls.train_ds[0]
    assert item[0].size == (80, 60) and item[1].shape == (60, 80)
    without = dls_of("d", 30, 2, augment="none", cache_gb=0).valid.one_batch()
    assert (without[0] - x).abs().max() < .05 and (without[1] == y).all()


def test_segment_bad_sizes_of_batches():
    folder(4)
    for bs in (0, 100):
        with pytest.raises(BadInput, match="^bs: expected 1 to 3"): dls_of("data", bs=bs)
    assert dls_of("data", bs=None).train.bs == 3
    with pytest.raises(BadInput, match="^size: scenes are square"): scenes_dls((40, 50))
    with pytest.raises(BadInput, match="^size: a scene needs"): scenes_dls(16)


def test_segment_learner_survives_export_and_asks_about_photos():
    folder(6)
    dls = dls_of("data")
    net = torch.nn.Conv2d(3, len(dls.vocab), 1)
    learn = Learner(dls, net, loss_func=torch.nn.CrossEntropyLoss(ignore_index=IGNORED), path=".", model_dir=".")
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export("net.pkl")
    assert b"images" not in Path("net.pkl").read_bytes()
    code = ("import torch; torch.serialization.add_safe_globals([])\nfrom fastai.vision.all import load_learner\n"
            "learn = load_learner('net.pkl')\nx, = learn.dls.test_dl(['data/images/0.png']).one_batch()\n"
            "print(list(x.shape), list(learn.dls.vocab))")
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "[1, 3, 24, 32] ['wall', 'door']", out.stderr
    with pytest.raises(BadInput, match="with_labels"): dls.test_dl(["data/images/0.png"], with_labels=True).one_batch()


def test_segment_opened_loaders_prepare_as_the_first_did():
    dls = dls_of(camvid())
    about = json.loads(json.dumps(dls.about))
    opened = empty_dense_dls(**about, device="cpu")
    assert opened.vocab == dls.vocab and opened.about == dls.about and not len(opened.train_ds)
    file = dls.listing.root/dls.listing.files[-1]
    assert torch.equal(opened.test_dl([file]).one_batch()[0], dls.valid.one_batch()[0][-1:])
    tests = labelled_dense_dls(opened, find_pictures("camvid", tests=True))
    x, y = map(torch.cat, zip(*tests.valid))
    assert len(x) == 3 and set(y.unique().tolist()) == {0, 1, 255}
    Path("camvid/classes.txt").write_text("road\nsky\nvoid\n")   # the other way round: found by their names
    swapped = torch.cat([y for _, y in labelled_dense_dls(opened, find_pictures("camvid", tests=True)).valid])
    assert (swapped[y < 2] == 1 - y[y < 2]).all()
    Path("camvid/classes.txt").write_text("road\ntree\nvoid\n")
    with pytest.raises(BadInput, match="not trained: tree"): labelled_dense_dls(opened, find_pictures("camvid", tests=True))


# Scenes and nuclei

def test_segment_scenes_are_the_same_each_time_and_part_the_originals():
    a = scenes(48, 40, 20)
    b = scenes.__wrapped__(48, 40, 20)
    assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("images", "masks", "instances", "boxes", "sources"))
    train = a.owners < a.n_train
    rest = cluttered_digits(part=(.5, 1.))
    seen = set(a.sources[train].tolist()), set(a.sources[~train].tolist()), set(rest.sources.tolist())
    assert all(not seen[i] & seen[j] for i, j in ((0, 1), (0, 2), (1, 2))) and all(seen)
    assert not torch.equal(a.images, scenes(48, 40, 20, seed=1).images)


def test_segment_scenes_tell_one_truth_in_four_ways():
    data = scenes(64, 60, 30)
    for i in range(90):
        labels, boxes, masks = data.objects(i)
        assert 1 <= len(labels) <= 5 and masks.any(0).equal(data.masks[i] > 0) and masks.sum(0).max() <= 1
        for label, (l, t, r, b), on in zip(labels.tolist(), boxes.tolist(), masks):
            assert (data.masks[i][on] == label).all()
            y, x = on.nonzero(as_tuple=True)
            assert (l, t, r, b) == (x.min(), y.min(), x.max() + 1, y.max() + 1)
            assert data.images[i][on].float().mean() > 110   # bright, as each is above half of its own maximum
    assert (data.labels - 1 == torch.tensor(__import__("sklearn.datasets").datasets.load_digits().target)[data.sources]).all()


def test_segment_old_digits_stay_what_they_were():
    whole = cluttered_digits(40, 30, 20)
    assert whole.images.sum().item() == cluttered_digits(40, 30, 20, part=(0., 1.)).images.sum().item()
    with pytest.raises(BadInput, match="^part: "): cluttered_digits(40, 30, 20, part=(.5, .5))


def test_segment_floor_and_ceiling_by_hand():
    data = scenes(64, 60, 30)
    truth = data.masks[60:].numpy()
    share = (truth == 0).mean()
    classes = len(np.unique(truth))
    assert floor(data)["miou"] == pytest.approx(share / classes, abs=1e-6)
    assert ceiling(data, 1) == 1 and 1 > ceiling(data, 2) > ceiling(data, 4) > ceiling(data, 16) > 0
    from torchmetrics import JaccardIndex
    each = torch.nn.functional.one_hot(data.masks[60:].long(), 11).movedim(-1, 1).float()
    small = torch.nn.functional.avg_pool2d(each, 4)
    said = torch.nn.functional.interpolate(small, scale_factor=4, mode="bilinear").argmax(1)
    theirs = JaccardIndex(task="multiclass", num_classes=11)(said, data.masks[60:].long())
    assert ceiling(data, 4) == pytest.approx(theirs.item(), abs=1e-6)


def test_segment_confusion_is_torchmetrics():
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
    said, truth = torch.randint(0, 4, (2, 3, 9, 8), generator=torch.Generator().manual_seed(0))
    truth[0, :4] = IGNORED
    assert torch.equal(confusion(said, truth, 5), MulticlassConfusionMatrix(5, ignore_index=255)(said, truth))
    theirs = MulticlassJaccardIndex(4, average=None, ignore_index=255)(said, truth)
    assert torch.allclose(iou(confusion(said, truth, 5))[:4].float(), theirs) and iou(confusion(said, truth, 5))[4].isnan()


def test_segment_nuclei_are_all_there():
    data = nuclei()
    assert data.images.shape == (4, 256, 256) and len(data.sources.unique()) == 125 and data.n_train == 3
    assert data.vocab == ("background", "nucleus") and [len(data.objects(i)[0]) for i in range(4)] == [35, 33, 40, 29]
    dls = nuclei_dls(64, 8, "cpu", times=4)
    x, y = dls.one_batch()
    assert (x.shape, y.shape) == ((8, 3, 64, 64), (8, 64, 64)) and len(dls.train_ds) == 12
    assert dls.valid.one_batch()[1].shape == (1, 64, 64)


def test_segment_made_pictures_of_ones_own():
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), np.uint8)
    masks = (images[..., 0] > 100).astype(np.uint8)
    dls = made_dls(images, masks, 4, ["dark", "bright"], size=20, bs=2, device="cpu", augment="none")
    assert dls.about["mean"] == pytest.approx((images[:4] / 255).mean((0, 1, 2)).tolist(), abs=1e-4)
    assert dls.about["std"] == pytest.approx((images[:4] / 255).std((0, 1, 2)).tolist(), abs=1e-4)
    assert torch.equal(dls.valid.one_batch()[1], torch.tensor(masks[4:]).long())
