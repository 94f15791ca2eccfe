"Known data sets in the layouts of their makers, a few pictures of each; and pictures that a data set holds twice."
import io
import json
import os
import pickle
import tarfile
import threading
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from fastai.data.external import fastai_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.io import savemat
from torchvision import datasets

from attnpool.cli import main
from attnpool.data import describe, get_dls, identify
from attnpool.data.augment import STATS
from attnpool.data.cache import made_once
from attnpool.data.check import check_pictures, doubles_of, make_pixels
from attnpool.data.listing import list_folder
from attnpool.data.pictures import DATASETS, find_pictures
from attnpool.data.transfer import fetch, TRANSFER, official_layout
from attnpool.registry import BadInput


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fastai_cfg.cache_clear()
    yield tmp_path / "home" / "data"
    fastai_cfg.cache_clear()


def scene(seed, size=(60, 44)):
    "A picture with much in it."
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.BICUBIC)


def save(file, seed, size=(20, 16)):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    scene(seed, size).save(file, quality=95)


# The layouts, each with its few pictures as `{file: (class, tests)}`

def structs(rows, **fields):
    "An array of MATLAB's structs."
    a = np.zeros((1, len(rows)), [(k, object) for k in fields])
    for i, row in enumerate(rows):
        for k, f in fields.items(): a[k][0, i] = f(row)
    return a


def write_flowers(root):
    labels, parts = [1, 2, 102, 1, 2, 102], dict(trnid=[4, 2], valid=[3], tstid=[6, 1, 5])
    for i in range(1, 7): save(root / f"jpg/image_{i:05}.jpg", i)
    savemat(root / "imagelabels.mat", dict(labels=[labels]))
    savemat(root / "setid.mat", {k: [v] for k, v in parts.items()})
    names = {1: "pink primrose", 2: "hard-leaved pocket orchid", 102: "blackberry lily"}   # as the makers' page numbers them
    return {f"jpg/image_{i:05}.jpg": (names[labels[i - 1]], k == "tstid") for k, ids in parts.items() for i in ids}


CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012"]


def write_cars(root):
    rows = dict(cars_train=[("00001.jpg", 2), ("00002.jpg", 1), ("00003.jpg", 3)], cars_test=[("00001.jpg", 3), ("00002.jpg", 1)])
    for folder, of in rows.items():
        for f, c in of: save(root / folder / f, c)
    (root / "devkit").mkdir()
    for folder, file in (("cars_train", "devkit/cars_train_annos"), ("cars_test", "cars_test_annos_withlabels")):
        savemat(root / f"{file}.mat", dict(annotations=structs(rows[folder], bbox_x1=lambda r: 1, **{"class": lambda r: r[1]}, fname=lambda r: r[0])))
    savemat(root / "devkit/cars_meta.mat", dict(class_names=np.array([CARS], object)))
    return {f"{folder}/{f}": (CARS[c - 1], folder == "cars_test") for folder, of in rows.items() for f, c in of}


def write_cars_in_one(root):
    rows = [("car_ims/000001.jpg", 1, 0), ("car_ims/000002.jpg", 3, 1), ("car_ims/000003.jpg", 3, 0), ("car_ims/000004.jpg", 1, 1)]
    for f, c, _ in rows: save(root / f, c)
    savemat(root / "cars_annos.mat", dict(annotations=structs(
        rows, relative_im_path=lambda r: r[0], **{"class": lambda r: r[1]}, test=lambda r: r[2]), class_names=np.array([CARS], object)))
    return {f: (CARS[c - 1], bool(t)) for f, c, t in rows}


def write_inat(root, year=2018):
    names, expected = ["Larus argentatus", "Abies alba", "Apis mellifera"], {}
    for part, of in (("train", [2, 0, 1, 0]), ("val", [1, 0])):
        files = [f"train_val{year}/Kind/{c}/{part}{i}.jpg" for i, c in enumerate(of)]
        for f, c in zip(files, of): save(root / f, c)
        order = list(range(len(of)))[::-1]   # annotations need not be in the order of the pictures
        (root / f"{part}{year}.json").write_text(json.dumps(dict(
            images=[dict(id=100 + i, file_name=f, width=20, height=16) for i, f in enumerate(files)],
            annotations=[dict(id=900 + i, image_id=100 + i, category_id=of[i]) for i in order],
            categories=[dict(id=i, name=n, supercategory="Kind") for i, n in enumerate(names)])))
        expected |= {f: (names[c], part == "val") for f, c in zip(files, of)}
    return expected


