"What a report says of its own weakness, and the test pictures that it keeps apart."
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import confusion_matrix

from attnpool.cli import main
from attnpool.data import DataId
from attnpool.data.pictures import find_pictures
from attnpool.models.xresnet import xeca_resnext_tiny
from attnpool.recipe import RECIPES
from attnpool.registry import BadInput
from attnpool.report.collect import collect
from attnpool.maps.page import look, looks_html
from attnpool.report.page import cost_plot, keep_other, learning_curves, write_report
from attnpool.report.stats import format_table, guess_of, near_guessing, on_tests, remarks, summarize
from attnpool.runs.spec import Spec, make_spec
from attnpool.runs.store import Result, load_run
from attnpool.runs.tested import confused_pairs, confusion, find_tests, ask_tests, hardest, picture_file, pictures_root, read_predictions, with_test
from attnpool.runs.train import open_run, run
from attnpool.tasks import count_classes, predictions

COLOURS = dict(blue=(40, 40, 200), red=(200, 40, 40), rust=(190, 70, 40))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def photos(name="photos", **parts):
    "Squares of noisy colours: `photos/val/red/0.png`."
    rng = np.random.default_rng(sum(map(ord, name)))
    for part, n in (parts or dict(train=8, val=4, test=5)).items():
        for colour, rgb in COLOURS.items():
            folder = Path(name, part, colour)
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n): Image.fromarray(np.clip(rng.normal(rgb, 60, (24, 24, 3)), 0, 255).astype("uint8")).save(folder / f"{i}.png")
    return Path(name)


def made(data, head="avg", seed=1, out="runs", **options):
    return run(make_spec(data, head, seed, **dict(epochs=1, size=24, bs=8) | options), out, "cpu")


def start():
    "Weights of a body for a probe, in a file."
    torch.manual_seed(0)
    save_file(xeca_resnext_tiny(10).state_dict(), "body.safetensors")
    return dict(start="body.safetensors", wd=.01)


def result(head="avg", seed=1, accuracy=.9, n=1000, classes=(4, 250, 250), **fields):
    spec = Spec("classify", DataId("digits"), "xeca_resnext_tiny", head, seed, replace(RECIPES["quick"], lr=.01), split=fields.pop("split", "own"))
    r = Result(spec, "complete", dict(accuracy=accuracy), "accuracy", pictures=[1500, n], classes=list(classes) if classes else None)
    return replace(r, **fields)


def seeds(times=3, **fields): return [result(seed=s, **fields) for s in range(times)]


def bench(*words, code=0):
    with pytest.raises(SystemExit) as end: main(["bench", *map(str, words), "--size", "24", "--bs", "8", "--epochs", "1", "--device", "cpu"])
    assert (end.value.code or 0) == code


# Each sentence where it should stand, and nowhere else

def test_nothing_to_warn_of_in_a_sound_comparison():
    assert remarks([*seeds(), *seeds(head="learned")]) == []
    assert remarks(seeds(classes=None)) == []   # of an earlier version


def test_warn_of_guessing_at_the_boundary():
    "Four classes of 25: two standard deviations of chance are 2 * sqrt(.25 * .75 / 100) = .0866."
    def told(accuracy): return remarks(seeds(accuracy=accuracy, n=100, classes=(4, 25, 25)))
    assert not [t for t in told(.337) if "guessing" in t]
    assert told(.33)[0] == ("Near guessing: avg (33.0). Who always says the commonest class has 25.0; a head counts as better above 33.7, "
                            "two standard deviations of chance on 100 validation pictures.")
    table = summarize([*seeds(accuracy=.33, n=100, classes=(4, 25, 25)), *seeds(head="max", accuracy=.5, n=100, classes=(4, 25, 25))])
    heads, bound = near_guessing(table, 100)
    assert list(heads) == ["avg"] and bound == pytest.approx(.25 + 2 * (.25 * .75 / 100)**.5)
    uneven = remarks(seeds(accuracy=.9, n=1000, classes=(2, 90, 910)))   # high, and yet nothing learned
    assert uneven[0].startswith("Near guessing: avg (90.0). Who always says the commonest class has 91.0")
    assert np.isnan(guess_of(seeds(classes=None))) and np.isnan(near_guessing(summarize(seeds(classes=None)), 10)[1])


