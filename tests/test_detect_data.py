"Objects of files: COCO, VOC and tables, read, checked and loaded; outlines against pycocotools."
import csv, json, shutil, tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from attnpool.data import describe, identify
from attnpool.data.boxes import list_boxes
from attnpool.data.find import KINDS, check_kind, find_pictures
from attnpool.data.layouts import box_layout
from attnpool.data.objects import empty_objects_dls, labelled_objects_dls, objects_dls
from attnpool.data.outlines import BrokenOutline, Outlines, outline_boxes, outline_masks, outline_of
from attnpool.registry import BadInput

H, W = 48, 64

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    return tmp_path

def picture(file, size=(W, H), seed=0):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)).save(file)

CLASSES = [dict(id=3, name="cat"), dict(id=7, name="dog")]
SQUARE = [[10, 12, 30, 12, 30, 22, 10, 22]]   # left 10, top 12, right 30, bottom 22

def obj(id, image, category=3, bbox=(10, 12, 20, 10), **more):
    return dict(id=id, image_id=image, category_id=category, bbox=list(bbox), **more)

def coco(file, names, objects, categories=CLASSES, pictures=True, folder=None, **more):
    for i, n in enumerate(names):
        if pictures: picture(Path(folder or Path(file).parent) / n, seed=i)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    images = [dict(id=i + 100, file_name=n, height=H, width=W) for i, n in enumerate(names)]
    Path(file).write_text(json.dumps(dict(images=images, annotations=objects, categories=categories) | more))

def one_coco(objects=None, n=4, **more):
    coco("set/all.json", [f"{i}.png" for i in range(n)], objects if objects is not None else [obj(i, 100 + i) for i in range(n)], **more)
    return "./set"

def table(rows, header="file,label,x1,y1,x2,y2", n=4, name="boxes.csv"):
    for i in range(n): picture(f"set/{i}.png", seed=i)
    Path("set", name).write_text("\n".join([header, *rows]))
    return "./set"

def xml(file, objects, size=(W, H)):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    def one(name, box, difficult=0):
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"
    Path(file).write_text(f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
                          f"{''.join(one(*o) for o in objects)}</annotation>")

def dls_of(data, **kwargs): return objects_dls(data, 32, kwargs.pop("bs", 2), "cpu", **{"augment": "none"} | kwargs)
def objects(listing): return {f: listing.objects(i) for i, f in enumerate(listing.files)}

# Outlines

def test_outlines_are_those_of_pycocotools():
    rng, outlines, theirs = np.random.default_rng(0), [], []
    for _ in range(60):
        polygons = [rng.uniform(-10, 75, (rng.integers(3, 9), 2)).round(2).ravel().tolist() for _ in range(rng.integers(1, 3))]
        rle = coco_mask.merge(coco_mask.frPyObjects(polygons, H, W))
        if coco_mask.area(rle): outlines.append(outline_of(polygons, (H, W))), theirs.append(rle)
    spots = (rng.random((H, W)) > .5).astype(np.uint8)
    packed, flat = coco_mask.encode(np.asfortranarray(spots)), spots.ravel(order="F")
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]).tolist()
    if flat[0]: runs = [0, *runs]
    for counts in runs, packed["counts"], packed["counts"].decode():
        outlines.append(outline_of(dict(size=[H, W], counts=counts), (H, W))), theirs.append(packed)
    assert len(outlines) > 50 and outlines == [rle["counts"] for rle in theirs]
    assert (outline_masks(outlines, (H, W)) == coco_mask.decode(theirs).transpose(2, 0, 1)).all()
    boxes, areas = outline_boxes(outlines, (H, W))
    (l, t, w, h), (L, T, R, B) = np.array(coco_mask.toBbox(theirs)).T, boxes.T
    assert (L == l).all() and (T == t).all() and (R == l + w).all() and (B == t + h).all()
    assert (areas == coco_mask.area(theirs)).all()
    many = Outlines.of([*outlines, b""])
    assert [many[i] for i in range(len(many))] == [*outlines, b""] and many.some(np.array([3]))[0] == outlines[3]

@pytest.mark.parametrize("said, why", [
    ([[1, 2, 3, 4]], "three points"), ([[1, 2, 3, 4, 5, 6, 7]], "three points"), ([[1, 2, 3, 4, 5, float("nan")]], "nan"),
    ([[1, 2, 1e9, 4, 5, 6]], "1000000000"), ([["a"] * 6], "'a'"), ([], "expected polygons"), ("abc", "expected polygons"),
    (dict(size=[H, W], counts=[5, 6]), "do not fill"), (dict(size=[H, W], counts=[9999]), "do not fill"),
    (dict(size=[H, W], counts=[-1, H * W + 1]), "0 or more"), (dict(size=[W, H], counts=[H * W]), "its size"),
    (dict(size=[H, W], counts="zz"), "do not fill"), (dict(size=[H, W]), "counts"), (dict(counts=[1]), "its size"),
    ([[100, 5, 120, 5, 110, 20]], "no pixel"), (dict(size=[H, W], counts=[H * W]), "no pixel")])