def write_pets(root):
    parts = dict(trainval=[("Abyssinian_100", 1), ("american_bulldog_3", 2), ("yorkshire_terrier_9", 3)], test=[("yorkshire_terrier_2", 3), ("Abyssinian_7", 1)])
    (root / "annotations").mkdir(parents=True)
    for part, of in parts.items():
        for f, c in of: save(root / f"images/{f}.jpg", c)
        (root / f"annotations/{part}.txt").write_text("".join(f"{f} {c} {1 + (c > 1)} 1\n" for f, c in of))
    names = {1: "Abyssinian", 2: "american bulldog", 3: "yorkshire terrier"}
    return {f"images/{f}.jpg": (names[c], part == "test") for part, of in parts.items() for f, c in of}


def write_food(root):
    parts = dict(train=dict(waffles=["waffles/11", "waffles/12"], apple_pie=["apple_pie/1"]), test=dict(waffles=["waffles/13"], apple_pie=["apple_pie/2"]))
    (root / "meta").mkdir(parents=True)
    for part, of in parts.items():
        for files in of.values():
            for f in files: save(root / f"images/{f}.jpg", 1)
        (root / f"meta/{part}.json").write_text(json.dumps(of))
    return {f"images/{f}.jpg": (c.replace("_", " "), part == "test") for part, of in parts.items() for c, files in of.items() for f in files}


def batch(seed, labels, key):
    "A batch of CIFAR: rows of 1,024 red, 1,024 green and 1,024 blue levels."
    pixels = np.random.default_rng(seed).integers(0, 255, (len(labels), 32, 32, 3), dtype=np.uint8)
    return {"batch_label": "a batch", key: labels, "data": pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1), "filenames": ["x.png"] * len(labels)}, pixels


