"A run knows which data made it, by the files and not by how a path is spelled; and its network knows what it says."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import Normalize
from PIL import Image

from attnpool.cli import main
from attnpool.data import get_dls, identify
from attnpool.data.listing import WORDNET, differences, digests, fingerprint, list_csv, list_folder, read_digests
from attnpool.registry import BadInput
from attnpool.runs.spec import make_spec
from attnpool.runs.store import earlier_data, load_run, read_about
from attnpool.runs.train import open_run, run

COLOURS = dict(red=(200, 40, 40), green=(40, 160, 40), blue=(40, 40, 200))
SMALL = dict(epochs=2, size=16, bs=4, eval_sizes=())


def fill(root, classes=("red", "green", "blue"), n=6, seed=0):
    for c, name in enumerate(classes):
        (folder := Path(root, name)).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            noise = np.random.default_rng([seed, c, i]).integers(-30, 30, (24, 24, 3))
            Image.fromarray((noise + COLOURS.get(name, (120, 90, 60))).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return Path(root)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fastai_cfg.cache_clear()


@pytest.fixture
def trained(request, tmp_path_factory, tmp_path):
    "A run on photos/, both copied to where the test works."
    if not hasattr(request.session, "photos_run"):
        place = tmp_path_factory.mktemp("once")
        fill(place / "photos", n=10)
        result = run(make_spec(place / "photos", "slim", **SMALL | dict(epochs=6)), place / "R", "cpu")
        about = json.loads((result.folder / "data.json").read_text())
        assert about["path"] == str((place / "photos").resolve())
        request.session.photos_run = place, result.folder.name
    place, name = request.session.photos_run
    for d in ("photos", "R"): shutil.copytree(place / d, d)
    change(Path("R", name), path=str(Path("photos").resolve()))
    typed(Path("R", name), "photos")
    Image.new("RGB", (24, 24), COLOURS["red"]).save("red.png")
    return Path("R", name)


def change(folder, **values):
    "Other values in a run's `data.json`; None takes the file away, as earlier versions have none."
    file, result = folder / "data.json", folder / "result.json"
    written = json.loads(result.read_text())
    if values == dict(all=None):
        file.unlink()
        del written["files"]["data.json"]
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        written["files"]["data.json"] = file.stat().st_size
    result.write_text(json.dumps(written))


def typed(folder, path):
    "As if the run had been asked for with these words."
    written = json.loads((folder / "result.json").read_text())
    written["spec"]["data"]["path"] = path
    (folder / "result.json").write_text(json.dumps(written))


def called(*words):
    with pytest.raises(SystemExit) as e: main([str(w) for w in words])
    return e.value.code


def told(learn, file="red.png"):
    with learn.no_bar(): return learn.predict(file)[0]


def bench(data, heads="avg", out="R"):
    return called("bench", data, *f"--heads {heads} --seeds 1 --epochs 1 --size 16 --bs 4 --device cpu --out {out}".split())


# Which data

def test_one_folder_is_one_data_set_however_it_is_spelled(capfd, monkeypatch):
    fill("photos")
    os.symlink("photos", "link")
    assert bench("photos") == 0 and "already" not in capfd.readouterr().out
    for spelled in ("photos/", "./photos", "./photos/../photos", str(Path("photos").resolve()), "link", "link/", "./link/../photos"):
        assert bench(spelled) == 0
        assert "1 of 1 runs are in R already" in (said := capfd.readouterr()).out and said.err == "", spelled
    monkeypatch.chdir("photos")
    assert bench(".", out="../R") == 0 and bench("../photos", out="../R") == 0
    assert capfd.readouterr().out.count("1 of 1 runs are in ../R already") == 2
    monkeypatch.chdir("..")
    Path("other").mkdir()
    shutil.move("photos", "other/photos")
    assert bench("other/photos") == 0 and "already" in capfd.readouterr().out
    assert len(list(Path("R").glob("photos-*"))) == 1


def swap(root):
    for i in range(3):
        a, b = root / f"red/{i}.png", root / f"blue/{i}.png"
        a.rename("x"), b.rename(a), Path("x").rename(b)


def elsewhere(root):
    shutil.rmtree(root)
    fill(root, seed=1)


CHANGES = [
    (swap, "6 changed: blue/0.png, blue/1.png, blue/2.png and 3 more"), (lambda r: (r / "red").rename(r / "a_red"), "6 added: a_red/0.png"),
    (lambda r: fill(r, ("yellow",)), "6 added: yellow/0.png"), (lambda r: (r / "red/0.png").rename(r / "green/new.png"), "1 added: green/new.png; 1 removed: red/0.png"),
    (elsewhere, "18 changed: blue/0.png"), (lambda r: shutil.rmtree(r / "blue"), "6 removed: blue/0.png")]


@pytest.mark.parametrize("change_it, what", CHANGES)
def test_changed_data_are_told_and_trained_on_anew(change_it, what, capfd):
    root = fill("photos")
    assert bench("photos") == 0
    old, = Path("R").glob("photos-*/result.json")
    content = old.read_bytes()
    capfd.readouterr()
    change_it(root)
    assert bench("photos") == 0
    said = capfd.readouterr()
    assert f"photos is not what {old.parent.name} was trained on: " in said.out and what in said.out, said.out
    assert "already" not in said.out and said.err == "" and old.read_bytes() == content
    assert len(list(Path("R").glob("photos-avg-1-*/result.json"))) == 2
    assert bench("photos") == 0
    assert "1 of 1 runs are in R already" in (said := capfd.readouterr()).out and "was trained on" not in said.out


def test_other_data_of_the_same_name_are_others(capfd):
    for seed, where in enumerate("ab"): fill(f"{where}/photos", seed=seed)
    assert bench("a/photos") == 0 and bench("b/photos") == 0
    said = capfd.readouterr().out
    assert said.count("b/photos is not what photos-avg-1-") == 1 and "18 changed" in said and "already" not in said
    a, b = sorted(Path("R").glob("photos-*/result.json"))
    assert load_run(a.parent).spec.data.fingerprint != load_run(b.parent).spec.data.fingerprint


def test_of_many_earlier_runs_one_of_each_data_is_told():
    fill("photos")
    for seed in (1, 2):
        folder = Path("R", (spec := make_spec("./photos", seed=seed, **SMALL)).name)
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(json.dumps(spec.to_json()))
    (Path("R") / "junk").mkdir()
    (Path("R") / "junk/spec.json").write_text("[1")
    Path("photos/red/0.png").unlink()
    text, = earlier_data([make_spec("./photos", seed=s, **SMALL) for s in (1, 2)], "R")
    assert text.startswith("./photos is not what photos-avg-1-") and "trained on: other pictures." in text   # these runs hold no pictures.csv
    assert earlier_data([make_spec("digits")], "R") == [] == earlier_data([], "R")


# What the outputs mean

def test_the_names_of_a_run_are_its_own_whatever_became_of_its_data(trained, tmp_path, monkeypatch, capfd):
    with_own = open_run(trained, "cpu")
    assert list(with_own.dls.vocab) == ["blue", "green", "red"] and told(with_own) == "red" and len(with_own.dls.valid_ds) == 6
    with with_own.no_bar(): probabilities = with_own.predict("red.png")[2]
    Path("photos/red").rename("photos/a_red")
    fill("photos", ("yellow",))
    bare = open_run(trained, "cpu", with_data=False)
    assert told(bare) == "red" and len(bare.dls.valid_ds) == 0
    changed = open_run(trained, "cpu")
    said = capfd.readouterr().err
    assert told(changed) == "red" and said.startswith(f"attnpool: {trained.name} is opened without its data, to show others. data: ")
    assert "photos has changed since" in said and "6 added: yellow/0.png" not in said and "added: a_red/0.png" in said
    with pytest.raises(BadInput, match="^data: .*photos has changed since"): open_run(trained, "cpu", with_data=True)
    for options in (dict(data="photos"), dict(with_data=True)):
        with pytest.raises(BadInput, match="has the classes a_red, blue, green, yellow, and .* was trained on blue, green, red"):
            open_run(trained, "cpu", check=False, **options)
    for options in ((), ("--no-check",)):
        assert called("maps", trained, "--device", "cpu", *options) == 2
        assert "Traceback" not in (said := capfd.readouterr().err) and said.count("\n") == 1
    shutil.rmtree("photos")
    (away := tmp_path / "away").mkdir()
    monkeypatch.chdir(away)
    gone = open_run(tmp_path / trained, "cpu")
    said = f"attnpool: {trained.name} is opened without its data, to show others. data: there is no file or folder {tmp_path / 'photos'}."
    assert said in capfd.readouterr().err
    with gone.no_bar(): assert torch.equal(gone.predict("../red.png")[2], probabilities)
    with pytest.raises(FileNotFoundError, match="^data: there is no file or folder .*photos"): open_run(tmp_path / trained, "cpu", with_data=True)
    with pytest.raises(FileNotFoundError, match="nowhere"): open_run(tmp_path / trained, "cpu", "nowhere/photos")
    assert called("maps", tmp_path / trained, "--device", "cpu") == 2
    assert "there is no file or folder" in (said := capfd.readouterr().err) and "give data= (--data)" in said and "pictures of your own" in said and "Known names" not in said


@pytest.mark.parametrize("options", [(), ("--no-check",)])
def test_the_command_maps_needs_only_the_run_for_pictures_of_ones_own(trained, options, monkeypatch, tmp_path):
    import re
    pages = []
    for after in (lambda: None, lambda: Path("photos/red").rename("photos/a_red"), lambda: shutil.rmtree("photos")):
        after()
        assert called("maps", trained, "red.png", "--device", "cpu", "--out", "maps.html", *options) == 0
        pages.append(re.findall(r"<button[^>]*>(\w+)<span>([\d.]+%)", Path("maps.html").read_text()))
    assert pages[0][0][0] == "red" and pages[0] == pages[1] == pages[2]


def test_moved_data_are_found_again(trained, monkeypatch, tmp_path):
    (place := tmp_path / "new").mkdir()
    for d in ("photos", "R"): shutil.move(d, place / d)
    assert len(open_run(place / trained, "cpu", place / "photos").dls.valid_ds) == 6
    change(place / trained, path="/nowhere/photos")
    monkeypatch.chdir(place)   # run and data have moved together
    assert len(open_run(trained, "cpu", with_data=True).dls.valid_ds) == 6
    change(Path(trained), path=str(place / "photos"))
    monkeypatch.chdir("/")   # no such folder here, but it is known where it lay
    assert len(open_run(place / trained, "cpu", with_data=True).dls.valid_ds) == 6


def test_other_pictures_are_normalised_as_in_training(trained):
    mean = json.loads((trained / "data.json").read_text())["mean"]
    for f in Path("photos").rglob("*.png"): Image.eval(Image.open(f), lambda v: v // 2).save(f)
    darker, today = open_run(trained, "cpu", check=False), get_dls("./photos", 16, 4, "cpu")
    norms = [[t for t in dl.after_batch.fs if isinstance(t, Normalize)][0] for dl in (*darker.dls.loaders, *today.loaders)]
    assert all(torch.allclose(n.mean.flatten(), torch.tensor(mean)) for n in norms[:2])
    assert not torch.allclose(norms[2].mean, norms[0].mean, atol=.05)


def test_a_run_of_an_earlier_version_says_what_it_can(trained):
    change(trained, all=None)
    about = read_about(load_run(trained))
    assert about["vocab"] == ["blue", "green", "red"] and about["size"] == 16 and "mean" not in about
    assert told(open_run(trained, "cpu", with_data=False)) == "red"   # it needs its data for their statistics
    Path("photos/red").rename("photos/a_red")
    with pytest.raises(BadInput, match="was trained on blue, green, red"): open_run(trained, "cpu", check=False, with_data=False)
    shutil.rmtree("photos")
    with pytest.raises(FileNotFoundError, match="^data: there is no file or folder ./photos"): open_run(trained, "cpu")


def test_a_run_of_an_earlier_version_on_known_data_needs_none_of_them():
    ids = list(WORDNET["imagenette"])[:2]
    result = run(make_spec(fill("nette", ids), "avg", **SMALL | dict(epochs=1)), "R", "cpu")
    with (open_run(result.folder, "cpu")).no_bar(): wanted = open_run(result.folder, "cpu").predict("nette/" + ids[0] + "/0.png")
    change(result.folder, all=None)
    shutil.move(f"nette/{ids[0]}/0.png", "a.png")
    shutil.rmtree("nette")
    learn = open_run(result.folder, "cpu")
    with learn.no_bar(): found = learn.predict("a.png")
    assert list(learn.dls.vocab) == ["tench", "English springer"] and found[0] == wanted[0] and torch.equal(found[2], wanted[2])


# Tables

def table(name="t.csv", header="path,label", rows=None, sep="\n", more="", encoding="utf-8"):
    files = sorted(Path("photos").rglob("*.png"))
    rows = rows or (lambda f: f"{f},{f.parent.name}")
    Path(name).write_bytes((sep.join([header, *map(rows, files)]) + sep + more).encode(encoding))
    return name


def test_a_picture_that_a_table_names_twice_is_one():
    fill("photos", ("red", "green"))
    os.symlink("photos/red/0.png", "link.png")
    for spelled in ("./photos/red/0.png", "photos/../photos/red/0.png", str(Path("photos/red/0.png").resolve()), "link.png", "photos\\red\\0.png"):
        l = list_csv(table(more=f"\n{spelled},red\n"))
        assert len(l.files) == 12 and l.notes == ("rows that name a picture again, and are left out: lines 15",)
        want = r"^data: t.csv names pictures more than once: photos/red/0.png in line 8 \(red\) and .* in line 15 \(green\). A picture has one label"
        with pytest.raises(BadInput, match=want): list_csv(table(more=f"\n{spelled},green\n"))
        want = r"in line 8 \(red, train\) and .* in line 14 \(red, val\)"
        with pytest.raises(BadInput, match=want):
            list_csv(table(header="path,label,split", rows=lambda f: f"{f},{f.parent.name},train", more=f"{spelled},red,val\n"))
    plain, again = (fingerprint(digests(list_csv(table(more=more)))) for more in ("", "./photos/red/0.png,red\n"))
    assert plain == again


@pytest.mark.parametrize("text, lines", [
    ("path,label\na.png,\n", "2"), ("path,label\n\n\na.png,x\n\n,y\nb.png,\n", "6, 7"), ('path,label\n"a\n\nb.png",x\n,y\n', "5"), ("\n\npath,label\n,x\n", "4"),
    ("path,label\r\n\r\na.png,x\r\n,y\r\n", "4"), ("path,label\n , \n,,\n  \nb.png\n", "5"), ('path,label\n"c\nd.png",\n', "2")])
def test_the_lines_that_an_error_names_are_those_of_the_file(text, lines):
    Path("t.csv").write_bytes(text.encode())
    with pytest.raises(BadInput, match=f"^data: t.csv has rows without a path or a label: lines {lines}[.]$"): list_csv("t.csv")


@pytest.mark.parametrize("options", [
    dict(encoding="utf-8-sig"), dict(header="path;label", rows=lambda f: f"{f};{f.parent.name}"), dict(header="path\tlabel", rows=lambda f: f"{f}\t{f.parent.name}"),
    dict(sep="\r\n"), dict(header=" Path , LABEL", rows=lambda f: f' "{f}" , {f.parent.name}'.replace('" ,', '",')), dict(rows=lambda f: f"{str(f).replace('/', chr(92))},{f.parent.name}"),
    dict(rows=lambda f: f"~/{f},{f.parent.name}"), dict(rows=lambda f: f"{f.resolve()},{f.parent.name}"), dict(header="path,label,note", rows=lambda f: f'{f},{f.parent.name},"of two\nlines"')])
def test_tables_as_programs_write_them(options, monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    fill("photos", ("red", "green"))
    l, plain = list_csv(table(**options)), list_csv(table("plain.csv"))
    assert l.labels == plain.labels and [(l.root / f).resolve() for f in l.files] == [(plain.root / f).resolve() for f in plain.files] and l.notes == ()
    assert list(d for *_, d in digests(l).values()) == list(d for *_, d in digests(plain).values()) and len(get_dls("t.csv", 16, 4, "cpu").train_ds) == l.n_train


@pytest.mark.parametrize("content, message", [
    ("path,label\na.png,x\n".encode("utf-16"), "not a CSV in UTF-8"), (b'path,label\na.png,x\n"b.png,y\n', "not a CSV in UTF-8 .line 3: unexpected end"), (b"path,label\na\0.png,x\n", "holds a zero byte"),
    (b"\n\n", "has no rows"), (b"path,label,split\na,x,Later\n", "has 'Later' in its column split"), (b"file;label\na;x\n", "no column path; its columns are 'file', 'label'")])
def test_tables_that_cannot_be_read_say_so(content, message):
    Path("t.csv").write_bytes(content)
    with pytest.raises(BadInput, match=f"^data: t.csv .*{message}"): list_csv("t.csv")
    assert called("data", "t.csv") == 2


@pytest.mark.parametrize("text, message", [
    ("path,label\ncs/0.png,car, red\ncs/1.png,x\n\ncs/2.png,car,blue\n", 'in lines 2, 5. .*in quotes; perhaps "car, red"'), ("label;path\nx;a.png;b\n", 'in lines 2. .*perhaps "a.png; b"'),
    ("path,label,Label\na.png,car,red\n", "has the column label more than once"), ("path,label,is_valid\na.png,x,maybe\n", "has 'maybe' in its column is_valid. Expected 0 or 1")])
def test_what_stands_in_a_row_is_not_lost(text, message):
    Path("t.csv").write_text(text)
    with pytest.raises(BadInput, match=f"^data: t.csv .*{message}"): list_csv("t.csv")
    assert called("data", "t.csv") == 2
    fill("photos", ("red", "green"))
    quoted = list_csv(table(header="path,label,,", rows=lambda f: f'{f},"car, {f.parent.name}",,,'))   # empty cells are none
    assert list(quoted.classes) == ["car, green", "car, red"]


@pytest.mark.parametrize("no, yes", [("0", "1"), ("False", "True"), ("false", "TRUE")])
def test_the_column_of_fastai_is_a_split(no, yes):
    fill("photos", ("red", "green"))
    l = list_csv(table(header=",path,label,Is_Valid", rows=lambda f: f"7,{f},{f.parent.name},{no if int(f.stem) else yes}"))
    assert l.n_train == 10 and l.files[10:] == ["photos/green/0.png", "photos/red/0.png"] and l.notes == ()
    with pytest.raises(BadInput, match=r"0.png in line 2 \(green, val\) and .* in line 14 \(green, train\)"):
        list_csv(table(header="path,label,is_valid", rows=lambda f: f"{f},{f.parent.name},{no if int(f.stem) else yes}", more=f"photos/green/0.png,green,{no}\n"))


def test_a_test_split_validates_where_no_other_does():
    fill("photos", ("red", "green"))
    def split(*splits): return list_csv(table(header="path,label,split", rows=lambda f: f"{f},{f.parent.name},{splits[min(int(f.stem), 2)]}"))
    l = split("Test", "train", "train")
    assert l.n_train == 10 and l.files[10:] == ["photos/green/0.png", "photos/red/0.png"] and "those of test validate" in l.notes[0]
    l = split("test", "valid", "train")
    assert l.n_train == 8 and l.files[8:] == ["photos/green/1.png", "photos/red/1.png"] and l.notes == ("2 rows of the split test are left alone; attnpool bench --test tries each run on them once, at its end",)


def test_a_hard_link_is_the_same_picture():
    fill("photos", ("red", "green"))
    os.link("photos/red/0.png", "link.png")
    assert list_csv(table(more="\nlink.png,red\n")).notes == ("rows that name a picture again, and are left out: lines 15",)
    with pytest.raises(BadInput, match=r"photos/red/0.png in line 8 \(red, train\) and link.png in line 14 \(red, val\)"):
        list_csv(table(header="path,label,split", rows=lambda f: f"{f},{f.parent.name},train", more="link.png,red,val\n"))


def test_names_that_are_not_utf8(capfd):
    root, red = fill("photos", ("red", "green")), os.fsdecode(b"photos/r\xe9d")
    os.rename("photos/red", red)
    os.rename(f"{red}/0.png", os.fsdecode(b"photos/r\xe9d/\xff.png"))
    dls = get_dls(root, 16, 4, "cpu")
    assert list(dls.vocab) == ["green", "r\\xe9d"] and called("data", root) == 0 and "\nr\\xe9d  " in capfd.readouterr().out
    assert bench(root) == 0, capfd.readouterr().err
    folder, = (f.parent for f in Path("R").glob("*/result.json"))
    assert read_digests(folder / "pictures.csv") == digests(dls.listing) and "r\\xe9d/\\xff.png" in digests(dls.listing)
    assert list(open_run(folder, "cpu", with_data=True).dls.vocab) == list(dls.vocab) and bench(root) == 0 and len(list(Path("R").glob("*/result.json"))) == 1
    away = root.rename(os.fsdecode(b"d\xe9"))
    assert called("data", away) == 0 and bench(away, out="S") == 0, capfd.readouterr().err
    run, = (f.parent for f in Path("S").glob("*/result.json"))
    assert run.name.startswith("d\\xe9-avg-1-") and called("maps", run, "--device", "cpu", "--out", "m.html") == 0
    Path(os.fsdecode(b"d\xe9/green/\xfe.png")).touch()
    assert called("data", away) == 0 and "green/\\xfe.png: zero bytes" in capfd.readouterr().out


def test_a_split_in_any_case():
    fill("photos", ("red", "green"))
    l = list_csv(table(header="path,label,split", rows=lambda f: f"{f},{f.parent.name},{'TRAIN' if int(f.stem) else 'Val'}"))
    assert l.n_train == 10 and l.files[10:] == ["photos/green/0.png", "photos/red/0.png"]