def test_outlines_that_cannot_be_meant_are_refused(said, why):
    with pytest.raises(BrokenOutline, match=why): outline_of(said, (H, W))

# Formats

def test_coco_as_given_out():
    rle = coco_mask.encode(np.asfortranarray(np.eye(H, W, dtype=np.uint8)))
    for part in "train", "val":
        its = [obj(1, 100, area=150.5, iscrowd=0, segmentation=SQUARE), obj(2, 100, 7, (40, 5, 20, 30), segmentation=[
            [40, 5, 60, 5, 60, 35]]), obj(3, 101, 7, (0, 0, 64, 48), iscrowd=1, segmentation=dict(
            size=[H, W], counts=rle["counts"].decode()))]
        coco(f"set/annotations/instances_{part}2017.json", [f"{part}{i}.jpg" for i in range(3)], its, folder=f"set/{part}2017")
        Path(f"set/annotations/captions_{part}2017.json").write_text('{"images": [], "annotations": [], "categories": []}')
    listing = find_pictures("./set", kind="boxes")
    assert listing.files[:2] == ["train2017/train0.jpg", "train2017/train1.jpg"] and (listing.n_train, len(listing.files)) == (3, 6)
    assert listing.vocab == ("cat", "dog") and listing.masks and "3 to 7 with gaps" in listing.notes[0] and not listing.drawn
    first, crowd, none = (listing.objects(i) for i in range(3))
    assert first["boxes"].tolist() == [[10, 12, 30, 22], [40, 5, 60, 35]] and first["labels"].tolist() == [1, 2]
    assert first["area"].tolist() == [150.5, first["masks"][1].sum()] and first["boxes"].dtype == torch.float32
    assert first["masks"][0, 12:22, 10:30].all() and first["masks"][0].sum() == 200 and first["masks"].dtype == torch.uint8
    assert crowd["iscrowd"].tolist() == [True] and (crowd["masks"][0].numpy() == np.eye(H, W)).all()
    assert none["boxes"].shape == (0, 4) and none["masks"].shape == (0, H, W)
    dls = dls_of("./set", bs=3)
    assert sorted(len(o["boxes"]) for o in dls.train.one_batch()[1]) == [0, 0, 2]   # without the crowd
    assert [o["iscrowd"].tolist() for o in dls.valid.one_batch()[1]] == [[False, False], [True], []]

def test_coco_as_exported_with_ids_from_0_and_a_class_without_objects():
    for part in "train", "valid", "test":
        coco(f"set/{part}/_annotations.coco.json", ["a.jpg", "b.jpg"], [obj(0, 100, 1, segmentation=[]), obj(1, 101, 2)],
             [dict(id=0, name="pets"), dict(id=1, name="cat"), dict(id=2, name="dog")])
    listing, tests = find_pictures("./set"), find_pictures("./set", tests=True)
    assert listing.vocab == ("pets", "cat", "dog") and not listing.masks and listing.objects(1)["labels"].tolist() == [3]
    assert "run from 0 to 2" in listing.notes[0] and any("without an object: pets" in n for n in listing.notes)
    assert "2 pictures of test are left alone; attnpool evaluate RUN DATA --test looks at them" in listing.notes
    assert listing.files[2:] == ["valid/a.jpg", "valid/b.jpg"] and tests.files[2:] == ["test/a.jpg", "test/b.jpg"]

def voc(n=6, lists=True, **more):
    for i in range(n):
        picture(f"set/JPEGImages/{i}.jpg", seed=i)
        xml(f"set/Annotations/{i}.xml", [("cat", (11, 13, 30, 22)), ("dog", (1, 1, W, H), 1)] if i else [], **more)
    if lists:
        Path("set/ImageSets/Main").mkdir(parents=True)
        for part, its in dict(train="0123", val="4", test="5", trainval="01234").items():
            Path(f"set/ImageSets/Main/{part}.txt").write_text("\n".join(its))
    return "./set"

def test_voc_with_lists_difficult_and_empty():
    listing = find_pictures(voc())
    assert listing.files == [f"JPEGImages/{i}.jpg" for i in range(5)] and listing.n_train == 4
    empty, its = listing.objects(0), listing.objects(1)
    assert len(empty["boxes"]) == 0 and its["boxes"].tolist() == [[10, 12, 30, 22], [0, 0, W, H]]
    assert its["iscrowd"].tolist() == [False, True] and its["area"].tolist() == [200, W * H] and "masks" not in its
    assert find_pictures("./set", tests=True).files[4:] == ["JPEGImages/5.jpg"]
    assert [len(o["boxes"]) for o in dls_of("./set", bs=4).train.one_batch()[1]].count(1) == 3