def test_warn_of_few_pictures_by_hand():
    def told(n, *classes): return "; ".join(remarks(seeds(n=n, classes=classes)))
    assert told(60, 5, 12, 12) == "12 validation pictures of each class: one picture is 8.3 points of that class, and 1.7 points of all 60."
    assert told(60, 5, 10, 20) == "10 validation pictures of the smallest class: one picture is 10 points of that class, and 1.7 points of all 60."
    assert told(200, 4, 20, 80) == told(1000, 2, 500, 500) == ""
    assert "all 199" in told(199, 4, 40, 60) and "19 validation pictures of the smallest class" in told(3000, 4, 19, 2000)
    assert told(100, 1, 100, 100).count("1 point of") == 2
    assert told(300, 4, 0, 200) == "A class has no validation pictures: nothing is known of it."
    assert remarks(seeds(n=12, classes=None)) == ["12 validation pictures: one picture is 8.3 points."]
    drawn = [result(seed=s, n=60, classes=(5, least, 12), split="seed", redrawn=True) for s, least in enumerate((12, 11, 12))]
    assert remarks(drawn)[0].startswith("11 validation pictures of the smallest class")   # of any split
    assert "test pictures of each class" in remarks(seeds(n=60, classes=(5, 12, 12)), "test")[0]


def test_warn_of_intervals_from_few_runs():
    assert remarks(seeds(1)) == ["From one seed there is no interval, so nothing tells a difference from chance: --seeds 1,2,3,4,5."]
    assert remarks(seeds(2)) == ["Intervals from 2 seeds: they are 12.7 standard errors wide to each side, of 5 seeds 2.8. "
                                 "Only a large difference can be told: --seeds 1,2,3,4,5."]
    from scipy import stats
    assert [round(float(stats.t.ppf(.975, n - 1)), 1) for n in (2, 5)] == [12.7, 2.8]
    assert remarks(seeds(2, split="seed"))[0].startswith("Intervals from 2 splits") and "--splits 5" in remarks(seeds(2, split="seed"))[0]
    assert "one seed" in remarks([*seeds(3), result("max")])[0]   # the head with the fewest


def test_warn_of_classes_of_unequal_size():
    def told(balanced): return remarks([replace(r, metrics=dict(accuracy=.9, balanced_accuracy_score=balanced)) for r in seeds()])
    assert told(.851) == [] and told(.84) == ["The classes are unequal in size: for avg accuracy is 90.0, but the mean over the classes, balanced "
                                              "accuracy, 84.0. The large ones are told better."]


def test_warn_of_runs_that_diverged_or_failed_first():
    bad = [replace(result("max", s), status="diverged", metrics={}) for s in (1, 2)]
    failed = [replace(result("gem", s), status="failed", metrics={}, reason="no") for s in (1, 2)]
    told = remarks([*seeds(2, doubles=3, n=60, classes=(5, 12, 12), accuracy=.2), *bad, *failed])
    assert [t.split()[0] for t in told] == ["Heads", "Runs", "In", "Near", "12", "Intervals"]   # the gravest first
    assert told[1] == "Runs that diverged, and are in no mean: 2 of 2 of max. A smaller --lr may help."


def test_warn_in_page_text_and_terminal_of_every_run_that_shares_pictures(capfd):
    data = photos(train=6, val=3)
    shutil.copy(data / "train/red/0.png", data / "val/red/2.png")
    bench(data, "--heads", "avg", "--seeds", "1")
    out = capfd.readouterr().out
    said = "In photos, 1 of 9 validation pictures train as well, as the same picture"
    page, md = (Path("runs", f).read_text() for f in ("report.html", "report.md"))
    for text in out, page, md: assert text.count(said) == 1 and "(guessing)" in text
    assert out.index(said) < out.index("accuracy %") and md.index(said) < md.index("| head |") and page.index(said) < page.index("<th>head")
    r, = collect(["runs"])[0]
    assert (r.doubles, r.classes, r.pictures) == (1, [3, 3, 3], [18, 9])


def test_warn_reads_the_table_that_is_there():
    results = seeds(n=100, classes=(4, 25, 25))
    assert not [t for t in remarks(results) if "guessing" in t]
    assert "Near guessing: avg (20.0)" in remarks(results, table=summarize(results).assign(accuracy=.2))[0]


# The guess in table and plots, and axes that count whole epochs