def write_cifar(root, hundred=False, protocol=2):
    root.mkdir(parents=True, exist_ok=True)
    key = "fine_labels" if hundred else "labels"
    files, expected, n = (["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]), {}, dict(train=0, test=0)
    names = ["apple", "aquarium_fish", "baby"] if hundred else ["airplane", "automobile", "bird"]
    for seed, file in enumerate(files):
        part = "test" if "test" in file else "train"
        labels = [1, 0] if seed % 2 else [0, 2, 1]
        content, pixels = batch(seed, labels, key)
        (root / file).write_bytes(pickle.dumps(content, protocol))
        for c, p in zip(labels, pixels):
            expected[f"{part}/{n[part]:05}.bmp"] = names[c].replace("_", " "), part == "test", p
            n[part] += 1
    (root / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps({"fine_label_names" if hundred else "label_names": names}, protocol))
    return expected


WRITE = dict(cifar10=write_cifar, cifar100=partial(write_cifar, hundred=True), flowers102=write_flowers, cars=write_cars,
             inat2018=write_inat, inat2019=partial(write_inat, year=2019), pets=write_pets, food101=write_food)
OFFICIAL = dict(cifar10=(50000, 10000, 10), cifar100=(50000, 10000, 100), flowers102=(2040, 6149, 102), cars=(8144, 8041, 196),
                inat2018=(437513, 24426, 8142), inat2019=(265213, 3030, 1010), pets=(3680, 3669, 37), food101=(75750, 25250, 101))


def test_the_table_has_the_official_counts():
    assert {n: (s.train, s.test, s.classes) for n, s in TRANSFER.items()} == OFFICIAL and OFFICIAL.keys() <= DATASETS.keys()
    assert all(s.source.startswith("http") and s.layouts and (not s.torchvision or hasattr(datasets, s.torchvision)) for s in TRANSFER.values())
    assert all(STATS[n] == ([.485, .456, .406], [.229, .224, .225]) for n in TRANSFER)


@pytest.mark.parametrize("name", [*WRITE, "cars in one"])
@pytest.mark.parametrize("where", ["its name", "a path", "a folder around it", "an archive"])
def test_a_layout_is_read_wherever_it_lies(name, where, home):
    write, name = (write_cars_in_one, "cars") if name == "cars in one" else (WRITE[name], name)
    folder = {"its name": home / TRANSFER[name].folder, "a folder around it": Path("stuff/inner")}.get(where, Path("mine"))
    expected = write(folder)
    data = {"its name": name, "a path": "./mine", "a folder around it": "stuff", "an archive": "x.tar.gz"}[where]
    if where == "an archive":
        with tarfile.open(data, "w:gz") as tar: tar.add("mine")
    l = find_pictures(data)
    assert {f: (c, i >= l.n_train) for i, (f, c) in enumerate(zip(l.files, l.labels))} == {f: v[:2] for f, v in expected.items()}
    assert l.family == name and len(l.notes) == 1 and "not the official split, which has {:,} and {:,} of {:,}".format(*OFFICIAL[name]) in l.notes[0]
    for f, v in expected.items():
        if len(v) > 2: assert np.array_equal(np.asarray(Image.open(l.root / f)), v[2])   # CIFAR's pixels
    assert not check_pictures(l).broken


@pytest.mark.parametrize("name", WRITE)
def test_official_counts_are_told_as_such(name, monkeypatch, home):
    expected = WRITE[name](home / TRANSFER[name].folder)
    n, classes = sum(not v[1] for v in expected.values()), 102 if name == "flowers102" else 3 - (name == "food101")
    monkeypatch.setitem(TRANSFER, name, TRANSFER[name]._replace(train=n, test=len(expected) - n, classes=classes))
    assert find_pictures(name).notes == ()
    assert f"{name}: the official split" in describe(name, size=16).text.splitlines()


def test_a_transfer_data_set_trains_and_is_described(home, capfd):
    write_flowers(home / "flowers102")
    dls = get_dls("flowers102", 16, 2, "cpu")
    assert list(dls.vocab) == ["blackberry lily", "hard-leaved pocket orchid", "pink primrose"] and dls.about["mean"] == [.485, .456, .406]
    assert dls.family == "flowers102" and identify("flowers102").fingerprint and identify("flowers102").name == "flowers102"
    assert "3 training and 3 test pictures of 102 classes, not the official split" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="^0$"): main(["data", "flowers102", "--size", "16"])
    out = capfd.readouterr().out
    assert "pink primrose" in out and "not the official split, which has 2,040 and 6,149" in out and Path("flowers102.png").is_file()


def test_cars_in_the_nested_folders_of_some_copies():
    expected = write_cars(Path("c"))
    for part in ("cars_train", "cars_test"):
        os.rename(f"c/{part}", "c/x")
        os.mkdir(f"c/{part}")
        os.rename("c/x", f"c/{part}/{part}")
    assert sorted(find_pictures("./c").files) == sorted(f"{Path(f).parent}/{f}" for f in expected) and not check_pictures(find_pictures("./c")).broken


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_pixels_of_cifar_in_pickles_of_each_age(protocol):
    expected = write_cifar(Path("c"), protocol=protocol)
    l = find_pictures("./c")
    assert all(np.array_equal(np.asarray(Image.open(l.root / f)), v[2]) for f, v in expected.items())


def test_food_as_fastai_has_it():
    expected = write_food(Path("food-101"))
    for part in ("train", "test"): os.rename(f"food-101/meta/{part}.json", f"food-101/{part}.json")
    os.rmdir("food-101/meta")
    for f in ("classes.txt", "labels.txt"): Path("food-101", f).touch()
    l = find_pictures("./food-101")
    assert set(l.files) == set(expected) and l.family == "food101" and l.n_train == 3
    for f in ("classes.txt", "labels.txt"): os.unlink(f"food-101/{f}")   # might be anybody's
    assert official_layout(Path("food-101")) is None


def test_a_pickle_with_code_in_it_is_refused_and_not_run():
    class Evil:
        def __reduce__(self): return os.mkdir, ("evil",)
    write_cifar(Path("c"))
    Path("c/data_batch_3").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(BadInput, match="^data: the files of cifar10 in c cannot be read .*holds code, (posix|nt).mkdir, which is not run"): find_pictures("./c")
    assert not Path("evil").exists() and not [f for f in Path("home").rglob("*") if "rows.json" in f.name or f.suffix == ".tmp"]


@pytest.mark.parametrize("name,file,content,why", [
    ("flowers102", "imagelabels.mat", b"", "cannot be read"), ("flowers102", "setid.mat", b"MATLAB 5.0" + bytes(300), "cannot be read"),
    ("inat2018", "train2018.json", b'{"images": []}', "cannot be read .KeyError"), ("food101", "meta/test.json", b"{", "cannot be read"),
    ("food101", "meta/test.json", b'{"pizza": ["pizza/1"]}', "cannot be read"), ("pets", "annotations/test.txt", b"Abyssinian_1\n", "cannot be read"),
    ("pets", "annotations/test.txt", b"Abyssinian_1 0 1 1\n", r"classes beside the 3 of pets, counted from 0: images/Abyssinian_1.jpg \(-1\)"),
    ("cifar10", "test_batch", b"\x80\x02", "cannot be read"), ("cifar10", "test_batch", pickle.dumps([]), "cannot be read")])
def test_damaged_files_of_a_layout(name, file, content, why, home):
    WRITE[name](home / name)
    (home / name / file).write_bytes(content)
    with pytest.raises(BadInput, match=f"^data: .*{why}") as e: find_pictures(name)
    assert "Get " in str(e.value) and TRANSFER[name].source in str(e.value)


@pytest.mark.parametrize("name,gone", [("flowers102", "imagelabels.mat"), ("cars", "cars_test_annos_withlabels.mat"), ("inat2018", "val2018.json"),
                                       ("pets", "annotations/test.txt"), ("food101", "meta/test.json"), ("cifar10", "data_batch_2")])
def test_a_part_that_is_missing_is_named(name, gone, home):
    WRITE[name](Path("mine"))
    (Path("mine") / gone).unlink()
    with pytest.raises(BadInput, match=f"^data: mine has .* of {name} but lacks {gone}. Get the rest from http"): find_pictures("./mine")
    (home / name).parent.mkdir(parents=True)
    os.rename("mine", home / name)
    with pytest.raises(BadInput, match=f"{name} but lacks {gone}"): find_pictures(name)


def test_pictures_that_are_missing_are_named_and_can_be_left_out():
    write_pets(Path("p"))
    os.unlink("p/images/american_bulldog_3.jpg")
    with pytest.raises(BadInput, match=r"1 of 5 pictures in p are broken: images/american_bulldog_3.jpg \(No such file or directory\)"): get_dls("./p", 16, 2, "cpu")
    assert len(get_dls("./p", 16, 2, "cpu", skip_broken=True).train_ds) == 2


def test_what_is_no_longer_given_out_is_asked_for(home):
    with pytest.raises(BadInput, match="^data: cars is not downloaded, see http.*Put devkit/cars_train_annos.mat, .*cars_test_annos_withlabels.mat, .* or cars_annos.mat, "
                                       f"car_ims/ into {home}/cars, or pass the path"): fetch("cars")
    with pytest.raises(BadInput, match="^data: inat2019 is not downloaded.*train2019.json, val2019.json, train_val2019/ into "): get_dls("inat2019")


def test_folders_that_only_look_like_one_are_read_as_before():
    for part in ("train", "test"):
        for c in "ab": save(f"d/{part}/{c}/0.png", 0)
    Path("d/meta").touch()
    assert official_layout(Path("d")) is None and find_pictures("./d").labels == ["a", "b"] * 2
    for i, c in enumerate("aaabbb"): save(f"e/images/{c}/{i}.png", i)
    assert sorted(find_pictures("e").labels) == list("aaabbb")


@pytest.fixture
def server(tmp_path, monkeypatch):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    for k in ("http_proxy", "HTTP_PROXY"): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)   # which keeps the proxies that it was made with
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{s.server_port}"
        s.shutdown()