def test_xml_without_lists_and_beside_pictures():
    assert find_pictures(voc(lists=False)).drawn
    for part in "train", "valid":
        picture(f"beside/{part}/a.png"), xml(f"beside/{part}/a.xml", [("cat", (11, 13, 30, 22))])
    assert find_pictures("./beside").files == ["train/a.png", "valid/a.png"]

@pytest.mark.parametrize("header, row", [
    ("file,label,x1,y1,x2,y2", "{}.png,cat,10,12,30,22"), ("filename,width,height,class,xmin,ymin,xmax,ymax", "{}.png,64,48,cat,10,12,30,22"),
    ("Image;Category;Left;Top;Right;Bottom", "{}.png;cat;10;12;30;22"), ("image_id,label,x,y,w,h", "{},cat,10,12,20,10"),
    ("path,class_name,x,y,width,height", "/home/me/{}.png,cat,10,12,20,10"), ("file,label,left,top,width,height", "set/{}.png,cat,10,12,20,10")])
def test_tables_by_the_names_of_their_columns(header, row):
    listing = find_pictures(table([row.format(i) for i in range(4)], header), kind="boxes")
    assert sorted(listing.files) == [f"{i}.png" for i in range(4)]
    assert all(o["boxes"].tolist() == [[10, 12, 30, 22]] for o in objects(listing).values())

def test_json_of_records_its_split_and_a_picture_without_objects():
    rows = [dict(file=f"{i}.png", label="cat", x=10, y=12, w=20, h=10, split="val" if i == 3 else "train") for i in range(4)]
    rows[1] |= dict(x=None, y=None, w=None, h=None)
    for i in range(4): picture(f"set/{i}.png")
    Path("set/boxes.json").write_text(json.dumps(rows))
    for data in "./set", "set/boxes.json":
        listing = find_pictures(data, kind="boxes")
        assert listing.n_train == 3 and listing.files[3] == "3.png" and len(listing.objects(1)["boxes"]) == 0

def test_numbers_as_classes_and_classes_txt():
    rows = [f"{i}.png,{(0, 2, 5, 5)[i]},10,12,30,22" for i in range(4)]
    listing = find_pictures(table(rows))
    assert listing.vocab == ("0", "2", "5") and "numbers 0 to 5, 3 of them" in listing.notes[0]
    Path("set/classes.txt").write_text("ant\nbee\ncat\n")
    with pytest.raises(BadInput, match="2 objects in .*'5' is no class of the 3: ant, bee, cat"): dls_of("./set")
    assert find_pictures("./set").vocab == ("ant", "bee", "cat")

@pytest.mark.parametrize("header", ["a,b,c,d,e,f", "file,label,cx,cy,w,h", "file,x1,y1,x2,y2,z", "file,label,bbox,a,b,c"])
def test_columns_without_a_meaning_are_refused(header):
    table(["0.png,cat,1,2,3,4"], header)
    with pytest.raises(BadInput, match="columns .*Expected file, label, and x1"): find_pictures("set/boxes.csv", kind="boxes")
    with pytest.raises(BadInput): find_pictures("./set", kind="boxes")

def test_archives_give_the_same_fingerprint_wherever_they_lie_and_boxes_change_it():
    one_coco()
    with tarfile.open("set.tar", "w") as tar: tar.add("set")
    shutil.make_archive("zipped", "zip", ".", "set")
    first = identify("./set", kind="boxes").fingerprint
    assert {identify(d, kind="boxes").fingerprint for d in ("set.tar", "zipped.zip")} == {first}
    one_coco([obj(i, 100 + i, bbox=(10, 12, 20, 10 + (i == 2))) for i in range(4)])
    assert identify("./set", kind="boxes").fingerprint != first

# Kinds of data

def test_what_a_folder_is_for():
    for kind in KINDS:
        if kind != "boxes":
            with pytest.raises(BadInput, match="for detection|For detection"): check_kind(one_coco(), kind)
    check_kind("./set", "boxes"), check_kind("scenes", "boxes"), check_kind("scenes", "masks")
    for c in "ab":
        for i in range(3): picture(f"classes/{c}/{i}.png", seed=i)
    with pytest.raises(BadInput, match="has no boxes, .*--task classify|has no boxes"): check_kind("./classes", "boxes")
    Path("classes/boxes.csv").write_text("file,label,x1,y1,x2,y2\na/0.png,a,1,1,9,9\nb/0.png,b,1,1,9,9\n")
    assert type(find_pictures("./classes")).__name__ == "Listing"   # folders of classes stay that
    assert find_pictures("./classes", kind="boxes").vocab == ("a", "b") and box_layout("classes").kind == "table"