def test_warn_guess_is_a_row_of_the_table_and_columns_that_nobody_fills_are_not():
    text = format_table(summarize([*seeds(accuracy=.5, n=100, classes=(3, 20, 45)), *seeds(head="max", n=100, classes=(3, 20, 45))]))
    assert text["head"].tolist() == ["avg", "max", "(guessing)"] and text["accuracy %"].tolist()[-1] == "45.0" and set(text["n"]) == {"3", "–"}
    assert "parameters" not in text and "s/epoch" not in text and (text != "–").any().all()
    alone = format_table(summarize(seeds(classes=None)))
    assert list(alone) == ["head", "n", "accuracy %", "lr"]   # no difference, no verdict, no guess


def test_warn_guess_is_drawn_where_it_does_not_squeeze_the_rest():
    epochs = pd.DataFrame(dict(epoch=range(3), accuracy=[.3, .6, .9]))
    def lines(fig): return [l.get_label() for l in fig.axes[0].lines]
    fig = learning_curves([replace(r, epochs=epochs) for r in seeds()])
    assert "(guessing)" in lines(fig) and {*fig.axes[0].get_xticks()} <= {0, 1, 2, 3, 4}
    near, far = (cost_plot(summarize([replace(r, seconds_per_epoch=1.) for r in (*seeds(accuracy=a), *seeds(head="max", accuracy=.9))])) for a in (.5, .89))
    assert "(guessing)" in lines(near) and "(guessing)" not in lines(far) and "(guessing) is at 25, below" in [t.get_text() for t in far.axes[0].texts]


def test_whole_epochs_on_the_axis_of_a_single_one():
    fig = learning_curves([replace(result(), epochs=pd.DataFrame(dict(epoch=[0], accuracy=[.5])))])
    assert all(float(t).is_integer() for t in fig.axes[0].get_xticks())
    assert "o" in [l.get_marker() for l in fig.axes[0].lines]   # a line of one point is none


def test_plots_show_no_share_above_all_and_every_head_by_its_name():
    results = [replace(r, seconds_per_epoch=1.) for i in range(10) for r in seeds(head=f"m:h{i}", accuracy=1.)]   # all at one place
    ax = cost_plot(summarize(results)).axes[0]
    assert ax.get_ylim()[1] == 100 and [t.get_text() for t in ax.get_legend().get_texts()][-10:] == [f"m:h{i}" for i in range(10)]
    looks = {(c[0].get_color(), c[0].get_marker()) for c in ax.containers}
    assert len(looks) == 10


# What was said of each picture

@pytest.mark.parametrize("recipe", ["quick", "probe"])
def test_predictions_are_those_of_the_last_validation(recipe):
    data, drawn = photos(train=8, val=4), recipe == "probe"
    if drawn: shutil.move(data / "train", "own"), shutil.rmtree(data), shutil.move("own", data)
    r = made(data, "learned", recipe=recipe, lr=.01, **(start() | dict(split="seed", seed=3) if drawn else {}))
    table = read_predictions(r)
    assert "predictions.csv" in r.files and (table.label == table.said).mean() == pytest.approx(r.value)
    assert table.loss.mean() == pytest.approx(r.metrics["valid_loss"], rel=1e-4)
    np.testing.assert_allclose(table.loss, -np.log(table.p_label), rtol=2e-3, atol=1e-4)
    assert (table.p >= table.p_label - 1e-6).all() and (table.label == [Path(p).parent.name for p in table.path]).all()
    pictures = pd.read_csv(r.folder / "pictures.csv")
    role = pictures.run if drawn else pictures.split
    assert set(table.path) == set(pictures.path[role == "val"]) and all((pictures_root(r) / p).exists() for p in table.path)


def test_predictions_of_made_pictures_have_no_names_and_old_runs_none(tmp_path):
    r = run(make_spec("digits", "avg", epochs=1, size=20, bs=250), "runs", "cpu")
    table = read_predictions(r)
    assert len(table) == 1000 and set(table.path) == {""} and r.classes == count_classes(table.label, 10) and pictures_root(r) is None
    assert set(hardest([r]).path.str.split().str[0]) == {"picture"}
    (r.folder / "predictions.csv").unlink()
    old = replace(r, files={}, classes=None)
    page = write_report([old], tmp_path / "r.html").read_text()
    assert "taken for what" not in page and "hardest" not in page and "(guessing)" not in page


