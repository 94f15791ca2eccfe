"The second comparison: its runs as they are published, and what its page computes of them."
import gzip
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from attnpool.cli import main
from attnpool.report.collect import collect
from attnpool.runs.tested import read_predictions

ROOT = Path(__file__).parent.parent
DATA = ROOT / "docs/results/verdict2"


def module(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    it = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(it)
    return it


@pytest.fixture(scope="module")
def compare(): return module("compare", DATA / "compare.py")


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    "Two parts of a set, two heads, real runs of seconds, gathered twice."
    out, rng = tmp_path_factory.mktemp("verdict"), np.random.default_rng(0)
    pictures = [(i % 2, rng.integers(0, 156, (20, 20, 3)) + 40 * (i % 2)) for i in range(40)]
    for part in (1, 2):
        for i, (label, x) in enumerate(pictures):
            if i < 24 and i // 2 % 2 != part % 2: continue   # of the other part
            folder = out / f"few-{part:02}" / ("train" if i < 24 else "val") / "ab"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.astype(np.uint8)).save(folder / f"{i:03}.png")
    for part in (1, 2):
        with pytest.raises(SystemExit) as e:
            main(["bench", str(out / f"few-{part:02}"), "--heads", "avg,avgstart", "--seeds", str(part), "--epochs", "1", "--size", "20", "--bs", "4", "--jobs", "1",
                  "--out", str(out / "runs")])
        assert e.value.code == 0
    here = out / "published"
    here.mkdir()
    (here / "gather.py").write_text((DATA / "gather.py").read_text())
    seen = []
    for _ in range(2):
        done = subprocess.run([sys.executable, str(here / "gather.py"), "probes", str(out / "runs")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        seen.append([f.read_bytes() for f in (here / "probes.runs.csv", here / "pictures/probes.csv.gz")])
    assert seen[0] == seen[1]
    return out


def test_parts_are_seeds_of_one_set(gathered):
    results, _ = collect([gathered / "published/probes.runs.csv"])
    assert {r.spec.data.name for r in results} == {"few"} and sorted((r.spec.head, r.spec.seed) for r in results) == [(h, s) for h in ("avg", "avgstart") for s in (1, 2)]
    there, _ = collect([gathered / "runs"])
    assert sorted(r.value for r in results) == sorted(r.value for r in there)


def test_answers_are_those_of_the_runs(gathered):
    compare = module("compare_few", DATA / "compare.py")
    compare.HERE = gathered / "published"
    runs, _ = collect([gathered / "runs"])
    for r in runs:
        table = read_predictions(r)
        table = table.assign(name=table.path.map(lambda p: "/".join(Path(p).parts[-2:]))).sort_values("name")
        its = compare.answers("probes")["few", r.spec.head][r.spec.seed]
        assert list(its) == [int(a == b) for a, b in zip(table.label, table.said)] and its.mean() == pytest.approx(r.value)
    text = gzip.decompress((gathered / "published/pictures/probes.csv.gz").read_bytes()).decode()
    assert len(text.splitlines()) == 5
    a, b = (np.array([compare.answers("probes")["few", h][s] for s in (1, 2)], float) for h in ("avgstart", "avg"))
    assert compare.with_pictures("probes", "avgstart", "avg", "few").mean == pytest.approx((a - b).mean())


def test_other_test_pictures_are_refused(gathered):
    broken = gathered / "broken"
    for folder in (gathered / "runs").glob("few-*-avg-*"):
        to = broken / folder.name
        to.mkdir(parents=True)
        for f in folder.iterdir(): (to / f.name).write_bytes(f.read_bytes())
    file = sorted(broken.glob("*/predictions.csv"))[0]
    text = file.read_text().replace(".png", ".bmp")
    file.write_text(text)
    done = subprocess.run([sys.executable, str(gathered / "published/gather.py"), "screen", str(broken)], capture_output=True, text=True)
    assert done.returncode == 1 and "not the validation pictures of the runs before it" in done.stderr


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory):
    "Two classes, 50 training and two test pictures each, no two alike."
    root, rng = tmp_path_factory.mktemp("cifar") / "few", np.random.default_rng(0)
    for which, n in (("train", 50), ("val", 2)):
        for kind in "ab":
            (folder := root / which / kind).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i:02}.png")
    return root