def test_torchvision_downloads_by_name_once(server, monkeypatch, home):
    expected = write_pets(Path("p"))
    for part in ("images", "annotations"):
        with tarfile.open(f"{part}.tar.gz", "w:gz") as tar: tar.add(f"p/{part}", part)
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", [(f"{server}/{part}.tar.gz", None) for part in ("images", "annotations")])
    assert set(find_pictures("pets").files) == set(expected) and fetch("pets") == home / "oxford-iiit-pet"
    assert sorted(f.name for f in fetch("pets").iterdir()) == ["annotations", "images"]
    for f in ("images.tar.gz", "annotations.tar.gz"): Path(f).unlink()
    assert len(get_dls("pets", 16, 2, "cpu").train_ds) == 3   # from the disk


def test_no_network(monkeypatch, home):
    for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"): monkeypatch.setenv(k, "http://127.0.0.1:9")
    for name in ("cifar10", "flowers102", "pets", "food101"):
        with pytest.raises(BadInput, match=f"^data: {name} could not be downloaded .*Get http.* some other way, and pass the path of the archive, or of its folder"): fetch(name)
    assert not home.exists() or [f for f in home.iterdir() if f.suffix != ".lock"] == []


def test_of_very_many_classes_the_first_are_told():
    for i in range(260):
        save(f"many/train/{i:03}/0.png", i, (8, 8)), save(f"many/val/{i:03}/1.png", 1000 + i, (8, 8))
    lines = describe("./many", size=8).text.splitlines()
    assert "249          1      1" in lines and "and 10 more classes" in lines and not any(line.startswith("250 ") for line in lines)