class Counted(torch.nn.Module):
    "Cross entropy that counts its calls, with or without a loss for each sample."
    def __init__(self, reduction=None):
        super().__init__()
        self.calls, self.weight = 0, torch.tensor([1., 2., 3.])
        if reduction: self.reduction = reduction
    def forward(self, out, y):
        self.calls += 1
        return torch.nn.functional.cross_entropy(out, y, reduction=getattr(self, "reduction", "mean"))


@pytest.mark.parametrize("reduction, calls", [("mean", 3), (None, 14)])
def test_predictions_take_all_losses_in_one_go_where_a_loss_can(reduction, calls):
    r = made(photos(train=8, val=4))
    learn = open_run(r.folder, "cpu", with_data=True)
    learn.loss_func = Counted(reduction)
    table, _ = predictions(learn)
    assert learn.loss_func.calls <= calls and len(table) == 12
    np.testing.assert_allclose(table.loss, -np.log(table.p_label), rtol=1e-4, atol=1e-6)
    if reduction: assert learn.loss_func.reduction == "mean"   # as it was


def fake_predictions(name, rows):
    Path(name).mkdir()
    table = pd.DataFrame(rows, columns=["path", "label", "said", "p", "loss"]).assign(p_label=.1)
    table.to_csv(Path(name, "predictions.csv"), index=False)
    return replace(result(head=name.split("-")[0], seed=int(name[-1])), folder=Path(name))


def test_confusion_is_that_of_scikit_learn_over_all_runs():
    rng, names = np.random.default_rng(0), [str(i) for i in range(12)]
    labels, said = rng.choice(names, (2, 60)), rng.choice(names, (2, 60))
    runs = [fake_predictions(f"avg-{i}", [("", a, b, .5, 1.) for a, b in zip(labels[i], said[i])]) for i in (0, 1)]
    m = confusion(runs)
    assert list(m.index) == names   # numbers in their order
    np.testing.assert_array_equal(m, sum(confusion_matrix(labels[i], said[i], labels=names) for i in (0, 1)))
    pairs = confused_pairs(m, 500)
    assert pairs.pictures.sum() == m.to_numpy().sum() - np.trace(m) and pairs.pictures.is_monotonic_decreasing
    assert pairs.share[0] == pairs.pictures[0] / m.loc[pairs.label[0]].sum()
    assert confusion([result()]) is None and not len(hardest([result()]))


def test_hardest_pictures_by_hand():
    runs = [fake_predictions("avg-1", [("a", "cat", "dog", .9, 3.), ("b", "cat", "cat", .8, .2), ("c", "dog", "cat", .6, 1.)]),
            fake_predictions("max-1", [("a", "cat", "dog", .7, 2.), ("b", "cat", "cat", .8, .3), ("c", "dog", "dog", .9, .1)])]
    table = hardest(runs)
    assert table.path.tolist() == ["a", "c"] and table.said.tolist() == ["dog", "cat"]   # b was never wrong
    assert table.loss.tolist() == [2.5, .55] and table.wrong.tolist() == [2, 1] and table.p.tolist() == pytest.approx([.8, .6])


@pytest.mark.parametrize("n", [2, 20, 21, 100])
def test_page_of_confusions_is_readable_for_any_number_of_classes(n, tmp_path):
    names = [f"class <{i}>" for i in range(n)]
    runs = [fake_predictions(f"{head}-1", [(f"{i}.png", a, names[0], .5, 1.) for i, a in enumerate(names)]) for head in ("avg", "max")]
    page = write_report(runs, tmp_path / "r.html").read_text()
    assert "What is taken for what" in page and "<0>" not in page and "&lt;1&gt;" in page
    assert ("taken for</th>" in page) == (n > 20) and page.count('class="confused"') == (2 if n <= 20 else 0)
    assert len(page) < 100_000


def test_page_shows_the_hardest_pictures_and_stays_small(tmp_path):
    data = photos(train=4, val=4)
    results = [made(data, head) for head in ("avg", "learned")]
    page = write_report(results, tmp_path / "r.html").read_text()
    wrong = hardest(results)
    assert len(wrong) and page.count("data:image/jpeg") >= len(wrong) and Path(wrong.path[0]).name in page
    assert len(page) < 600_000
    shutil.rmtree(data)   # the same without its pictures
    again = write_report(results, tmp_path / "r.html").read_text()
    assert Path(wrong.path[0]).name in again


# Test pictures