def made(name, source, out):
    done = subprocess.run([sys.executable, str(DATA / "sets.py"), name, str(source), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*.png"))}


def test_parts_share_their_test_pictures_alone(few_pictures, tmp_path):
    files = made("cifar10", few_pictures, tmp_path / "a")
    assert files == made("cifar10", few_pictures, tmp_path / "b")
    of = lambda start: {v for k, v in files.items() if k.startswith(start)}
    parts = [of(f"cifar10-{i:02}/train") for i in range(1, 11)]
    assert [len(p) for p in parts] == [10] * 10 and len(set.union(*parts)) == 100
    tests = of("cifar10-01/val")
    assert len(tests) == 4 and all(of(f"cifar10-{i:02}/val") == tests for i in range(1, 11))
    train, val = of("cifar10-03-inner/train"), of("cifar10-03-inner/val")
    assert train | val == parts[2] and not train & val and len(val) == 2
    assert sorted(k.split("/")[2] for k in files if k.startswith("cifar10-03-inner/val")) == ["a", "b"]


def test_clutter_holds_its_picture_and_no_test_picture_else(few_pictures, tmp_path):
    "Where the picture lies no tile is left; elsewhere there are tiles of training pictures."
    files = made("clutter", few_pictures, tmp_path)
    assert files and all(f.startswith("clutter-") for f in files)
    tests = {(f.parent.name, f.stem): np.asarray(Image.open(f)) for f in (few_pictures / "val").rglob("*.png")}
    train = [np.asarray(Image.open(f)) for f in (few_pictures / "train").rglob("*.png")]
    def at(small, big): return np.argwhere((np.lib.stride_tricks.sliding_window_view(big, small.shape) == small).all((3, 4, 5)))
    for (kind, name), picture in tests.items():
        canvas = np.asarray(Image.open(tmp_path / "clutter-01/val" / kind / f"{name}.png"))
        assert canvas.shape == (96, 96, 3)
        [(top, left, _)] = at(picture, canvas)
        corner = canvas[:8, :8] if top >= 8 or left >= 8 else canvas[-8:, -8:]
        assert sum(len(at(corner, t)) for t in train) == 1
        assert not any(len(at(corner, t)) for t in tests.values())


def test_differences_are_those_of_scipy(compare):
    "From the published table itself, read with pandas."
    table = pd.read_csv(DATA / "scratch.runs.csv", keep_default_na=False)
    last = table.groupby(["spec.head", "spec.seed"]).tail(1)
    wide = last.pivot(index="spec.seed", columns="spec.head", values="accuracy").astype(float)
    d, test = compare.against("scratch", "avgstart", "avg"), stats.ttest_rel(wide.avgstart, wide.avg)
    low, high = test.confidence_interval(.95)
    assert len(wide) == 10 and d.n == 10 and d.mean == pytest.approx((wide.avgstart - wide.avg).mean()) and d.p == pytest.approx(test.pvalue)
    assert d.interval() == pytest.approx((low, high))
    sizes = compare.against("scratch", "avgstart", "avg", size=128)
    assert sizes.mean != d.mean and compare.against("scratch", "avgstart", "avg", size=64).mean == pytest.approx(d.mean)


def test_a_table_of_verdicts(compare):
    rows = {"a": compare.Difference(.02, .005, 9, 10), "b": compare.Difference(0., .001, 9, 10), "c": compare.Difference(.01, .02, 3, 4)}
    table = compare.verdicts(rows)
    assert list(table.verdict) == ["better", "as good as", "cannot tell with 4"] and list(table.points) == ["+2.00", "+0.00", "+1.00"]
    p = [2 * stats.t.sf(4, 9), 1., 2 * stats.t.sf(.5, 3)]
    assert table["Holm's p"].astype(float).tolist() == pytest.approx([3 * p[0], 1, 1], rel=.05)
    assert "Holm's p" not in compare.verdicts(rows, correct=False)


@pytest.mark.parametrize("name, sets, trials", [
    ("scratch", ["imagenette-2500-inner"], "rates"), ("sizes", ["imagenette-2500-inner"], "rates"), ("small", ["digits-4"], "rates"),
    ("finetune", ["cifar10-03-inner", "cells-03-inner"], "rates"), ("finetune-long", ["cifar10-03-inner", "cells-03-inner"], "rates-long")])
def test_heads_ran_at_the_rates_that_had_the_lowest_loss(compare, name, sets, trials):
    table = pd.read_csv(DATA / f"{trials}.runs.csv", keep_default_na=False)
    last = table[table["data.name"].isin(sets)].groupby(["data.name", "spec.head", "recipe.lr", "recipe.wd"]).tail(1)
    loss = last.groupby(["spec.head", "recipe.lr", "recipe.wd"]).valid_loss.agg(["mean", "count"])
    loss = loss[loss["count"] == len(sets)]["mean"]
    best = {head: loss[head].idxmin() for head in loss.index.get_level_values(0).unique()}
    assert {h: (lr, float(wd or 0)) for h, (lr, wd) in best.items()} == compare.chosen(*sets, name=trials)
    ran = {(r.spec.head, r.spec.recipe.lr, r.spec.recipe.wd or 0.) for r in compare.runs(name)}
    assert ran and ran <= {(h, *rate) for h, rate in compare.chosen(*sets, name=trials).items()}


def test_the_protocol_is_older_than_its_results():
    def when(*files):
        log = subprocess.run(["git", "log", "--format=%ct", "--reverse", "--", *files], cwd=ROOT, capture_output=True, text=True)
        return [int(t) for t in log.stdout.split()]
    protocol, results = when("docs/results/verdict2/protocol.md"), when(*[str(f.relative_to(ROOT)) for f in DATA.glob("*.runs.csv")])
    if not protocol: pytest.skip("not a clone with its history")
    assert protocol[0] < min(results)


def test_all_published_runs_make_one_report(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(["report", *map(str, sorted(DATA.glob("*.csv"))), "--out", str(tmp_path / "report.html")])
    said = capsys.readouterr().out
    assert e.value.code == 0 and (tmp_path / "report.html").is_file()
    assert {"imagenette-2500", "digits-8", "clutter", "clutter-imagenette", "roads"} <= {line.split(",")[0] for line in said.splitlines()}
    row, = [line.split() for line in said.splitlines() if "avgstart" in line and "as good as" in line and "70.6" in line]
    assert row[:4] == ["avgstart", "10", "70.6", "±"]   # paired with avg, though each has its own decay


def test_two_maps_side_by_side(monkeypatch):
    "The last map and the one before, averaged to its sides, each normed over its channels."
    monkeypatch.syspath_prepend(str(DATA))
    body = module("two_maps", DATA / "two_maps.py").net().eval()
    x = torch.randn(2, 3, 64, 64)
    out = body(x)
    assert out.shape == (2, 384, 8, 8)
    wide, last = body.maps(x)
    assert wide.shape == (2, 128, 16, 16) and last.shape == (2, 256, 8, 8)
    for ours, plain in ((out[:, :128], wide.unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))), (out[:, 128:], last)):
        expected = (plain - plain.mean(1, keepdim=True)) / (plain.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_digits_at_other_sizes_are_those_of_the_run(tmp_path):
    "At the size of its training a network answers as often as its run says."
    with pytest.raises(SystemExit) as e:
        main(["bench", "digits-3", "--heads", "avg", "--seeds", "1", "--steps", "20", "--epochs", "1", "--size", "64", "--jobs", "1", "--device", "cpu", "--out", str(tmp_path / "runs")])
    assert e.value.code == 0
    (tmp_path / "digit_sizes.py").write_text((DATA / "digit_sizes.py").read_text())
    done = subprocess.run([sys.executable, str(tmp_path / "digit_sizes.py"), str(tmp_path / "runs"), "--sizes", "64"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(tmp_path / "digit_sizes/small.csv")
    [run], _ = collect([tmp_path / "runs"])
    assert table[["data", "head", "seed", "size"]].values.tolist() == [["digits-3", "avg", 1, 64]] and table.accuracy[0] == pytest.approx(run.value)