# Doubles

def folder_of(scenes, root="photos"):
    "A folder of pictures: `{file: picture or (picture, options of saving)}`."
    for file, im in scenes.items():
        im, options = im if isinstance(im, tuple) else (im, {})
        (f := Path(root, file)).parent.mkdir(parents=True, exist_ok=True)
        im.save(f, **options)
    return list_folder(root)


def named(doubles, groups): return sorted(sorted(doubles.listing.files[i] for i in g) for g in groups)


def strangers(n=30, start=100, size=(60, 44)):
    return {f"{'train' if i % 3 else 'val'}/{'ab'[i % 2]}/s{i:03}.png": scene(start + i, size) for i in range(n)}


def test_the_same_pixels_in_any_format_and_nearly_the_same():
    one, two, three, four = map(scene, range(4))
    bright = ImageEnhance.Brightness(three).enhance(1.08)
    l = folder_of(strangers() | {
        "train/a/one.png": one, "val/a/one.bmp": one, "train/a/two.png": two, "val/a/two.jpg": (two, dict(quality=60)),
        "train/b/three.png": three, "train/b/bright.png": bright, "train/b/four.png": four, "val/a/half.png": four.resize((30, 22))})
    d = doubles_of(l)
    assert named(d, d.same) == [["train/a/one.png", "val/a/one.bmp"]]
    assert named(d, d.near) == [["train/a/one.png", "val/a/one.bmp"], ["train/a/two.png", "val/a/two.jpg"],
                                ["train/b/bright.png", "train/b/three.png"], ["train/b/four.png", "val/a/half.png"]]
    assert named(d, d.across()) == [["train/a/one.png", "val/a/one.bmp"], ["train/a/two.png", "val/a/two.jpg"], ["train/b/four.png", "val/a/half.png"]]
    assert named(d, d.conflicts) == [["train/b/four.png", "val/a/half.png"]]
    assert str(d).splitlines() == [
        "Doubles: 8 pictures in 4 groups, of the same pixels (=) or nearly (~)", "  3 of 13 validation pictures train as well, 1 by the same pixels:",
        "    train/b/four.png ~ val/a/half.png", "    train/a/one.png = val/a/one.bmp and 1 more",
        "  1 group of more than one class:", "    train/b/four.png (b) ~ val/a/half.png (a)"]
    said = describe("photos", size=16)
    assert str(d) in said.text and said.doubles == d


def test_a_data_set_without_doubles():
    d = doubles_of(folder_of(strangers(60)))
    assert str(d) == "Doubles: none" and d.same == d.near == d.across() == d.conflicts == []


def test_doubles_in_one_part_that_another_split_would_part():
    d = doubles_of(folder_of(strangers() | {"train/a/x.png": scene(1), "train/a/y.png": scene(1)}))
    assert d.across() == [] and str(d).splitlines()[1:] == ["  none in both parts, but another split may part them:", "    train/a/x.png = train/a/y.png"]
    x, y = (d.listing.files.index(f"train/a/{c}.png") for c in "xy")
    assert d.across(np.array([y, 0, x]), 2) == [(y, x)] and d.across(np.array([0, y, x]), 1) == [] and d.across(np.array([0, y]), 1) == []


def test_a_validation_picture_counts_once_and_the_same_pixels_before_others():
    im = scene(3)
    d = doubles_of(folder_of(strangers() | {"train/a/1.jpg": (im, dict(quality=70)), "train/a/2.png": im, "val/a/3.png": im, "train/a/4.jpg": (im, dict(quality=60))}))
    assert len(d.near) == 1 and len(d.near[0]) == 4 and named(d, d.across()) == [["train/a/2.png", "val/a/3.png"]] and "1 by the same pixels" in str(d)


@pytest.mark.parametrize("grain", [0, 1])
def test_pictures_with_nothing_in_them_are_doubles_by_their_pixels_alone(grain):
    rng = np.random.default_rng(0)
    def flat(level): return Image.fromarray((level + rng.integers(0, grain + 1, (40, 40, 3))).astype(np.uint8))
    d = doubles_of(folder_of({f"{'train' if i % 2 else 'val'}/{'ab'[i // 10]}/{i}.png": flat(10 * i) for i in range(20)} | {"val/a/blank.png": flat(250), "train/b/blank.png": flat(250)}))
    assert named(d, d.near) == ([] if grain else [["train/b/blank.png", "val/a/blank.png"]]) and d.same == d.near