# Checks

@pytest.mark.parametrize("more, why", [
    (obj(999, 100, bbox=(80, 5, 9, 9)), "lies outside"), (obj(999, 100, bbox=(5, 5, 0, 9)), "no area"), (obj(999, 100, bbox=(5, 5, -3, 9)), "no area"),
    (obj(999, 100, 4), "4 is no number of a class"), (obj(1, 100), "another has the same number"), (obj(999, 555), "number 555 is not listed"),
    (obj(999, 100, bbox=("a", 1, 2, 3)), "not four numbers"), (obj(999, 100, bbox=(1, 2, 3)), "not four numbers"), (obj(999, 100, bbox=(float("nan"), 1, 2, 3)), "not four numbers"),
    (obj(999, 100, segmentation=[[1, 2, 3]]), "its outline: a polygon needs"), (obj(999, 100, segmentation=SQUARE), "it has no outline")])
def test_each_object_that_cannot_be_used_is_named(more, why):
    data = one_coco([*(obj(i, 100 + i % 20) for i in range(20)), more], n=20)
    with pytest.raises(BadInput, match=f"cannot be used: .*{why}.*skip-broken"): dls_of(data)
    listing = None
    if "no outline" not in why:
        listing = dls_of(data, skip_broken=True).listing
        assert len(listing.files) == 20 and len(listing.table.boxes) == 20 and any("1 broken objects are left out" in n for n in listing.notes)

def test_pictures_that_cannot_be_used_are_named():
    data = one_coco()
    Path("set/0.png").unlink(), Path("set/1.png").write_bytes(b"no"), picture("set/2.png", (H, W))
    with pytest.raises(BadInput, match="3 of 4 pictures .*0.png .*1.png .*2.png .its annotations are for 64 x 48 pixels, it has 48 x 64"): dls_of(data)
    said = json.loads(Path("set/all.json").read_text())
    one_coco(n=6), Path("set/5.png").unlink()
    assert len(dls_of("./set", skip_broken=True, bs=1).listing.files) == 5 and len(said["images"]) == 4
    said = json.loads(Path("set/all.json").read_text())
    said["images"][1]["id"] = 100
    Path("set/all.json").write_text(json.dumps(said))
    with pytest.raises(BadInput, match="its number 100 is that of 0.png as well"): dls_of("./set")

def test_boxes_beyond_the_border_are_cut_and_counted():
    rows = [f"{i}.png,cat,10,12,30,22" for i in range(4)] + ["1.png,cat,50,40,70,50", "2.png,cat,-4,-2,20,20"]
    listing = dls_of(table(rows)).listing
    cut = [b for o in objects(listing).values() for b in o["boxes"].tolist()]
    assert [50, 40, W, H] in cut and [0, 0, 20, 20] in cut
    assert any("2 of 6 boxes reach beyond their picture, by up to 6 pixels" in n for n in listing.notes)

@pytest.mark.parametrize("header, row, why", [
    ("file,label,x1,y1,x2,y2", "{0}.png,cat,3{0},25,20,15", "as left, top, width, height they do"),
    ("file,label,x,y,w,h", "{0}.png,cat,3{0},25,55,45", "as corners they do"),
    ("file,label,x1,y1,x2,y2", "{0}.png,cat,.1,.2,.5,.{0}9", "between 0 and 1, as shares"),
    ("file,label,x,y,w,h", "{0}.png,cat,.1,.2,.5,.6", "between 0 and 1, as shares")])
def test_numbers_of_another_meaning_are_found(header, row, why):
    data = table([row.format(i) for i in range(4)], header)
    for skip in False, True:
        with pytest.raises(BadInput, match=f"^data: the boxes of .*{why}"): dls_of(data, skip_broken=skip)

@pytest.mark.parametrize("text, why", [
    ("{", "no JSON"), ('{"images": [], "annotations": [], "categories": []}', "no categories"),
    ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no pictures"),
    ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lacks 'file_name'"),
    ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "more than once"),
    ("[1]", "list of records"), ("[]", "list of records")])
def test_files_of_no_format(text, why):
    picture("set/a.png"), Path("set/x.json").write_text(text)
    with pytest.raises(BadInput, match=why): find_pictures("set/x.json", kind="boxes")