def test_warn_of_a_test_folder_that_is_left_alone(capfd):
    data = photos()
    bench(data, "--heads", "avg", "--seeds", "1")
    assert "the pictures of test are left alone; attnpool bench --test tries each run on them once" in capfd.readouterr().out
    assert not [*Path("runs").rglob("test*")] and "Test pictures" not in Path("runs/report.md").read_text()


def test_tests_are_asked_once_and_kept_apart(capfd):
    data = photos()
    bench(data, "--heads", "avg", "--seeds", "1,2")
    before, weights = {f.name for f in Path("runs").iterdir()}, [*Path("runs").rglob("weights.safetensors")]
    stamps = [f.stat().st_mtime_ns for f in weights]
    bench(data, "--heads", "avg", "--seeds", "1,2", "--test")
    assert {f.name for f in Path("runs").iterdir()} == before and [f.stat().st_mtime_ns for f in weights] == stamps   # same ids, not trained again
    said = capfd.readouterr()
    assert re.search(r"test 2/2  avg seed 2: accuracy \d+\.\d% of 15 test pictures", said.out) and "left alone" not in said.err
    results, _ = collect(["runs"])
    for r in results:
        table = read_predictions(r, test=True)
        assert r.test["pictures"] == 15 and r.test["classes"] == [3, 5, 5] and r.test["metrics"]["accuracy"] == pytest.approx((table.label == table.said).mean())
        assert all(p.startswith("test/") for p in table.path) and r.metrics == load_run(r.folder).metrics and r.pictures == [24, 12]
    md = Path("runs/report.md").read_text()
    comparison, tested = md.split("Test pictures: ")
    assert f"{100 * np.mean([r.value for r in results]):.1f}" in comparison
    assert f"{100 * np.mean([r.test['metrics']['accuracy'] for r in results]):.1f} ±" in tested and "test pictures of each class" in tested
    asked = [(r.folder / "test.json").stat().st_mtime_ns for r in results]
    bench(data, "--heads", "avg", "--seeds", "1,2", "--test")
    assert [(r.folder / "test.json").stat().st_mtime_ns for r in results] == asked and "test 1/2" not in capfd.readouterr().out
    again, _ = collect(["runs/report.runs.csv"])   # tables carry it
    assert [r.test for r in again] == [r.test for r in results]
    write_report(again, "again/report.html")
    assert Path("again/report.md").read_text() == md


@pytest.mark.parametrize("recipe", ["quick", "probe"])
def test_tests_see_pictures_as_validation_does(recipe):
    data = photos(train=8, val=4)
    shutil.copytree(data / "val", data / "test")
    r = made(data, "learned", recipe=recipe, lr=.01, **(start() if recipe == "probe" else {}))
    shutil.rmtree(data / "val" / "blue"), shutil.copytree(data / "test" / "blue", data / "val" / "blue")   # training pictures are not read
    tested, = ask_tests([r], find_tests(data), "cpu", say=lambda text: None)
    for name in ("accuracy", "valid_loss", "f1_score"): assert tested.test["metrics"][name] == pytest.approx(r.metrics[name], rel=1e-4)
    one, other = read_predictions(r), read_predictions(tested, test=True)
    np.testing.assert_allclose(one.p_label, other.p_label, rtol=1e-3, atol=1e-5)
    assert on_tests([tested])[0].value == pytest.approx(r.value) and on_tests([r]) == []


def test_tests_in_a_table_of_pictures():
    data = photos()
    files = [f for f in sorted(data.rglob("*.png"))]
    pd.DataFrame(dict(path=files, label=[f.parent.name for f in files], split=[f.parts[1] for f in files])).to_csv("t.csv", index=False)
    by_table, by_folder = find_tests("t.csv"), find_tests(data)
    assert len(by_table.files) - by_table.n_train == 15 == len(by_folder.files) - by_folder.n_train
    assert [Path(f).name for f in by_table.files[by_table.n_train:]] == [Path(f).name for f in by_folder.files[by_folder.n_train:]]
    assert find_pictures("t.csv").files[24:] == [str(f) for f in files if f.parts[1] == "val"]
    r = made("t.csv")
    assert ask_tests([r], by_table, "cpu", say=lambda text: None)[0].test["pictures"] == 15


