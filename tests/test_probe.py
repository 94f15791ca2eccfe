"Probes: maps of a body that stands still, splits drawn by number, rates found inside the training part; real runs of tiny networks."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import CrossEntropyLossFlat, load_learner, set_seed
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from torch import nn

from attnpool.cli import main
from attnpool.data import get_dls
from attnpool.data.listing import list_folder
from attnpool.data.splits import numbered_split, share_of_each
from attnpool.frozen import frozen_dls, head_learner, kept_maps, map_loaders, MapSet
from attnpool.heads import get_head, HEADS
from attnpool.layers import evaluating
from attnpool.models.surgery import body_of
from attnpool.recipe import get_recipe
from attnpool.registry import BadInput
from attnpool.report.page import write_report
from attnpool.report.stats import format_table, paired_difference, summarize
from attnpool.runs.probe import find_rates, forget_shared, inner_split, shared_by
from attnpool.runs.spec import make_spec
from attnpool.runs.store import load_run, read_run_weights
from attnpool.runs.sweep import sweep
from attnpool.runs.train import open_run, run
from attnpool.weights import weights_hash

ARCH, SIZE = "xeca_resnext_tiny", 32
COLOURS = dict(red=(200, 60, 60), green=(60, 200, 60), blue=(60, 60, 200))