def test_several_files_for_one_part_and_xml_that_is_cut_short():
    one_coco(), shutil.copy("set/all.json", "set/more.json")
    with pytest.raises(BadInput, match="all.json, set/more.json|all.json, more.json"): find_pictures("./set", kind="boxes")
    for i in range(4): picture(f"cut/{i}.jpg", seed=i), xml(f"cut/{i}.xml", [("cat", (11, 13, 30, 22))])
    Path("cut/2.xml").write_text("<annotation><obj"), Path("cut/3.jpg").unlink()
    with pytest.raises(BadInput, match="2 of 4 pictures .*2.jpg .its XML cannot be read.*|3.jpg"): dls_of("./cut")

# Loading

def test_batches_in_training_and_in_validation():
    dls = dls_of(one_coco([obj(i, 100 + i, segmentation=SQUARE, area=7.) for i in range(4)]), bs=3)
    x, y = dls.train.one_batch()
    assert [tuple(im.shape) for im in x] == [(3, 32, 43)] * 3 and all(type(im) is torch.Tensor and im.max() <= 1 for im in x)
    assert torch.allclose(y[0]["boxes"], torch.tensor([[10, 12, 30, 22]]) * torch.tensor([43 / W, 32 / H] * 2))
    assert y[0]["masks"].shape == (1, 32, 43) and y[0]["labels"].dtype == torch.int64
    on = y[0]["masks"][0].nonzero()
    assert (on.min(0).values - y[0]["boxes"][0, [1, 0]]).abs().max() <= .5 and (on.max(0).values + 1 - y[0]["boxes"][0, [3, 2]]).abs().max() <= .5
    x, y = dls.valid.one_batch()
    assert x[0].shape == (3, H, W) and y[0]["boxes"].tolist() == [[10, 12, 30, 22]] and y[0]["area"].tolist() == [7]
    assert (x[0] * 255).round().byte().equal(torch.tensor(np.array(Image.open(Path("set") / dls.listing.files[3]))).permute(2, 0, 1))
    assert dls.n_inp == 1 and dls.vocab == ["cat", "dog"] and dls.about["masks"]