def test_warn_when_test_pictures_have_changed_since(capsys):
    data = photos()
    results = ask_tests([made(data)], find_tests(data), "cpu")
    said = []
    shutil.copy(data / "test/red/0.png", data / "train/red/double.png")   # a training picture more: other runs, the same test
    assert ask_tests(results, find_tests(data), "cpu", said.append) == results and not said
    (data / "test/red/4.png").unlink()
    changed = ask_tests(results, find_tests(data), "cpu", said.append)
    assert "tested on other pictures before" in said[0] and changed[0].test["pictures"] == 14 and changed[0].test["doubles"] == 1
    assert remarks(on_tests(changed), "test")[0].startswith("In photos, 1 of 14 test pictures train as well")
    page = write_report([results[0], replace(changed[0], spec=replace(changed[0].spec, seed=5))], "r.html")
    assert "The test pictures changed between these runs" in page.with_suffix(".md").read_text()


def test_tests_that_were_killed_are_asked_again_and_nothing_is_trained_again():
    data = photos()
    words = ["bench", str(data), "--heads", "avg", "--seeds", "1,2,3", "--size", "24", "--bs", "8", "--epochs", "1", "--device", "cpu", "--test"]
    with subprocess.Popen([sys.executable, "-W", "ignore", "-m", "attnpool.cli", *words], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        for line in process.stdout:
            if line.startswith("test 1/3"): break
        process.send_signal(signal.SIGKILL)
    runs = [f.parent for f in Path("runs").glob("*/result.json")]
    weights = {f: (f / "weights.safetensors").stat().st_mtime_ns for f in runs}
    first = {f: f.stat().st_mtime_ns for f in Path("runs").glob("*/test.json")}
    assert len(runs) == 3 and 1 <= len(first) < 3 and not Path("runs/report.html").exists()
    torn = next(f for f in runs if not (f / "test.json").exists())
    (torn / "test_predictions.csv").write_text("path,label")   # written, and killed before its figures
    bench(data, "--heads", "avg", "--seeds", "1,2,3", "--test")
    assert {f: (f / "weights.safetensors").stat().st_mtime_ns for f in runs} == weights and all(with_test(load_run(f)).test for f in runs)
    assert {f: f.stat().st_mtime_ns for f in first} == first and len(read_predictions(load_run(torn), test=True)) == 15


def test_a_damaged_test_file_leaves_the_run_whole():
    data = photos()
    r, = ask_tests([made(data)], find_tests(data), "cpu", say=lambda text: None)
    for text in ("{", "[]", "3", '{"metrics": 1}'):
        (r.folder / "test.json").write_text(text)
        assert with_test(load_run(r.folder)) == r and with_test(load_run(r.folder)).test == {}
    assert ask_tests([r], find_tests(data), "cpu", say=lambda text: None)[0].test == r.test


def spoil_flat(data):
    for f in (data / "test").rglob("*.png"): shutil.move(f, data / "test" / f"{f.parent.name}{f.name}")
    for d in COLOURS: (data / "test" / d).rmdir()


@pytest.mark.parametrize("spoil, words", [
    (lambda d: shutil.rmtree(d / "test"), "has no test pictures. Add test/CLASS"),
    (spoil_flat, "have no labels, so nothing can be counted. Put them into test/CLASS"),
    (lambda d: (d / "test/red").rename(d / "test/green"), "has classes with test but no training pictures: green"),
    (lambda d: shutil.rmtree(d / "val"), "validate already, as there are no others. Move a part of train to val"),
    (lambda d: (d / "test/red/0.png").write_text("no picture"), "are broken: test/red/0.png"),
])
def test_tests_that_cannot_be_asked_are_told_before_the_training(spoil, words, capfd):
    data = photos()
    spoil(data)
    bench(data, "--heads", "avg", "--seeds", "1", "--test", code=2)
    assert words in capfd.readouterr().err and not [*Path(".").rglob("spec.json")]


def test_tests_of_made_pictures_are_told_to_be_none(capfd):
    bench("digits", "--heads", "avg", "--test", code=2)
    assert "test: digits are made, none of them for a test. Leave --test out." in capfd.readouterr().err


def test_a_class_without_test_pictures_is_told():
    data = photos()
    shutil.rmtree(data / "test/rust")
    r, = ask_tests([made(data)], find_tests(data), "cpu", say=lambda text: None)
    assert r.test["classes"] == [3, 0, 5] and "A class has no test pictures: nothing is known of it." in remarks(on_tests([r]), "test")


def test_diverged_and_failed_runs_are_not_asked():
    data = photos()
    bad = [replace(result(), status=status) for status in ("diverged", "failed")]
    assert ask_tests(bad, find_tests(data), "cpu") == bad


# Reports of different data

def test_warn_before_a_report_of_other_data_is_lost(capfd):
    a, b = photos("a", train=4, val=2), photos("b", train=4, val=2)
    bench(a, "--heads", "avg", "--seeds", "1")
    first = Path("runs/report.html").read_text()
    bench(b, "--heads", "avg", "--seeds", "1")
    assert "is kept as runs/report-a.html" in capfd.readouterr().out and Path("runs/report-a.html").read_text() == first
    assert ">b<" in Path("runs/report.html").read_text() and {f.name for f in Path("runs").glob("report*")} == {
        f"report{which}{end}" for which in ("", "-a") for end in (".html", ".csv", ".md", ".runs.csv")}
    bench(b, "--heads", "avg", "--seeds", "1")   # the same again: in its place
    assert "is kept" not in capfd.readouterr().out and not Path("runs/report-b.html").exists()
    (b / "train/red/3.png").unlink()   # the same folder, with other pictures
    mark = pd.read_csv("runs/report.runs.csv", dtype=str)["data.fingerprint"][0]
    bench(b, "--heads", "avg", "--seeds", "1")
    assert Path(f"runs/report-b-{mark[:4]}.html").exists()


def test_a_report_that_covers_the_other_takes_its_place(tmp_path):
    one, other = result(), replace(result(), spec=replace(result().spec, data=DataId("x/y")))
    page = write_report([one], tmp_path / "r.html")
    assert keep_other(page, [one, other]) is None
    write_report([one, other], page)
    assert keep_other(page, [one]).name == "r-x_y.html" and not page.exists() and (tmp_path / "r-x_y.runs.csv").exists()
    assert keep_other(page, [one]) is None   # nothing lies there
    page.write_text(""), page.with_suffix(".runs.csv").write_text("spec.data\ndigits\n")   # of an earlier version
    assert keep_other(page, [one]) is None


def test_a_report_of_other_data_is_kept_beside_what_has_its_name(tmp_path):
    one, other = result(), replace(result(), spec=replace(result().spec, data=DataId("b")))
    page, mine = write_report([one], tmp_path / "r.html"), tmp_path / "r-digits.html"
    mine.write_text("of my own")
    assert keep_other(page, [other]).name == "r-digits-2.html" and mine.read_text() == "of my own"
    assert {f.name for f in tmp_path.iterdir()} == {mine.name, *(f"r-digits-2{end}" for end in (".html", ".csv", ".md", ".runs.csv"))}
    for _ in range(2):   # the same report again takes the same place, another one a new one
        write_report([one], page)
        assert keep_other(page, [other]).name == "r-digits-2.html"
    write_report([one, result(seed=2)], page)
    assert keep_other(page, [other]).name == "r-digits-3.html"


@pytest.mark.parametrize("moved", [1, 2, 3])
def test_a_report_that_was_half_kept_when_killed_is_kept_whole(moved, tmp_path):
    one, other = result(), replace(result(), spec=replace(result().spec, data=DataId("b")))
    page = write_report([one], tmp_path / "r.html")
    files = {f"r-digits{f.name[1:]}": f.read_bytes() for f in tmp_path.iterdir()}
    for end in (".csv", ".md", ".html")[:moved]: page.with_suffix(end).rename(tmp_path / f"r-digits{end}")
    assert keep_other(page, [other]).name == "r-digits.html"
    write_report([other], page)
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())