def test_simple_pictures_that_all_look_alike_are_few_doubles_but_copies_are_found():
    from sklearn.datasets import load_digits
    digits = load_digits()
    pictures = [Image.fromarray((im * 15.9).astype(np.uint8)).resize((24, 24), Image.BICUBIC) for im in digits.images[:600]]
    copies = {f"val/{digits.target[i]}/copy{i}.jpg": (pictures[i], dict(quality=90)) for i in range(0, 600, 30)}
    d = doubles_of(folder_of({f"{'val' if i % 5 == 0 else 'train'}/{c}/{i}.png": im for i, (im, c) in enumerate(zip(pictures, digits.target))} | copies))
    found = {tuple(g) for g in named(d, d.near) if len(g) == 2}
    missed = [i for i in range(0, 600, 30) if not any(f"/copy{i}." in a + b and f"/{i}." in a + b for a, b in found)]
    assert len(missed) <= 2 and len(d.near) - (20 - len(missed)) <= 15   # of the 320 pairs that share a hash and correlate by .92


def test_frames_of_a_film_are_one_group():
    large = np.asarray(scene(5, (120, 88)))
    frames = {f"train/a/f{i:02}.png": Image.fromarray(large[i // 4:80 + i // 4, :100]) for i in range(12)}
    d = doubles_of(folder_of(strangers() | frames))
    assert named(d, d.near) == [sorted(frames)]


def test_colour_tells_pictures_apart():
    grey = np.asarray(scene(7).convert("L"), float)[..., None]
    def tinted(*rgb): return Image.fromarray((grey * np.array(rgb)).clip(0, 255).astype(np.uint8))
    d = doubles_of(folder_of(strangers() | {"train/a/red.png": tinted(1, .1, .1), "val/b/green.png": tinted(.1, .51, .1)}))
    assert d.near == []


def test_broken_pictures_are_no_doubles():
    folder_of(strangers())
    for f in ("photos/train/a/x.png", "photos/val/a/y.png"): Path(f).touch()
    assert doubles_of(list_folder("photos")).near == []
    for f in Path("photos").rglob("*.png"): f.write_bytes(b"")
    assert "Doubles: none" in describe("photos").text and len(describe("photos").broken) == 32


def test_pixels_that_have_changed_places_are_not_the_same():
    pixels = np.asarray(scene(3, (64, 64))).copy()
    pixels[0, 0], pixels[0, 1] = (10, 20, 30), (30, 20, 10)
    moved = pixels.copy()
    moved[0, :2] = pixels[0, 1::-1]   # the same colours, and the same means of four
    d = doubles_of(folder_of(strangers() | {"train/a/x.png": Image.fromarray(pixels), "val/a/y.png": Image.fromarray(moved)}))
    assert d.same == [] and named(d, d.near) == [["train/a/x.png", "val/a/y.png"]]


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_doubles_among_a_few_pictures(n):
    l = folder_of({f"{'train' if i < 2 else 'val'}/{'ab'[i % 2]}/{i}.png": scene(i) for i in range(n)} | {"val/a/x.jpg": (scene(0), dict(quality=80))}
                  | ({"train/b/1.png": scene(50)} if n < 2 else {}))
    d = doubles_of(l)
    assert named(d, d.near) == [["train/a/0.png", "val/a/x.jpg"]]


def test_another_split_of_the_same_pictures_decodes_none_again(home):
    l = folder_of({f"{c}/{i}.png": scene(i, (20 + i, 16)) for i, c in enumerate("ab" * 10)})
    seen = []
    for seed in range(3):
        l = list_folder("photos", split_seed=seed)
        c = check_pictures(l)
        p = make_pixels(l, c.sizes, 16, Path(f"{c.path}-16"))
        assert all(np.array_equal(p[i], np.asarray(Image.open(l.root / f))) for i, f in enumerate(l.files)) and len(p) == 20
        assert [list(Image.open(l.root / f).size) for f in l.files] == c.sizes.tolist()
        mean = np.mean([np.asarray(Image.open(l.root / f)).reshape(-1, 3).mean(0) / 255 for f in l.files[:l.n_train]], 0)
        assert np.abs(mean - c.mean).max() < 1e-4
        seen.append((c.path, tuple(c.mean)))
        doubles_of(l)
    assert len({s[0] for s in seen}) == 1 and len({s[1] for s in seen}) == 3 and len(list((home / "attnpool").glob("*-check"))) == len(list((home / "attnpool").glob("*-doubles"))) == 1