def paint(folder, n, seed):
    "Noisy pictures in a colour for each class, not all in the right one."
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            true = colour if rng.random() < .8 else list(COLOURS.values())[rng.integers(3)]
            pixels = (np.array(true) + rng.normal(0, 60, (40, 40, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A cache of its own, sixty pictures without a split, others with one, and a file of weights."
    folder = tmp_path_factory.mktemp("probe")
    old = os.environ.get("FASTAI_HOME")
    os.environ["FASTAI_HOME"] = str(folder / "home")
    fastai_cfg.cache_clear()   # as other files may have left it
    paint(folder / "photos", 20, 0)
    paint(folder / "official/train", 10, 1)
    paint(folder / "official/val", 4, 2)
    torch.manual_seed(0)
    torch.save(body_of(ARCH).model.state_dict(), folder / "body.pth")
    yield folder
    if old is None: del os.environ["FASTAI_HOME"]
    else: os.environ["FASTAI_HOME"] = old
    fastai_cfg.cache_clear()


def spec_of(home, head="avg", seed=1, data="photos", recipe="probe", **more):
    values = dict(size=SIZE, bs=16, epochs=4, split="seed", start=str(home / "body.pth")) | more
    return make_spec(str(home / data), head, seed, ARCH, recipe, **values)


@pytest.fixture(scope="module")
def finished(home):
    specs = [spec_of(home, head, seed) for seed in (1, 2, 3) for head in ("avg", "concat")]
    return sweep(specs, home / "runs", "cpu")


def call(*words):
    "The status of a command."
    with pytest.raises(SystemExit) as end: main([*map(str, words)])
    return end.value.code or 0


# Kept maps

class Counted(nn.Module):
    "A body that counts its pictures."
    def __init__(self, factor=1.):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.factor, self.seen = body_of(ARCH).model, factor, 0

    def forward(self, x):
        self.seen += len(x)
        return self.body(x) * self.factor


def test_maps_are_computed_once_for_all_splits_and_are_the_bodys(home):
    body, dls = Counted(), [get_dls(home / "photos", SIZE, 16, "cpu", "none", split=split) for split in (1, 2, None)]
    made = [frozen_dls(d, body) for d in dls]
    assert body.seen == 60 and all(m.train_ds.views[0].flags.writeable for m in made)   # of others, torch warns
    for d, maps in zip(dls, made):
        for dl, kept in ((d.valid, maps.valid), (d.train.new(shuffle=False, drop_last=False), maps.train.new(shuffle=False, drop_last=False))):
            for (x, y), (m, label) in zip(dl, kept, strict=True):
                with evaluating(body): true = body(x.as_subclass(torch.Tensor))
                assert m.is_contiguous(memory_format=torch.channels_last) and torch.equal(y.as_subclass(torch.Tensor), label)
                torch.testing.assert_close(m, true, rtol=1e-3, atol=1e-3)
    assert set(made[0].train_ds.rows.tolist()) != set(made[1].train_ds.rows.tolist())
    assert [next(p.parameters()).is_contiguous() for p in (body,)] == [True]


def test_other_weights_sizes_and_pictures_have_maps_of_their_own_and_torn_ones_are_made_again(home, tmp_path):
    shutil.copytree(home / "photos", tmp_path / "photos")
    dls, body, cache = get_dls(tmp_path / "photos", SIZE, 16, "cpu", "none"), Counted(), tmp_path / "cache"
    first = np.array(kept_maps(dls, body, cache=cache))
    file, = cache.rglob("maps.npy")
    file.write_bytes(file.read_bytes()[:-1000])
    assert np.array_equal(kept_maps(dls, body, cache=cache), first) and body.seen == 120
    kept_maps(get_dls(tmp_path / "photos", 40, 16, "cpu", "none"), body, cache=cache)
    assert body.seen == 180
    shutil.move(tmp_path / "photos", tmp_path / "moved")   # the same bytes elsewhere
    kept_maps(get_dls(tmp_path / "moved", SIZE, 16, "cpu", "none", cache=tmp_path), body, cache=cache)
    assert body.seen == 180
    paint(tmp_path / "new", 20, 9)
    (tmp_path / "new/red/00.png").rename(tmp_path / "moved/red/00.png")
    kept_maps(get_dls(tmp_path / "moved", SIZE, 16, "cpu", "none"), body, cache=cache)
    assert body.seen == 240
    with torch.no_grad(): next(body.parameters()).mul_(1.01)
    kept_maps(get_dls(tmp_path / "moved", SIZE, 16, "cpu", "none"), body, cache=cache)
    assert body.seen == 300 and len({weights_hash(b) for b in (body, Counted())}) == 2


def test_what_float16_cannot_hold_is_kept_as_float32_and_what_is_not_finite_is_refused(home, tmp_path, capfd):
    dls = get_dls(home / "photos", SIZE, 16, "cpu", "none")
    small, large = (kept_maps(dls, Counted(f), cache=tmp_path / str(f)) for f in (1., 1e6))
    assert (small.dtype, large.dtype) == (np.float16, np.float32) and "kept as float32" in capfd.readouterr().err
    np.testing.assert_allclose(large / 1e6, small, rtol=2e-3, atol=1e-3)
    with pytest.raises(BadInput, match="^start: the body gives values that are not finite"): kept_maps(dls, Counted(np.nan), cache=tmp_path)
    assert not any(tmp_path.glob("maps-*/maps.npy"))


def test_views_are_augmented_reproducible_and_taken_in_turn(home, tmp_path):
    dls = get_dls(home / "photos", SIZE, 16, "cpu", "light", split=1)
    once, again = (frozen_dls(dls, Counted(), 3, cache=tmp_path / name) for name in "ab")
    views = once.train_ds.views
    assert len(views) == 3 and all(np.array_equal(a, b) for a, b in zip(views, again.train_ds.views))
    assert all((np.abs(a.astype(float) - b).max() > .1) for a, b in ((views[0], views[1]), (views[1], views[2]), (views[0], once.valid_ds.views[0])))
    part, held = inner_split(once.train_ds, 10**6, 1)
    assert part.views is views and len(held.views) == 1 and np.array_equal(held.views[0], once.valid_ds.views[0])
    seen = []
    class Watch(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Linear(256, 3)
        def forward(self, x):
            if self.training: seen.append(x.sum().item())
            return self.out(x.mean((2, 3)))
    learn = head_learner(once, Watch(), get_recipe("probe", lr=0. + 1e-3, epochs=4, bs=16, views=3), CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    sums = [views[v][once.train_ds.rows].astype(np.float64).sum() for v in (0, 1, 2, 0)]
    assert learn.dls.train_ds.view == 0 and len(seen) == 4 * 3   # 48 pictures in batches of 16: all of them in each epoch
    np.testing.assert_allclose(np.array(seen).reshape(4, 3).sum(1), sums, rtol=1e-4)


@pytest.mark.parametrize("scale", [1., 3e6])
@pytest.mark.parametrize("head", ["avg", "concat"])
def test_a_probed_head_has_the_weights_of_one_trained_with_the_body_in_it(home, tmp_path, head, scale):
    "To float16's rounding; with maps so large that they are kept as float32, to that of float32."
    state = torch.load(home / "body.pth")
    if scale > 1:   # the last norm before the map of each branch of the last block
        last = [k for k in state if k.endswith("weight") and state[k].ndim == 1][-2:]
        for k in last: state[k] *= scale
    torch.save(state, tmp_path / "body.pth")
    fixed = dict(start=str(tmp_path / "body.pth"), lr=1e-3, wd=.01, bs=4)   # an eighth of the pictures at most
    probed, whole = (run(spec_of(home, head, 5, **fixed, **more), tmp_path, "cpu") for more in ({}, dict(train="head")))
    assert not probed.found.get("trials")
    a, b = read_run_weights(probed.folder), read_run_weights(whole.folder)
    assert a.keys() == b.keys()
    moved = 0
    for name in load_file(probed.folder / "weights.safetensors"):
        torch.testing.assert_close(a[name], b[name], rtol=2e-3 if scale == 1 else 1e-4, atol=1e-4 if scale == 1 else 1e-5)
        moved += 1
    assert moved and probed.value == pytest.approx(whole.value, abs=1e-6)


# Splits

def test_a_number_draws_the_same_share_of_each_class(home):
    listing = list_folder(home / "photos")
    drawn = [listing.split(n)[0] for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and listing.drawn
    for one in drawn:
        assert sorted(one.files) == sorted(listing.files) and one.n_train == 48
        assert Counter(one.labels[48:]) == dict.fromkeys(COLOURS, 4)
        assert all(f.split("/")[0] == label for f, label in zip(one.files, one.labels))
    assert list_folder(home / "photos", split_seed=7).split(1)[0] == drawn[0]   # whatever the first random split was


def test_official_validation_pictures_stay(home):
    listing = list_folder(home / "official")
    one, two = (listing.split(n)[0] for n in (1, 2))
    assert not listing.drawn and one.files[one.n_train:] == two.files[two.n_train:] == listing.files[listing.n_train:]
    assert set(one.files[:one.n_train]) != set(two.files[:two.n_train]) and one.n_train == 24
    assert Counter(one.labels[:one.n_train]) == dict.fromkeys(COLOURS, 8)


def test_small_classes_are_on_both_sides_or_named():
    labels = ["a"] * 2 + ["b"] * 3 + ["c"] * 10
    files = [f"{i:02}" for i in range(15)]
    for number in range(20):
        numbers, n = numbered_split(files, labels, 12, True, number)
        assert {labels[i] for i in numbers[:n]} == {labels[i] for i in numbers[n:]} == {"a", "b", "c"} and sorted(numbers) == list(range(15))
    with pytest.raises(BadInput, match="^splits: to train and to validate, a class needs two pictures or more. Only one have: d"):
        numbered_split(files + ["15"], labels + ["d"], 12, True, 1)
    assert share_of_each(["x"], .2, 0, least=1).tolist() == [False]


def test_a_drawn_split_is_for_any_recipe_and_is_told_in_the_run(home):
    quick = dict(recipe="quick", start="", epochs=1)
    results = [run(spec_of(home, "avg", seed, **quick), home / "quick", "cpu") for seed in (1, 2)]
    assert all(r.redrawn and r.pictures == [48, 12] for r in results) and "-".join(results[0].spec.name.split("-")[:-1]) == "photos-avg-1"
    assert spec_of(home, "avg", 1, **quick, split="own").id != results[0].spec.id
    for r in results:
        table = pd.read_csv(r.folder / "pictures.csv")
        valid = table[table.run == "val"].path.tolist()
        learn = open_run(r.folder, "cpu")
        assert sorted(valid) == sorted(learn.dls.listing.files[48:]) and (table.run == "train").sum() == 48
    official = run(spec_of(home, "avg", 1, "official", **quick), home / "quick", "cpu")
    table = pd.read_csv(official.folder / "pictures.csv", keep_default_na=False)
    assert Counter(table.run) == {"train": 24, "val": 12, "": 6} and not official.redrawn and official.pictures == [24, 12]


def test_files_are_looked_at_once_for_all_heads_of_a_split(home, tmp_path):
    "By the pictures that a process opens: after the first run, the eight to look at alone."
    shutil.copytree(home / "photos", tmp_path / "photos")
    specs = [spec_of(home, head, data=str(tmp_path / "photos"), lr=1e-3, wd=0., epochs=1) for head in ("avg", "gem", "max")]
    opened, hear = [], [True]
    sys.addaudithook(lambda event, args: opened.append(args[0]) if hear[0] and event == "open" and str(args[0]).startswith(str(tmp_path / "photos")) else None)
    try:
        first = run(specs[0], tmp_path / "runs", "cpu")
        assert opened
        opened.clear()
        others = [run(spec, tmp_path / "runs", "cpu") for spec in specs[1:]]
    finally: hear[0] = False
    assert len(set(opened)) <= 8 and len({(r.folder / "pictures.csv").read_text() for r in (first, *others)}) == 1


# The rule

def separable(n=120, seed=0, noise=1.):
    "Maps whose class is in one direction of the mean."
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    maps = rng.normal(0, noise, (n, 2, 2, 8)).astype(np.float16)
    maps[np.arange(n), :, :, y] += 1
    return MapSet([maps], np.arange(n), torch.from_numpy(y), ["a", "b", "c"])


def test_the_rule_looks_at_training_pictures_only_and_leaves_the_head_as_it_is():
    train, found = separable(), []
    for valid in (separable(30, 1), MapSet([np.full((30, 2, 2, 8), np.nan, np.float16)], np.arange(30), torch.zeros(30, dtype=torch.long), ["a", "b", "c"])):
        torch.manual_seed(0)
        head = get_head("avg")(8, 3)
        before = {k: v.clone() for k, v in head.state_dict().items()}
        recipe, what = find_rates(map_loaders(train, valid, 16), head, get_recipe("probe", epochs=8, bs=16), nn.CrossEntropyLoss(), 3)
        assert all(torch.equal(v, head.state_dict()[k]) for k, v in before.items())
        assert (recipe.lr, recipe.wd) == (what["lr"], what["wd"])
        found.append(what)
    assert found[0] == found[1]
    inner, held = inner_split(train, 10**6, 3)
    assert len(inner) == 96 and len(held) == 24 and not set(inner.rows.tolist()) & set(held.rows.tolist())
    assert Counter(held.labels.tolist()) == {0: 8, 1: 8, 2: 8}
    assert [len(part) for part in inner_split(train, 30, 3)] == [30, 24]


def test_the_rule_takes_the_best_of_its_trials_and_searches_only_what_is_open():
    dls, head, loss = map_loaders(separable(), separable(30, 1), 16), get_head("avg")(8, 3), nn.CrossEntropyLoss()
    recipe, found = find_rates(dls, head, get_recipe("probe", epochs=8, bs=16), loss, 1)
    rates = {lr: v for lr, wd, v in found["trials"] if wd == .01}
    assert recipe.lr == min(rates, key=rates.get) and 1e-3 < recipe.lr   # two epochs of six steps are few
    recipe, found = find_rates(dls, head, get_recipe("probe", epochs=8, bs=16, lr=3e-3), loss, 1)
    assert recipe.lr == 3e-3 and "lr" not in found and len(found["trials"]) == 2
    recipe, found = find_rates(dls, head, get_recipe("probe", epochs=8, bs=16, lr=3e-3, wd=0.), loss, 1)
    assert found == dict(trials=[]) and recipe.wd == 0
    few = map_loaders(separable(3), separable(30, 1), 3)   # nothing to hold back
    assert find_rates(few, head, get_recipe("probe", bs=3), loss, 1)[1]["trials"] == []


def test_a_rate_that_diverges_is_not_taken():
    dls = map_loaders(separable(), separable(30, 1), 16)
    class Delicate(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Linear(8, 3); self.first = None
        def forward(self, x):
            if self.first is None: self.first = self.out.weight.detach().clone()
            out = self.out(x.mean((2, 3)))
            return out / 0 if (self.out.weight - self.first).abs().max() > .05 else out
    recipe, found = find_rates(dls, Delicate(), get_recipe("probe", epochs=8, bs=16), nn.CrossEntropyLoss(), 1)
    assert any(v is None for *_, v in found["trials"]) and recipe.lr <= 3e-3


def test_decay_spares_norms_biases_powers_and_queries():
    "The loss does not depend on the head, so that decay alone moves it: by (1 - lr wd) in each step."
    class Nothing(nn.Module):
        def forward(self, out, y): return 0 * out.sum()
    dls = map_loaders(separable(40, 0), separable(30, 1), 20)
    for name in ("learned", "gem", "torch-mha", "classquery"):
        head = get_head(name)(8, 3, **dict(num_heads=2) if name == "torch-mha" else {})
        learn = head_learner(dls, head, get_recipe("probe", epochs=1, lr=1e-2, wd=3., bs=20), Nothing())
        before = {k: v.detach().clone() for k, v in head.named_parameters()}
        for fit in (lambda: learn.fit(1), lambda: learn.fit(1, wd=3.)):
            with learn.no_bar(), learn.no_logging(): fit()
        for k, p in head.named_parameters():
            shrunk = before[k] * (1 - .03)**4 if k.endswith("weight") and p.ndim > 1 else before[k]
            torch.testing.assert_close(p.detach(), shrunk, msg=f"{name}: {k}")
        assert {k for k, p in head.named_parameters() if p.ndim > 1 and not torch.equal(before[k], p)} and len(learn.opt.hypers) == 1


# Runs

def test_a_probe_is_runs_with_rates_splits_and_a_body_that_is_shared(finished, home):
    assert [r.status for r in finished] == ["complete"] * 6
    assert {(r.spec.seed, r.spec.split, r.redrawn) for r in finished} == {(s, "seed", True) for s in (1, 2, 3)}
    assert all(r.spec.recipe.lr is None and r.found["lr"] > 0 and r.run_seconds > 0 and r.doubles == 0 for r in finished)
    bodies = [r.folder / "body.safetensors" for r in finished]
    assert all(b.samefile(bodies[0]) for b in bodies) and len(list((home / "runs/.bodies").iterdir())) == 1
    children = {k: int(k.partition(".")[0]) for k in read_run_weights(finished[0].folder)}
    alone = {k for k, i in children.items() if i == max(children.values())}   # the head's
    assert load_file(finished[0].folder / "weights.safetensors").keys() == alone
    assert all(load_run(r.folder) == replace(r, folder=r.folder) for r in finished)
    with np.load(finished[1].folder / "maps.npz") as f: assert f["maps"].shape[:2] == (8, 1)
    first = finished[0]
    assert json.loads((first.folder / "spec.json").read_text())["recipe"]["lr"] is None and len(first.history()) == 4


def test_a_probe_opens_whole_moved_alone_and_without_its_start(finished, home, tmp_path):
    r = finished[1]
    shutil.copytree(r.folder, tmp_path / "moved")
    start = home / "body.pth"
    start.rename(tmp_path / "away.pth")
    try: learn = open_run(tmp_path / "moved", "cpu")
    finally: (tmp_path / "away.pth").rename(start)
    assert (learn.lr, learn.wd) == (r.found["lr"], r.found["wd"])
    with learn.no_bar(): loss, accuracy, *_ = learn.validate()
    assert accuracy == pytest.approx(r.value, abs=1e-6) and loss == pytest.approx(r.metrics["valid_loss"], rel=5e-3)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    first = next(k for k, v in before.items() if v.ndim == 4)
    assert not torch.equal(before[first], learn.model.state_dict()[first])   # the body learns now
    learn.export(tmp_path / "learn.pkl")
    exported = load_learner(tmp_path / "learn.pkl")
    name, _, probs = exported.predict(home / "photos/red/00.png")
    assert name in COLOURS and probs.sum() == pytest.approx(1, abs=1e-5)


def test_maps_of_a_probe_on_the_command_line(finished, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("maps", finished[1].folder, home / "photos/red/00.png", "--device", "cpu") == 0
    assert "red" in (tmp_path / "maps.html").read_text()


def test_a_run_may_start_from_a_probe(finished, home):
    spec = spec_of(home, "avg", 1, recipe="quick", epochs=1, start=str(finished[0].folder))
    result = run(spec, home / "quick", "cpu")
    assert result.status == "complete" and spec.start.fingerprint != finished[0].spec.start.fingerprint


def test_a_start_that_has_seen_the_validation_pictures_is_refused(finished, home):
    probe = finished[0].folder   # of split 1
    own, official = (run(spec_of(home, data=data, recipe="quick", epochs=1, start="", split="own"), home / "quick", "cpu").folder
                     for data in ("photos", "official"))
    for start, more in ((own, {}), (probe, dict(seed=2)), (probe, dict(split="own", recipe="quick"))):
        with pytest.raises(BadInput, match="^start: the run photos-avg-1-.* that would validate now. Start from"):
            spec_of(home, start=str(start), **more)
    for start, more in ((own, dict(split="own", seed=3)), (probe, dict(seed=1)), (official, dict(data="official")), (own, dict(data="official"))):
        assert spec_of(home, start=str(start), **more).start.path


def test_a_head_that_cannot_take_the_map_is_a_result_and_the_others_go_on(home, tmp_path, capsys):
    specs = [spec_of(home, head, seed, options=options) for seed in (1, 2) for head, options in (("avg", {}), ("learned", dict(num_heads=7)))]
    results = sweep(specs, tmp_path, "cpu")
    assert [r.status for r in results] == ["complete", "failed"] * 2 and "num_heads" in results[1].reason
    assert "learned split 1: failed: num_heads" in capsys.readouterr().out
    table = summarize(results)
    assert table.failed.tolist() == [0, 2] and table.diverged.tolist() == [0, 0] and format_table(table)["accuracy %"][1] == "– (2 failed)"
    page = write_report(results, tmp_path / "report.html").read_text()
    assert "cannot take the body&#39;s map: learned (num_heads" in page
    with pytest.raises(BadInput, match="failed, there is nothing to open: num_heads"): open_run(results[1].folder)
    sweep(specs, tmp_path, "cpu")
    said = capsys.readouterr().out
    assert "2 of 4 runs are in" in said and "run 1/2  learned split 1: failed" in said   # tried again


def test_a_comparison_in_which_no_head_could_be_trained_is_no_success(home, tmp_path, capsys):
    command = ["bench", str(home / "photos"), "--arch", ARCH, "--start", str(home / "body.pth"), "--recipe", "probe", "--size", "24", "--bs", "16",
               "--epochs", "1", "--splits", "2", "--options", "num_heads=7", "--out", str(tmp_path)]
    assert call(*command, "--heads", "learned") == 1
    out, err = capsys.readouterr()
    assert err.count("attnpool: heads: none could be trained. learned: num_heads") == 1 and "add it to --heads" not in out + err
    assert (tmp_path / "report.html").exists()
    assert call(*command, "--heads", "avg,learned") == 0 and "Heads that cannot take the body's map: learned (num_heads" in capsys.readouterr().out


def test_what_is_no_fault_of_the_head_ends_the_sweep(home, tmp_path):
    "Memory that is full."
    class Hungry(nn.Module):
        def __init__(self, ni, n_out): super().__init__(); self.out = nn.Linear(ni, n_out)
        def forward(self, x): return self.out(torch.empty(10**15).view(-1))
    HEADS["hungry"] = Hungry
    try:
        with pytest.raises(RuntimeError, match="can't allocate memory"): sweep([spec_of(home, "hungry")], tmp_path, "cpu")
    finally: del HEADS["hungry"]


def test_killed_in_the_middle_the_same_command_goes_on_without_the_body(home, tmp_path):
    "Runs that are whole stay, and the maps are not computed again."
    command = [sys.executable, "-m", "attnpool.cli", "bench", str(home / "photos"), "--arch", ARCH, "--start", str(home / "body.pth"),
               "--recipe", "probe", "--size", "24", "--bs", "16", "--heads", "avg,concat", "--splits", "3", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(1200):
            if len(list(tmp_path.glob("*/result.json"))) >= 2: break
            time.sleep(.05)
        process.send_signal(signal.SIGKILL)
    done = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*/result.json")}
    maps = {f: f.stat().st_mtime_ns for f in (home / "home").rglob("maps.npy")}
    assert 2 <= len(done) < 6
    assert call(*command[3:]) == 0
    assert len(list(tmp_path.glob("*/result.json"))) == 6 and all(f.stat().st_mtime_ns == t for f, t in done.items())
    assert {f: f.stat().st_mtime_ns for f in (home / "home").rglob("maps.npy")} == maps
    assert "corrected resampled" in (tmp_path / "report.html").read_text()


# Statistics

def test_the_corrected_interval_is_that_of_the_corrected_t_test():
    "Bounds at which the corrected resampled t statistic has a two-sided p of 5%."
    rng = np.random.default_rng(0)
    for n, ratio in ((5, .25), (10, .25), (10, 1 / 9), (100, 1.)):
        a, b = rng.normal(.9, .02, (2, n))
        mean, half, pairs = paired_difference(dict(enumerate(a)), dict(enumerate(b)), ratio=ratio)
        for bound in (mean - half, mean + half):
            t = (mean - bound) / np.sqrt((1 / n + ratio) * np.var(a - b, ddof=1))
            assert 2 * stats.t.sf(abs(t), n - 1) == pytest.approx(.05) and pairs == n
        plain = paired_difference(dict(enumerate(a)), dict(enumerate(b)))[1]
        assert half / plain == pytest.approx((1 + n * ratio)**.5)


def test_the_corrected_interval_covers_where_the_usual_one_does_not():
    "Ridge classifiers on two sets of features that are equally good: of 200 data sets, how many are told to differ."
    def told(ratio, times=200, n=60, splits=10):
        rng, wrong = np.random.default_rng(1), 0
        for _ in range(times):
            y = np.arange(n) % 2
            views = [rng.normal(0, 1, (n, 4)) + y[:, None] * .6 for _ in range(2)]
            values = [{}, {}]
            for s in range(splits):
                valid = share_of_each(y, .2, s)
                for x, kept in zip(views, values):
                    train = x[~valid], 2 * y[~valid] - 1
                    w = np.linalg.solve(train[0].T @ train[0] + np.eye(4), train[0].T @ train[1])
                    centre = train[0].mean(0) @ w
                    kept[s] = ((x[valid] @ w > centre) == (y[valid] == 1)).mean()
            mean, half, _ = paired_difference(*values, ratio=ratio)
            wrong += abs(mean) > half
        return wrong / times
    assert told(0) > .2 and told(.25) < .1


def test_the_interval_of_parts_of_one_training_set_covers_another_training_set():
    "Equal heads, each with a nearest-mean classifier on its own features; the test pictures stay."
    def told(ratio, n_parts, times=200, n=60):
        rng, wrong = np.random.default_rng(1), 0
        for _ in range(times):
            y, test = np.arange(n) % 2, np.arange(2000) % 2
            values = [{}, {}]
            for kept in values:
                x, new = (rng.normal(0, 1, (len(of), 4)) + of[:, None] * .6 for of in (y, test))
                for s in range(n_parts):
                    part = ~share_of_each(y, .2, s)
                    a, b = (x[part & (y == c)].mean(0) for c in (0, 1))
                    kept[s] = ((new @ (b - a) > (a + b) @ (b - a) / 2) == (test == 1)).mean()
            mean, half, _ = paired_difference(*values, ratio=ratio)
            wrong += abs(mean) > half
        return wrong / times
    for n_parts in (5, 10): assert told(0, n_parts) > .25 and told(4, n_parts) < .08


def test_differences_that_agree_by_chance_give_no_verdict(finished):
    for d in (-.1, 0., .1):
        mean, half, n = paired_difference({1: .8 + d, 2: .9 + d}, {1: .8, 2: .9})
        assert mean == pytest.approx(d) and np.isnan(half) and n == 2
    two = [replace(r, metrics=r.metrics | dict(accuracy=.8 + .1 * (r.spec.seed == 2) - .1 * (r.spec.head == "concat")))
           for r in finished if r.spec.seed < 3]
    assert format_table(summarize(two)).verdict.tolist()[:2] == ["–", "cannot tell with 2"]


def test_the_report_names_the_interval_and_what_it_covers(finished, home, tmp_path):
    accuracy = np.random.default_rng(0).uniform(.5, .9, 6)   # those of tiny runs may not differ
    finished = [replace(r, metrics=r.metrics | dict(accuracy=float(v))) for r, v in zip(finished, accuracy)]
    table = summarize(finished)
    values = {h: {r.spec.seed: r.value for r in finished if r.spec.head == h} for h in ("avg", "concat")}
    mean, half, _ = paired_difference(values["concat"], values["avg"], ratio=12 / 48)
    row = table.set_index("head").loc["concat"]
    assert (row.difference, row.high - row.low, row.ratio) == (pytest.approx(mean), pytest.approx(2 * half), .25)
    own = np.array(list(values["concat"].values()))
    assert row.mean_high - row.mean_low == pytest.approx(2 * stats.t.ppf(.975, 2) * own.std(ddof=1) * (1 / 3 + .25)**.5)
    assert row.lr in [r.found["lr"] for r in finished if r.spec.head == "concat"]
    text = format_table(table)
    assert "s/run" in text and "[95%]" in text and "s/epoch" not in text
    page = write_report(finished, tmp_path / "report.html").read_text()
    assert all(said in page for said in ("corrected resampled t interval", "Nadeau", "n splits", "<dt>splits</dt><dd>1, 2, 3</dd>", "one rule for all heads"))
    assert "initialisation and order of\nthe batches, and" not in page
    other = [replace(r, redrawn=False, found=dict(trials=[])) for r in finished]   # both rates were typed
    page = write_report(other, tmp_path / "other.html").read_text()
    assert "corrected" not in page and "jackknife t interval" in page and "four fifths of the training pictures" in page
    row = summarize(other).set_index("head").loc["concat"]
    d = np.array([values["concat"][s] - values["avg"][s] for s in (1, 2, 3)])
    assert row.high - row.low == pytest.approx(2 * stats.t.ppf(.975, 2) * d.std(ddof=1) * (1 / 3 + 4)**.5)
    assert "one rule for all heads" not in page
    quick = write_report([run(make_spec(head="avg", epochs=1, size=20, bs=128), tmp_path)], tmp_path / "quick.html").read_text()
    assert "The interval covers what differs between seeds" in quick and "four fifths" not in quick


def test_doubles_are_told_in_the_report_of_a_probe(home, tmp_path):
    shutil.copytree(home / "photos", tmp_path / "photos")
    for i in range(20): shutil.copy(tmp_path / f"photos/red/{i:02}.png", tmp_path / f"photos/red/copy{i:02}.png")
    spec = replace(spec_of(home, data=str(tmp_path / "photos")))
    result = run(spec, tmp_path / "runs", "cpu")
    assert result.doubles and result.doubles <= 8
    page = write_report([result], tmp_path / "report.html").read_text()
    assert f"up to {result.doubles} of 16 validation pictures in a split train as well" in page


# What cannot be meant

@pytest.mark.parametrize("values, message", [
    (dict(mix="cutmix"), "^mix: with train frozen"), (dict(drop_path=.1), "^drop_path: with train frozen"),
    (dict(augment="light"), "^augment: with train frozen each picture is seen once"), (dict(views=2, augment="none"), "^views: 2 views of a picture"),
    (dict(start=""), r"^start: recipe probe \(train frozen\) begins from trained weights"), (dict(split="random"), "^split: .*random"),
    (dict(recipe="quick", start="", views=2), "^views: only train frozen"), (dict(views=0), "^views: expected")])
def test_what_a_probe_cannot_do_is_told_first(home, values, message):
    with pytest.raises(BadInput, match=message): spec_of(home, **values)


def test_splits_on_the_command_line(home, tmp_path, capsys):
    base = ["bench", str(home / "photos"), "--arch", ARCH, "--start", str(home / "body.pth"), "--recipe", "probe", "--out", str(tmp_path)]
    assert call(*base, "--splits", "3", "--seeds", "1,2") == 2 and "--splits: each has its own seed" in capsys.readouterr().err
    assert call(*base, "--splits", "1") == 2 and "greater than or equal to 2" in capsys.readouterr().err
    assert call("bench", "digits", "--splits", "3") == 2 and "split: digits are made" in capsys.readouterr().err
    from attnpool.runs.asked import read_specs
    common = dict(arch=ARCH, start=str(home / "body.pth"))
    ten = read_specs(str(home / "photos"), "avg", None, "probe", **common)
    assert [s.seed for s in ten] == [*range(1, 11)] and {s.split for s in ten} == {"seed"}
    assert {(s.seed, s.split) for s in read_specs("digits", "avg", None, "probe", **common)} == {(s, "own") for s in (1, 2, 3)}
    assert {s.split for s in read_specs(str(home / "photos"), "avg", None, "quick", arch=ARCH)} == {"own"}
    assert read_specs(str(home / "photos"), "avg", None, "quick", splits=2, arch=ARCH)[1].split == "seed"


def test_a_disk_without_room_is_told(home, tmp_path):
    "A limit on the size of files stands for a full disk."
    code = f"""
import resource
from attnpool.data import get_dls
from attnpool.frozen import kept_maps
from attnpool.models.surgery import body_of
dls = get_dls({str(home / "photos")!r}, {SIZE}, 16, "cpu", "none")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try: kept_maps(dls, body_of({ARCH!r}).model, cache={str(tmp_path / "cache")!r}, progress=lambda done, n: None)
except ValueError as e: print(e)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert said.stdout.startswith("cache: no room left in"), said.stderr
    assert not list((tmp_path / "cache").rglob("maps.npy"))


def test_several_processes_are_told_that_one_is_enough(home):
    "In scale_up, which the command calls before anything is read."
    from attnpool.distributed import scale_up
    with pytest.raises(BadInput, match="^train: heads on kept maps train in seconds, in one process, got 2"): scale_up(spec_of(home), 2)
    assert scale_up(spec_of(home), 1) == spec_of(home)


def test_heads_get_their_steps_on_few_pictures(home):
    "A batch is at most an eighth of the pictures, in the run and in the trials of its rates; a smaller one is kept."
    with forget_shared():
        for bs, used in ((16, 6), (4, 4)):
            shared = shared_by(spec_of(home, bs=bs), "cpu")
            assert (len(shared.maps.train_ds), shared.maps.train.bs, len(shared.maps.train)) == (48, used, 48 // used)