# Where they look

def keep_in(r, **arrays):
    "The maps of a run with further arrays, as a run of today keeps them."
    file = r.folder / "maps.npz"
    with np.load(file) as f: old = {k: f[k] for k in f.files}
    np.savez_compressed(file, **old | arrays)


def test_page_lays_maps_over_the_original_photos_with_label_and_prediction(tmp_path):
    data = photos(train=4, val=3)
    for f in data.rglob("*.png"): Image.open(f).resize((900, 600), Image.Resampling.NEAREST).save(f)   # larger than shown
    results = [made(data, head) for head in ("avg", "learned")]
    for r in results:
        table = read_predictions(r)
        some = np.linspace(0, len(table) - 1, 8).round().astype(int)
        p = np.full((8, 3), .1, "float32")
        p[range(8), [sorted(COLOURS).index(said) for said in table.said[some]]] = .8
        keep_in(r, files=table.path[some].to_numpy(str), crops=np.tile(np.float32([150, 0, 750, 600]), (8, 1)), p=p,
                unit=np.array("logit" if r.spec.head == "avg" else "uniform"))
    page = write_report(results, tmp_path / "r.html").read_text()
    looks = page[page.index('<section class="looks"'):page.index("</section>")]
    table = read_predictions(results[0])
    assert looks.count("<article") == 8 and table.path[0] in looks and 'width="640" height="427"' in looks
    crops = json.loads(re.search(r'<script type="application/json">(.*?)</script>', looks, re.S)[1])["runs"][0]["crops"][0]
    assert crops == pytest.approx([1 / 6, 0, 5 / 6, 1], abs=2e-3)   # the middle square
    said = re.findall(r'class="said (\w+)"', looks)
    tables = [read_predictions(r).iloc[np.linspace(0, 8, 8).round().astype(int)] for r in results]
    assert said.count("right") == sum((t.label == t.said).sum() for t in tables) and len(said) == 16
    shutil.rmtree(data)
    again = write_report(results, tmp_path / "r.html").read_text()   # as the network saw them
    assert 'width="24" height="24"' in again