@pytest.mark.parametrize("augment", ["detect", "detect-light", "none"])
@pytest.mark.parametrize("size", [(4000, 60), (60, 4000), (W, H)])
def test_any_shape_and_600_objects_stay_inside(augment, size):
    for i in range(2): picture(f"set/{i}.png", size)
    rng, (w, h) = np.random.default_rng(0), size
    rows = [[f"{i}.png", "cat", x, y, x + w // 8, y + h // 8] for i in range(2) for x, y in rng.integers(0, (w * 7 // 8, h * 7 // 8), (600, 2))]
    with open("set/boxes.csv", "w", newline="") as f: csv.writer(f).writerows([("file", "label", "x1", "y1", "x2", "y2"), *rows])
    dls = dls_of("./set", augment=augment, bs=1)
    for _ in range(3):
        (x,), (y,) = dls.train.one_batch()
        assert max(x.shape[1:]) <= 54 * 1.01 and (y["boxes"][:, 2:] - y["boxes"][:, :2] >= 1).all()
        assert (y["boxes"] >= 0).all() and (y["boxes"][:, [2, 0]] <= x.shape[2]).all() and (y["boxes"][:, [3, 1]] <= x.shape[1]).all()
    assert len(dls.valid.one_batch()[1][0]["boxes"]) == 600

def test_opened_without_data_and_other_data_by_the_names_of_its_classes():
    dls = dls_of(one_coco([obj(i, 100 + i, 7, segmentation=SQUARE) for i in range(4)]))
    opened = empty_objects_dls(**dls.about, device="cpu", bs=3)
    (x,), = opened.test_dl([np.zeros((9, 12, 3), np.uint8)])
    assert x[0].shape == (3, 9, 12) and opened.valid.bs == 3 and opened.vocab == ["cat", "dog"]
    shutil.move("set", "old"), table([f"{i}.png,dog,10,12,30,22" for i in range(4)])
    other = labelled_objects_dls(opened, find_pictures("./set", kind="boxes"))
    assert all(o["labels"].tolist() == [2] for _, y in other.valid for o in y) and not other.about["masks"]
    table([f"{i}.png,cow,10,12,30,22" for i in range(4)])
    with pytest.raises(BadInput, match="not trained: cow"): labelled_objects_dls(opened, find_pictures("./set", kind="boxes"))

def test_splits_by_number_keep_the_objects_of_each_picture():
    rows = [f"{i}.png,cat,{i},12,30,22" for i in range(8)]
    table(rows, n=8)
    parts = [dls_of("./set", split=s).listing for s in (1, 2)]
    assert {*parts[0].files[parts[0].n_train:]} != {*parts[1].files[parts[1].n_train:]}
    for listing in parts:
        for f, o in objects(listing).items(): assert o["boxes"][0, 0] == int(f[0])

def test_what_is_told_of_objects():
    said = describe(one_coco([obj(i, 100 + i % 3, segmentation=SQUARE) for i in range(8)]), "batch.png", 32)
    assert said.counts["cat"] == (5, 3) or sum(said.counts["cat"]) == 8
    assert "With masks: yes" in said.text and "Broken pictures or objects: none" in said.text and Path("batch.png").exists()
    assert "objects" in describe("nuclei", task="detect").text
    with pytest.raises(BadInput, match="size: objects are found in whole pictures"): objects_dls("scenes", (32, 48))
    with pytest.raises(BadInput, match="augment: 'segment' is not for pictures with boxes"): dls_of("./set", augment="segment")

# What people have, and what goes wrong with it

def told(data, why, **kwargs):
    "The error of `objects_dls`; what describes the data is no error but that one."
    with pytest.raises(BadInput, match=why): dls_of(data, **kwargs)
    try: return describe(data, task="detect").text
    except BadInput as e: return str(e)

def changed(file, change):
    said = json.loads(Path(file).read_text())
    change(said)
    Path(file).write_text(json.dumps(said))

def test_exported_with_names_of_another_computer():
    for name in "images\\{}", "/data/upload/1/{}", "C:\\export\\images\\{}":
        one_coco(), shutil.rmtree("images", ignore_errors=True)
        for i in range(4): Path("set/images").mkdir(exist_ok=True), shutil.move(f"set/{i}.png", f"set/images/{i}.png")
        changed("set/all.json", lambda said: [im.update(file_name=name.format(im["file_name"])) for im in said["images"]])
        listing = find_pictures("./set", kind="boxes")
        assert sorted(listing.files) == [f"images/{i}.png" for i in range(4)]

def test_a_json_in_annotations_by_its_path():
    coco("set/annotations/instances_val2017.json", [f"{i}.jpg" for i in range(5)], [obj(i, 100 + i) for i in range(5)], folder="set/val2017")
    listing = find_pictures("set/annotations/instances_val2017.json", kind="boxes")
    assert listing.drawn and (listing.n_train, sorted(listing.files)) == (4, [f"val2017/{i}.jpg" for i in range(5)])

def test_boxes_come_from_outlines_where_they_are_missing_and_have_to_lie_at_them():
    def without(said):
        for a, box in zip(said["annotations"], ([], None, "gone", [10, 12, 20, 10])):
            a["bbox"] = box
            if box == "gone": del a["bbox"]
    data = one_coco([obj(i, 100 + i, segmentation=SQUARE + [[1, 2, 3, 4]] * (i == 2)) for i in range(4)])   # and a line
    changed("set/all.json", without)
    assert all(o["boxes"].tolist() == [[10, 12, 30, 22]] for o in objects(dls_of(data).listing).values())
    data = one_coco([obj(i, 100 + i, segmentation=SQUARE, bbox=(40, 30, 10, 10) if i == 1 else (10, 12, 20, 10)) for i in range(4)])
    told(data, r"annotation 1 .its box \[40, 30, 10, 10\] lies beside its outline, whose box is \[10.0, 12.0, 20.0, 10.0\]")
    data = one_coco([obj(i, 100 + i, segmentation=SQUARE if i else []) for i in range(4)])
    told(data, "annotation 0 .it has no outline, and 3 of 4 have one; without any, boxes alone train")

def test_a_picture_that_is_said_to_be_huge_takes_no_memory():
    with pytest.raises(BrokenOutline, match="too large"): outline_of(dict(size=[60_000, 60_000], counts=[3_600_000_000]), (60_000, 60_000))
    assert outline_boxes([outline_of(SQUARE, (15_000, 15_000))], (15_000, 15_000))[1] == 200

def test_numbers_of_objects_that_are_missing_or_null_and_crowds_as_text():
    data = one_coco([obj(None, 100 + i // 2, iscrowd=("0", 0, "1", None, False, 1.0)[i]) for i in range(6)], n=3)
    listing = dls_of(data, bs=1).listing
    assert [o["iscrowd"].tolist() for _, o in sorted(objects(listing).items())] == [[False, False], [True, False], [False, True]]
    one_coco([obj(i, 100 + i, iscrowd="no") for i in range(4)])
    told(data, "is made in another way .*'no'")

def test_upright_pictures_and_their_boxes():
    exif = Image.Exif()
    exif[0x112] = 6   # seen 48 wide and 64 high
    square = [[5, 40, 25, 40, 25, 60, 5, 60]]
    for outline in ([square], [None]):
        one_coco([obj(i, 100 + i, bbox=(5, 40, 20, 20), **dict(segmentation=s) if s else {}) for i in range(4) for s in outline])
        for i in range(4): Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(f"set/{i}.png", exif=exif)
        changed("set/all.json", lambda said: [im.pop(k) for im in said["images"] for k in ("height", "width")])
        dls = dls_of("./set")
        assert dls.valid.one_batch()[0][0].shape == (3, W, H) and dls.valid.one_batch()[1][0]["boxes"].tolist() == [[5, 40, 25, 60]]
    changed("set/all.json", lambda said: [a.update(bbox=[40, 10, 20, 20]) for a in said["annotations"]])
    told("./set", "in pictures before EXIF turns them upright they do")

@pytest.mark.parametrize("name, why", [("", "category without a name, number 3"), (None, "category without a name, number 3"), (" dog ", "'dog' among its categories more than once")])
def test_names_of_classes(name, why):
    one_coco(categories=[dict(id=3, name=name), dict(id=7, name="dog")])
    told("./set", why)

def test_nothing_that_trains_and_nothing_at_all():
    assert "cat" in told(one_coco([]), "training pictures .* hold no object")
    assert "crowds" in told(one_coco([obj(i, 100 + i, iscrowd=1) for i in range(4)]), "hold nothing but crowds or difficult")
    told(one_coco(n=1), "one picture with boxes. One has to train and another to validate")
    coco("none/all.json", [], [])
    told("./none", "all.json lists no pictures")
    Path("set/all.json").unlink()
    assert "0.png, line 2" in told(table([f"{i}.png,cat,10;5,12,30,22" for i in range(4)]), "cannot be used")

def test_what_is_told_of_doubles_and_of_letters():
    data = table([f"{i}.png,{'cat' if i else 'Cat'},10,12,30,22" for i in range(4)] + ["1.png,cat,10,12,30,22"])
    notes = find_pictures(data).notes + dls_of(data).listing.notes
    assert any("small and capital letters alone: Cat, cat" in n for n in notes)
    assert any(n.startswith("1 objects are there once more") for n in notes)

def test_sizes_of_boxes_are_counted_once_each():
    text = describe(one_coco([obj(i, 100 + i, bbox=(10, 8, 20, 16)) for i in range(4)]), task="detect").text   # 17.9
    assert [line.split()[:2] for line in text.splitlines() if "###" in line] == [["17", "4"]]

@pytest.mark.parametrize("header, row, why", [
    ("file,label,x,y,w,h", "{}.png,cat,50,40,20,10", "as centre, width, height they do"),
    ("file,label,x1,y1,x2,y2", "{}.png,cat,52,42,9,8", "as left, top, width, height they do")])
def test_boxes_by_their_centres(header, row, why):
    told(table([row.format(i) for i in range(4)], header), why)

def test_xml_as_people_write_it():
    voc(lists=False)
    box = "<bndbox><xmin>11</xmin><ymin>13</ymin><xmax>30</xmax><ymax>22</ymax></bndbox>"
    Path("set/Annotations/1.xml").unlink()
    Path("set/Annotations/1.XML").write_text(f"<annotation><size><width>-5</width><height>1e999</height></size><object><name>cat</name>{box}</object></annotation>")
    listing = dls_of("./set").listing
    assert objects(listing)["JPEGImages/1.jpg"]["boxes"].tolist() == [[10, 12, 30, 22]]
    Path("set/Annotations/2.xml").write_text("<annotation><object><name>cat</name></object></annotation>")
    Path("set/Annotations/3.xml").write_text(f"<annotation><object><name>cat</name>{box.replace('11', '1,1')}</object></annotation>")
    told("./set", "2.jpg, object 1 .it has no box, bndbox., .*3.jpg, object 1 .its box is .'1,1', '13', '30', '22'")

@pytest.mark.parametrize("head, name", [
    ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>', "&x;"),
    ("<!DOCTYPE a [<!ENTITY l0 'lol'>" + "".join(f"<!ENTITY l{i} '{f'&l{i - 1};' * 10}'>" for i in range(1, 11)) + "]>", "&l10;"),
    (f"<!DOCTYPE a [<!ENTITY x '{'a' * 100_000}'>]>", "&x;" * 2000)])
def test_xml_that_reads_files_or_grows_is_refused(head, name):
    voc()
    Path("set/Annotations/2.xml").write_text(f"{head}<annotation><object><name>{name}</name></object></annotation>")
    text = told("./set", "1 of 5 pictures .*2.jpg .its XML cannot be read")
    assert "root:" not in text and len(text) < 10_000

def test_lists_with_spaces_endings_flags_and_odd_bytes():
    def lists(**parts):
        for part, lines in parts.items(): Path(f"set/ImageSets/Main/{part}.txt").write_bytes(lines)
        return find_pictures("./set", kind="boxes")
    voc()
    for kind, ending in (("JPEGImages", "jpg"), ("Annotations", "xml")): shutil.move(f"set/{kind}/3.{ending}", f"set/{kind}/a photo 1.{ending}")
    its = lists(train=b"\xef\xbb\xbf0.jpg\n1  1\na photo 1\n\n2 -1\r\n", val=b"4.jpg\n")
    assert its.files == [f"JPEGImages/{n}.jpg" for n in ("0", "1", "a photo 1", "2", "4")]
    lists(train=b"0\n1\n\xe9\n", val=b"4\n99\n")
    told("./set", r"2 of 5 pictures .*\\xe9.jpg .No such file.*99.jpg .No such file")

def test_the_same_name_in_two_folders():
    for part in "train", "test":
        for i in range(3): picture(f"set/{part}/{i}.png", seed=i)
        Path(f"set/{part}_labels.csv").write_text("file,label,x1,y1,x2,y2\n" + "\n".join(f"{i}.png,cat,10,12,30,22" for i in range(3)))
    assert find_pictures("./set").files == [f"{part}/{i}.png" for part in ("train", "test") for i in range(3)]
    Path("set/test_labels.csv").unlink(), Path("set/train_labels.csv").rename("set/boxes.csv")
    told("./set", "0.png may be any of test/0.png, train/0.png")
    text = Path("set/boxes.csv").read_text()
    Path("set/boxes.csv").write_text(text.replace("\n", "\nC:\\me\\set\\train\\").removesuffix("\n"))
    assert sorted(find_pictures("./set").files) == [f"train/{i}.png" for i in range(3)]

def cut_short(): Path(one_coco(), "all.json").write_text(Path("set/all.json").read_text()[:300])
def without_classes(): one_coco(), changed("set/all.json", lambda said: said.pop("categories"))
def without_header(): table([f"{i}.png,10,12,30,22,cat" for i in range(3)], "3.png,10,12,30,22,cat")
def one_class(): table([f"{i}.png,10,12,30,22" for i in range(4)], "image,xmin,ymin,xmax,ymax")
def several():
    one_coco()
    for name in "VOC2007", "VOC2012": shutil.copytree("set", f"more/{name}")
    shutil.rmtree("set"), shutil.move("more", "set")
def yolo():
    for part in "train", "valid":
        picture(f"set/{part}/images/0.jpg"), Path(f"set/{part}/labels").mkdir()
        Path(f"set/{part}/labels/0.txt").write_text("0 0.5 0.5 0.2 1e-1\n")
    Path("set/README.txt").write_text("1 picture of 2\n")

@pytest.mark.parametrize("make, why", [
    (cut_short, "all.json is no JSON, or is cut short"), (without_classes, "all.json lacks 'categories'. Expected COCO"),
    (without_header, "write a header above its first line, such as file,x1,y1,x2,y2,label"), (one_class, "add what is missing .label"),
    (several, "Its folders VOC2007, VOC2012 have boxes, each for itself: type the path of one"), (yolo, "0.txt is of YOLO's format, .*export the data as COCO, or write a boxes.csv")])
def test_what_is_there_in_the_place_of_boxes_is_told(make, why):
    make()
    told("./set", f"^data: set has no boxes, so nothing can be detected.*{why}")

def test_files_that_are_none():
    table([f"{i}.png,cat,10,12,30,22" for i in range(4)])
    Path("set/a.json").mkdir(), Path("set/b.json").symlink_to("/nowhere"), Path("set/._c.csv").write_text("file,label,x1,y1,x2,y2\n")
    assert len(find_pictures("./set").files) == 4

def test_pictures_that_have_moved_are_found_again():
    dls_of(one_coco())
    for folder in "images", "":   # a new folder, then one that is known
        Path("set", folder).mkdir(exist_ok=True), [shutil.move(f, f"set/{folder}") for f in [*Path("set").rglob("*.png")]]
        assert {Path(f).parent.name for f in find_pictures("./set", kind="boxes").files} == {folder}
        assert len(dls_of("./set").listing.files) == 4

def test_other_json_of_coco_and_parts_that_are_there_alone():
    for part in "train", "val":
        coco(f"set/annotations/person_keypoints_{part}2017.json", [f"{i}.jpg" for i in range(3)], [obj(i, 100 + i) for i in range(3)], folder=f"set/{part}2017")
    assert find_pictures("./set", kind="boxes").files[3:] == [f"val2017/{i}.jpg" for i in range(3)]
    Path("set/annotations/person_keypoints_train2017.json").unlink()
    told("./set", "are for val alone, none trains. Type the path of one folder or file")
    assert find_pictures("set/annotations/person_keypoints_val2017.json", kind="boxes").n_train == 2
    Path("text.jsonl").write_text("{}")
    told("text.jsonl", "nor a .csv or a .json. Expected COCO")
