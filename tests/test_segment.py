"Segmentation: loss and metrics of pixels, ways to ask a network, and runs from spec to report."
import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from attnpool.cli import main
from attnpool.commands.masks import task_among
from attnpool.dense import Confusion, dense_metrics, DenseLoss
from attnpool.masks import IGNORED
from attnpool.recipe import get_recipe, learner_for, recipe_learner, RECIPES
from attnpool.registry import BadInput
from attnpool.runs.spec import make_spec, read_spec
from attnpool.runs.store import load_run
from attnpool.runs.train import open_run, run
from attnpool.segment import confusion_of, probabilities, RATIOS, segment_learner, windows
from attnpool.tasks import TASKS

TINY = dict(size=32, bs=8, epochs=1)
SMALL = dict(channels=16, aux_channels=8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Coloured squares on grey with their masks: 24 to train on, 8 to validate."
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    (folder/"classes.txt").write_text("ground\nred\nblue\n")
    for part, n in dict(train=24, val=8).items():
        for kind in ("images", "masks"): (folder/part/kind).mkdir(parents=True)
        for i in range(n):
            image, mask = rng.integers(0, 90, (32, 40, 3)).astype(np.uint8), np.zeros((32, 40), np.uint8)
            label, y, x = 1 + i % 2, *rng.integers(0, 16, 2)
            mask[y:y + 16, x:x + 16], image[y:y + 16, x:x + 16, 2 * (label - 1)] = label, 240
            mask[-1] = IGNORED
            Image.fromarray(image).save(folder/part/"images"/f"{i}.png")
            Image.fromarray(mask).save(folder/part/"masks"/f"{i}.png")
    return folder


@pytest.fixture
def a_spec(photos):
    def make(seed=1, **options):
        its = dict(data=photos, task="segment", arch="xeca_resnext_tiny", options=SMALL) | TINY | options
        return make_spec(seed=seed, **its)
    return make


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    "A run of two short epochs."
    spec = make_spec(photos, task="segment", options=SMALL, **TINY | dict(epochs=2))
    return run(spec, tmp_path_factory.mktemp("segment"), "cpu")


# Loss and metrics

def test_segment_loss_is_the_mean_over_pixels_with_a_class():
    g = torch.Generator().manual_seed(1)
    out, aux = torch.randn(2, 3, 4, 5, generator=g), torch.randn(2, 3, 2, 2, generator=g)
    y = torch.randint(0, 3, (2, 8, 10), generator=g)
    y[:, :2] = IGNORED
    def one(o):
        p = F.interpolate(o, (8, 10), mode="bilinear", align_corners=False).log_softmax(1)
        return -sum(p[b, y[b, i, j], i, j] for b in range(2) for i in range(2, 8) for j in range(10)) / 120
    torch.testing.assert_close(DenseLoss()(out, y), one(out))
    torch.testing.assert_close(DenseLoss()((out, aux), y), one(out) + .4 * one(aux))
    assert DenseLoss(.1)((out, aux), y) < DenseLoss()((out, aux), y) != DenseLoss(label_smoothing=.1)((out, aux), y)


def test_a_segment_batch_without_any_label_costs_nothing():
    out = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = DenseLoss()((out, out), torch.full((2, 8, 8), IGNORED))
    loss.backward()
    assert loss.item() == 0 and out.grad.abs().max() == 0


@pytest.mark.parametrize("absent", [None, 2])
def test_segment_metrics_are_torchmetrics(absent):
    from torchmetrics.classification import Accuracy, JaccardIndex
    g, n = torch.Generator().manual_seed(2), 5
    how = dict(task="multiclass", num_classes=n, ignore_index=IGNORED)
    theirs = dict(miou=JaccardIndex(average="macro", **how), pixel_accuracy=Accuracy(average="micro", **how))
    each, counts = JaccardIndex(average="none", **how), Confusion()
    for size in (6, 9, 4):   # pictures of several sizes make one matrix
        out, y = torch.randn(3, n, size, size + 1, generator=g), torch.randint(0, n, (3, size, size + 1), generator=g)
        if absent is not None:
            out[:, absent], y[y == absent] = -99, 0
        y[torch.rand(y.shape, generator=g) < .2] = IGNORED
        counts.add(out, y)
        for metric in (each, *theirs.values()): metric.update(out, y)
    for name, metric in theirs.items(): assert math.isclose(getattr(counts, name), metric.compute().item(), rel_tol=1e-5)
    torch.testing.assert_close(counts.iou.nan_to_num(0).float(), each.compute())
    assert counts.iou.isnan().tolist() == [i == absent for i in range(n)]
    table = counts.table("abcde")
    assert list(table) == ["class", "iou", "accuracy", "pixels", "predicted"] and table.pixels.sum() == counts.matrix.sum()


def test_segment_metrics_count_a_set_and_not_its_batches():
    one = torch.tensor([[[[9., 9], [9, 9]], [[0, 0], [0, 0]]]])   # says 0 everywhere
    class Learn: pass
    metrics, learn = dense_metrics(), Learn()
    for m in metrics: m.reset()
    for y in ([[0, 0], [0, 0]], [[1, 1], [0, IGNORED]]):
        learn.pred, learn.yb = one, (torch.tensor([y]),)
        for m in metrics: m.accumulate(learn)
    assert [round(m.value, 4) for m in metrics] == [round(5 / 7 / 2, 4), round(5 / 7, 4), .5]
    for m in metrics: m.reset()
    assert metrics[0].value is None   # an epoch does not go on from the last


# Ways to ask

class Blur(nn.Module):
    "Each pixel's logits from its neighbours: what is at a window's border is not known."
    def forward(self, x): return torch.stack([F.avg_pool2d(x[:, 0], 3, 1, 1), x[:, 1], x[:, 2] * 2], 1)


class Point(nn.Module):
    def forward(self, x): return x * 3


def test_segment_windows_cover_every_pixel():
    for side, window, step in itertools.product(range(1, 30), (1, 4, 7), (1, 3, 4)):
        if step > window: continue
        at = windows(side, window, step)
        seen = {i for a in at for i in range(a, min(a + window, side))}
        assert seen == set(range(side)) and at == sorted(set(at)) and at[-1] + window <= max(side, window)


def test_segment_probabilities_are_means_over_all_ways():
    x = torch.randn(2, 3, 20, 26, generator=torch.Generator().manual_seed(3))
    whole = probabilities(Point(), x)
    torch.testing.assert_close(whole, (x * 3).softmax(1))
    torch.testing.assert_close(probabilities(Point(), x, window=8), whole)   # each pixel by itself: windows change nothing
    torch.testing.assert_close(probabilities(Point(), x, window=8, step=8, flips=True), whole)
    torch.testing.assert_close(probabilities(Point(), x, window=64), whole)
    blurred = probabilities(Blur(), x, window=8)
    assert not torch.allclose(blurred, probabilities(Blur(), x)) and torch.allclose(blurred.sum(1), torch.ones(2, 20, 26))
    def at(r):   # by hand
        small = F.interpolate(x, (round(20 * r), round(26 * r)), mode="bilinear")
        said = ((small * 3).softmax(1) + (small.flip(3) * 3).softmax(1).flip(3)) / 2
        return F.interpolate(said, (20, 26), mode="bilinear")
    torch.testing.assert_close(probabilities(Point(), x, ratios=(.5, 1.5), flips=True), (at(.5) + at(1.5)) / 2)
    assert RATIOS == (.5, .75, 1, 1.25, 1.5, 1.75)


@pytest.mark.parametrize("how, words", [(dict(window=0), "window"), (dict(window=8, step=9), "step: expected 1 to 8"),
                                        (dict(ratios=()), "ratios"), (dict(ratios=(1, 0)), "ratios")])
def test_segment_ways_that_make_no_sense_are_errors(how, words):
    with pytest.raises(BadInput, match=words): probabilities(Point(), torch.zeros(1, 3, 8, 8), **how)


# Recipes

@pytest.mark.parametrize("parts", [{}, dict(bs=8, micro_bs=4)])
def test_segment_poly_falls_per_step_to_zero(a_spec, parts):
    seen = []
    from fastai.vision.all import Callback
    class Rates(Callback):
        order = 80
        def before_step(self): seen.append(self.opt.hypers[0]["lr"])
    dls = TASKS["segment"].dls(a_spec(), parts.get("micro_bs", 8), "cpu")
    how = dict(options=SMALL, steps=40, epochs=2, lr=1e-3, cbs=[Rates()], warmup=.25)
    learn = segment_learner(dls, recipe="segment", **how, **parts)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    want = [1e-3 * (1 - i / 40) * (1e-6 + (1 - 1e-6) * i / 10 if i < 10 else 1) for i in range(40)]
    assert len(seen) == 40 and np.allclose(seen, want, rtol=1e-6) and seen[-1] < 3e-5


def test_segment_learner_of_a_body_that_stands_needs_its_weights(a_spec):
    dls = TASKS["segment"].dls(a_spec(), 8, "cpu")
    with pytest.raises(BadInput, match="start: recipe finetune"): segment_learner(dls, recipe="finetune", options=SMALL)


def test_segment_recipe_is_the_published_one():
    r = RECIPES["segment"]
    assert (r.steps, r.bs, r.size, r.lr, r.wd, r.opt, r.schedule) == (160_000, 16, 512, 6e-5, .01, "adamw", "poly")
    assert get_recipe("segment", "upernet", arch="patchconvnet_b60").drop_path == .3
    assert get_recipe("segment", "upernet", arch="xeca_resnext_tiny").drop_path == 0


def test_segment_epochs_override_steps():
    assert get_recipe("segment", epochs=3).steps is None and get_recipe("segment", epochs=3).epochs == 3
    assert get_recipe("segment", epochs=4, steps=8).steps == 8
    with pytest.raises(BadInput, match="steps: .* got 9. Use 8 or 12"): get_recipe("quick", "avg", epochs=4, steps=9)


@pytest.mark.parametrize("micro", [None, 4])
def test_segment_steps_are_done_in_equal_parts_however_many_pictures(a_spec, micro, tmp_path):
    result = run(a_spec(steps=30, epochs=2, bs=8, micro_bs=micro), tmp_path, "cpu")   # more than one pass each
    assert len(result.history()) == 2 and load_run(result.folder).status == "complete"
    learn = open_run(result.folder, "cpu")
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert len(learn.recorder.lrs) == 30


# Specs

def test_segment_specs_have_the_tasks_own_recipe_and_head():
    spec = make_spec("scenes", task="segment")
    assert spec.recipe.name == "segment-small" and spec.head == "upernet" and spec.name.startswith("scenes-upernet-1-")
    assert read_spec(json.loads(json.dumps(spec.to_json()))) == spec
    assert make_spec("scenes", task="segment", options=dict(dropout=.1)) == make_spec("scenes", task="segment")
    assert make_spec(head="avg", seed=1).name == "digits-avg-1-8fa46fb3e0"


@pytest.mark.parametrize("asked, words", [
    (dict(head="avg"), "head: the task segment has one head, upernet"), (dict(recipe="mixed"), "mix: .* segment-small"),
    (dict(train="head"), "train: head is for classifiers"), (dict(recipe="fixres"), "mix: "),
    (dict(eval_sizes=(64,)), "eval_sizes: .*evaluate"), (dict(augment="light"), "augment: "), (dict(views=2), "views: "),
    (dict(options=dict(chanels=3)), "options: 'chanels' is unknown.*channels"), (dict(recipe="probe"), "train: frozen is for classifiers"),
    (dict(recipe="quick", mix="cutmix"), "mix: ")])
def test_segment_refuses_what_has_no_meaning(asked, words):
    with pytest.raises(BadInput, match=words): make_spec("scenes", task="segment", **asked)


def test_the_head_of_segment_is_no_head_of_classify():
    with pytest.raises(BadInput, match="head: upernet is the head of the task segment"): make_spec("digits", "upernet")


# Runs

def test_segment_run_leaves_what_can_be_read_again(trained):
    assert trained.primary == "miou" and 0 < trained.value < 1
    assert {"miou", "pixel_accuracy", "mean_accuracy", "valid_loss"} <= trained.metrics.keys()
    assert .1 < trained.metrics["floor"] < 1 / 3   # the ground everywhere
    with np.load(trained.folder/"maps.npz") as f: arrays = dict(f)
    n, h, w, _ = arrays["images"].shape
    assert n == 8 and arrays["images"].dtype == np.uint8 and "maps" not in arrays
    assert arrays["truth"].shape == arrays["said"].shape == (n, h, w) and arrays["said"].max() < len(arrays["vocab"])
    table = pd.read_csv(trained.folder/"classes.csv")
    assert list(table["class"]) == list(arrays["vocab"]) and math.isclose(table.iou.mean(), trained.value, abs_tol=1e-4)


def test_a_segment_run_is_opened_with_its_numbers(trained):
    learn = open_run(trained.folder, "cpu")
    with learn.no_bar(), learn.no_logging(): values = learn.validate()
    assert math.isclose(values[1], trained.value, abs_tol=1e-6)
    assert math.isclose(confusion_of(learn.model, learn.dls.valid).miou, trained.value, abs_tol=1e-6)
    alone = open_run(trained.folder, "cpu", with_data=False)
    assert list(alone.dls.vocab) == list(learn.dls.vocab)


def test_a_stopped_segment_run_goes_on_to_the_same_numbers(trained, tmp_path):
    def stop(row): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(trained.spec, tmp_path, "cpu", checkpoint_seconds=0, on_epoch=stop)
    told = []
    again = run(trained.spec, tmp_path, "cpu", checkpoint_seconds=0, on_checkpoint=lambda *t: told.append(t))
    assert again.metrics == trained.metrics


def test_a_segment_run_begins_from_a_classifier_and_keeps_where_it_looked(a_spec, tmp_path):
    classifier = run(make_spec("digits", "learned", epochs=1, size=32), tmp_path, "cpu")
    spec = a_spec(start=classifier.folder)
    assert spec.start and spec.id != a_spec().id
    task = TASKS["segment"]
    model, _ = task.model(spec, task.dls(spec, 8, "cpu"))
    mine, theirs = model.body.state_dict(), open_run(classifier.folder, "cpu").model.state_dict()
    same = [any(v.shape == t.shape and torch.equal(v, t) for t in theirs.values()) for v in mine.values()]
    assert np.mean(same) > .9
    result = run(spec, tmp_path, "cpu")
    with np.load(result.folder/"maps.npz") as f:
        assert f["maps"].shape == f["truth"].shape and str(f["maps_of"]) == classifier.folder.name
        assert np.allclose(f["maps"].mean((1, 2)), 1, atol=.2)   # multiples of uniform weights


def test_bench_of_segment_tells_its_table(photos, tmp_path, capsys):
    words = ["bench", str(photos), "--task", "segment", "--seeds", "1,2", "--size", "32", "--epochs", "1", "--bs", "8", "--jobs", "1",
             "--options", "channels=16,aux_channels=8", "--device", "cpu", "--out", str(tmp_path/"runs")]
    with pytest.raises(SystemExit) as e: main(words)
    out = capsys.readouterr().out
    assert e.value.code == 0 and "segment-small" in out and "upernet" in out
    table = pd.read_csv(tmp_path/"runs"/"report.csv")
    assert len(table) == 1 and table["n"][0] == 2 and 0 < table["miou"][0] < 1
    with pytest.raises(SystemExit) as e: main(["report", str(tmp_path/"runs"), "--out", str(tmp_path/"r.html")])
    assert e.value.code == 0


@pytest.mark.parametrize("more, words", [
    (["--heads", "avg"], "heads: the task segment has one head"), (["--test"], "test: the task segment"),
    (["--recipe", "mixed"], "mix:"), (["--steps", "7", "--epochs", "2"], "steps:")])
def test_bench_of_segment_refuses_in_one_line(more, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(["bench", "scenes", "--task", "segment", "--out", str(tmp_path/"runs"), *more])
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path/"runs").exists()


def test_evaluate_of_a_segment_run_counts_pixels_in_the_way_that_is_asked(trained, photos, tmp_path, capsys):
    def ask(*more):
        words = ["evaluate", str(trained.folder), *more, "--device", "cpu", "--out", str(tmp_path/"e")]
        with pytest.raises(SystemExit) as e: main(words)
        return e.value.code, capsys.readouterr()
    assert ask()[0] == 0
    table = pd.read_csv(tmp_path/"e"/"segmentation.csv")
    assert math.isclose(table.miou[0], trained.value, abs_tol=1e-4) and table.pictures[0] == 8 and table.asked[0] == "whole"
    assert ask("--ratios", ".75,1", "--flips")[0] == 0
    learn = open_run(trained.folder, "cpu")
    want = confusion_of(learn.model, learn.dls.valid, ratios=(.75, 1.), flips=True)
    assert math.isclose(pd.read_csv(tmp_path/"e"/"segmentation.csv").miou[0], want.miou, abs_tol=1e-4)
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path/"e"/"masks").iterdir()}
    assert ask(str(photos))[0] == 0 and len(kept) == 2   # its own pictures, named: they are there
    assert {f: f.stat().st_mtime_ns for f in (tmp_path/"e"/"masks").iterdir()} == kept
    code, told = ask("--test")
    assert code == 2 and "no test pictures" in told.err
    shutil.copytree(photos, tmp_path/"more")
    shutil.copytree(photos/"train", tmp_path/"more"/"test")
    assert ask(str(tmp_path/"more"), "--test")[0] == 0
    table = pd.read_csv(tmp_path/"e"/"segmentation.csv")
    assert table.pictures[0] == 24 and table.data[0] == "more, test"
    shutil.copytree(photos/"train", tmp_path/"swapped"/"val")
    shutil.copytree(photos/"val", tmp_path/"swapped"/"train")
    shutil.copy(photos/"classes.txt", tmp_path/"swapped")
    assert ask(str(tmp_path/"swapped"))[0] == 0
    assert pd.read_csv(tmp_path/"e"/"segmentation.csv").miou[0] == table.miou[0] != trained.value
    code, told = ask("--sizes", "64")
    assert code == 2 and told.err.startswith("attnpool: sizes: ") and "--ratios" in told.err


def test_recipes_of_segment_are_no_recipes_of_a_classifier(dls):
    with pytest.raises(BadInput, match="loss: 'balanced' .*--task segment"): make_spec("digits", recipe="segment-small")
    with pytest.raises(BadInput, match="loss: 'balanced' .*--task segment"): recipe_learner(dls, recipe="segment-small")


def test_ways_of_segment_are_no_ways_of_a_classifier():
    assert task_among(["resnet18"], sizes="64") == "classify"
    with pytest.raises(BadInput, match="window: it is for runs of a segmentation, got 32"): task_among(["resnet18"], window=32)