@pytest.mark.parametrize("drawn", [False, True])
def test_page_shows_no_picture_that_the_network_never_saw(drawn, tmp_path):
    data = photos(train=8, val=3)
    for f in data.rglob("*.png"): Image.open(f).resize((90, 60), Image.Resampling.NEAREST).save(f)
    if drawn: shutil.move(data / "train", "own"), shutil.rmtree(data), shutil.move("own", data)
    r = made(data, **dict(split="seed", seed=3, epochs=2) if drawn else {})
    def shown(): return re.findall(r'width="(\d+)" height="(\d+)"', write_report([r], tmp_path / "r.html").read_text())
    with np.load(r.folder / "maps.npz") as f: first, second, *others = map(str, f["files"])
    assert shown() == [("90", "60")] * (2 + len(others))
    Image.new("RGB", (90, 60)).save(data / first)   # another one, as large
    (data / second).unlink()
    assert shown() == [("24", "24")] * 2 + [("90", "60")] * len(others)
    assert picture_file(r, first) is None and picture_file(r, "") is None and picture_file(r, "../x.png") is None
    wrong = hardest([r], 100).path
    page = write_report([r], tmp_path / "r.html").read_text()
    there = [p for p in wrong[:8] if p not in (first, second)]
    assert page.count("data:image/jpeg") == len(there)


def test_pictures_of_a_table_are_found_by_their_whole_paths(tmp_path):
    data = photos(train=4, val=2)
    files = sorted(data.resolve().rglob("*.png"))
    pd.DataFrame(dict(path=files, label=[f.parent.name for f in files], split=[f.parts[-3] for f in files])).to_csv("t.csv", index=False)
    r = made("t.csv")
    table = read_predictions(r)
    with np.load(r.folder / "maps.npz") as f: names = [*map(str, f["files"]), *table.path]
    assert all(picture_file(r, name).resolve() in files for name in names)
    shutil.copy(table.path[0], table.path[1])   # a known picture in the place of another
    assert picture_file(r, table.path[1]) is None and picture_file(r, table.path[0]).exists()


def test_page_asks_no_data_set_for_its_pictures(tmp_path):
    data = photos(train=4, val=2)
    subprocess.run(["tar", "cf", "photos.tar", "photos"], check=True)
    shutil.rmtree(data)
    r = made("photos.tar")
    root = pictures_root(r)
    assert picture_file(r, read_predictions(r).path[0]) and root.parent.name.startswith("photos-")
    shutil.rmtree(root.parent)   # where it was unpacked
    write_report([r], tmp_path / "r.html")
    assert not root.exists() and pictures_root(r) is None


def test_page_has_the_same_maps_of_a_head_with_a_query_for_each_class_as_its_network(tmp_path):
    r = made(photos(train=4, val=3), "classquery", epochs=2)
    def drawn(page): return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])["runs"][0]
    ours, its = drawn(write_report([r], tmp_path / "r.html").read_text()), drawn(looks_html([look(open_run(r.folder, "cpu"))]))
    assert ours["parts"] == its["parts"] and ours["parts"][0]["n"] == 3
    for a, b in zip(ours["levels"], its["levels"]):
        a, b = (np.frombuffer(base64.b64decode(v), np.int8).astype(int) for v in (a, b))
        assert abs(a - b).max() <= 2 and len(a)
