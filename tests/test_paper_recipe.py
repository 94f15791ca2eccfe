"The paper's training: its optimizer, rates, repeated pictures and large batches, each against an independent reference."
import json
import math
import os
import pickle
import random
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, PILImage, TfmdDL, set_seed
from hypothesis import given
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler
from timm.optim import Lamb, param_groups_weight_decay
from torch import nn

from attnpool.callback.order import Order
from attnpool.data.batches import repeated
from attnpool.data.digits import digits_dls
from attnpool.distributed import distributed, join_processes, processes, scale_up, shard
from attnpool.frozen import check_frozen
from attnpool.models.surgery import build_network
from attnpool.optimizers import decaying
from attnpool.recipe import (
    LOSSES, OPTIMIZERS, RECIPES, change_recipe, get_recipe, learner_for, read_recipe, recipe_learner, save_recipe)
from attnpool.registry import BadInput
from attnpool.settings import Recipe, less_drop_path, values_of

ROOT = Path(__file__).parent.parent


def fitted(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs) if args else learn.fit_recipe()
    return learn


def column(n_out=10, **options):
    "A narrow PatchConvNet with the paper's aggregation: query, LayerScales, norms, biases and kernels."
    from attnpool.models.patchconvnet import PatchConvNet
    return PatchConvNet(embed_dim=16, depth=2, patch_size=8, num_classes=n_out, **options)


# LAMB

def scripted(model, grads, lr=3e-3, wd=.05):
    "A training script's loop with timm's optimizer and timm's groups."
    opt = Lamb(param_groups_weight_decay(model, wd, no_weight_decay_list=model.no_weight_decay()), lr=lr)
    for step in grads:
        for p, g in zip(model.parameters(), step): p.grad = g.clone()
        opt.step()
        opt.zero_grad()
    return model


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("class_queries", [False, True])
def test_ten_steps_of_lamb_equal_a_scripts_to_the_last_digits(groups, class_queries):
    model = column(class_queries=class_queries).double()
    grads = [[torch.randn_like(p) * .1 for p in model.parameters()] for _ in range(10)]
    theirs, ours = scripted(deepcopy(model), grads), deepcopy(model)
    params = list(ours.parameters())
    split = params if groups == 1 else [params[:4], params[4:9], params[9:]]   # a splitter's, cut anywhere
    opt = OPTIMIZERS["timm-lamb"](split, weights=decaying(ours), lr=3e-3)
    opt.set_hypers(wd=.05)
    for i, step in enumerate(grads):
        for p, g in zip(params, step): p.grad = g.clone()
        opt.step()
        opt.zero_grad()
        if i == 4:   # as a checkpoint has it
            kept = pickle.loads(pickle.dumps(opt.state_dict()))
            opt = OPTIMIZERS["timm-lamb"](split, weights=decaying(ours), lr=1.)
            opt.load_state_dict(kept)
    difference = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters()))
    assert difference < 1e-12
    assert len(opt.param_lists) == groups and {g["step"].item() for g in opt.opt.param_groups} == {10.}


def test_lambs_weights_are_those_that_timm_would_decay():
    for options in ({}, dict(class_queries=True), dict(stem="linear"), dict(global_pool="avg")):
        model = column(**options)
        theirs = param_groups_weight_decay(model, .1, no_weight_decay_list=model.no_weight_decay())
        assert {id(p) for p in decaying(model)} == {id(p) for g in theirs if g["weight_decay"] for p in g["params"]}


class Same(nn.Module):
    "A loss without a gradient, so that decay alone moves the weights."
    def forward(self, pred, y): return pred.sum() * 0


@pytest.mark.parametrize("opt", ["timm-lamb", "adamw", "adamw-groups"])
@pytest.mark.parametrize("by", ["recipe", "fit"])
@pytest.mark.parametrize("train", ["all", "finetune"])
def test_lamb_and_adamw_decay_each_group_as_it_should_after_two_steps(opt, by, train, dls):
    net = build_network("resnet10t", 10, "learned") if train == "finetune" else None
    model, more = (net.model, dict(splitter=net.splitter)) if net else (column(), {})
    recipe = Recipe(1, 64, 16, lr=1e-2, opt=opt, wd=3. if by == "recipe" else None, precision="float32", schedule="one_cycle")
    learn = learner_for(dls, model, recipe, Same(), [], **more)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit = {} if by == "recipe" else dict(wd=3.)
    if net: learn.freeze(), learn.unfreeze()   # which go by the splitter's groups
    fitted(learn, 1, 1e-2, **fit)   # 48 pictures in batches of 16: three steps
    after, kept = dict(model.named_parameters()), {id(p) for p in decaying(model)}
    spared = 0
    for name, p in before.items():
        wanted = p * (1 - 1e-2 * 3.)**3 if opt != "timm-lamb" else None
        if id(after[name]) not in kept:
            spared += 1
            assert torch.equal(after[name], p), name
        elif p.abs().max() == 0: continue
        elif opt == "timm-lamb":   # the step has the norm of the weight, whatever the decay
            assert (after[name].norm() / p.norm()).item() == pytest.approx((1 - 1e-2)**3, abs=1e-4), name
        else: assert torch.allclose(after[name], wanted, rtol=1e-5), name
    names = [name for name in before if "query" in name]
    assert spared > 5 and names and all(torch.equal(after[n], before[n]) for n in names)


def test_the_older_lamb_of_fastai_keeps_its_name():
    from fastai.optimizer import Lamb as fastais
    assert OPTIMIZERS["lamb"] is fastais and OPTIMIZERS["adamw-groups"] is OPTIMIZERS["adamw"]
    learn = learner_for(digits_dls(20, 4, n_train=8, n_valid=2), nn.Sequential(nn.Flatten(), nn.Linear(1200, 10)), get_recipe("paper-small", opt="timm-lamb-1e-8", lr=1e-3, arch=""), CrossEntropyLossFlat(), [])
    learn.create_opt()
    assert type(learn.opt.opt) is Lamb and learn.opt.opt.defaults["eps"] == 1e-8 and len(learn.opt.weights) == 1
    own = OPTIMIZERS["timm-lamb"]([nn.Parameter(torch.ones(2, 2))], lr=1e-3).opt
    assert isinstance(own, Lamb) and own.defaults["betas"] == (.9, .999) and own.defaults["eps"] == 1e-6 and own.defaults["max_grad_norm"] == 1


# Rates

def closed_form(epoch, epochs=400, rise=5, lr=3e-3, low=1e-6, floor=1e-5):
    "timm's cosine with its warm-up inside, at any place of an epoch."
    if epoch < rise: return low + (lr - low) * epoch / rise
    return floor + (lr - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2


class Rates(Callback):
    order = 61   # after the schedule
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append(self.opt.hypers[-1]["lr"])


@pytest.mark.parametrize("micro_bs", [None, 8])
def test_the_papers_rate_of_every_step_is_the_closed_form(micro_bs):
    dls = digits_dls(20, micro_bs or 16, n_train=40, n_valid=2)   # 2 steps in an epoch; a tenth of the paper's epochs
    model, rates = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20 * 20, 10)), Rates()
    recipe = get_recipe("paper", epochs=40, bs=16, size=20, micro_bs=micro_bs, repeats=1, mix="none", drop_path=0., wd=.01, precision="float32")
    recipe = replace(recipe, micro_bs=micro_bs)
    learn = fitted(learner_for(dls, model, recipe, CrossEntropyLossFlat(), [], cbs=rates))
    assert rates.seen == learn.recorder.lrs and len(rates.seen) == len(learn.recorder.losses) == 80
    assert np.allclose(learn.recorder.lrs, [closed_form(i / 2, 40, .5) for i in range(80)], rtol=1e-9, atol=1e-15)
    assert learn.recorder.lrs[0] == pytest.approx(1e-6) and max(learn.recorder.lrs) == pytest.approx(3e-3, rel=5e-3)
    assert list(learn.recorder.iters) == [2 * (e + 1) for e in range(40)]


def test_the_papers_schedule_is_timms():
    from timm.scheduler import CosineLRScheduler
    opt = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=3e-3)
    theirs = CosineLRScheduler(opt, t_initial=400, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, cycle_limit=1)
    for epoch in range(400): assert theirs._get_lr(epoch)[0] == pytest.approx(closed_form(epoch), rel=1e-12)


# Values by network

def test_the_papers_values_by_network():
    published = dict(s20=(.01, 0), s36=(.01, .05), s60=(.01, .15), s120=(.01, .2), b36=(.05, .2), b60=(.05, .3), b120=(.05, .4))
    for name, (wd, drop_path) in published.items():
        for arch in (f"patchconvnet_{name}", f"patchconvnet_{name}_multi"):
            r = get_recipe("paper", "avg", arch=arch)
            assert (r.wd, r.drop_path) == (wd, drop_path)
            for tuned in ("fixres", "finetune-21k"):
                t = get_recipe(tuned, arch=arch)
                assert t.wd == .01 and t.drop_path == pytest.approx(max(0, drop_path - .1)) and t.repeats == 1
    assert less_drop_path(.15) == .05 and less_drop_path(.05) == less_drop_path(None) == 0 == get_recipe("fixres", arch="resnet18").drop_path
    assert values_of("quick", "patchconvnet_s60") == {} and get_recipe("quick", "avg", arch="patchconvnet_s60") == get_recipe("quick", "avg")


def test_what_was_typed_for_the_paper_stays(tmp_path):
    assert get_recipe("paper", arch="patchconvnet_b60", wd=.01, drop_path=0.).wd == .01
    assert get_recipe("paper", arch="patchconvnet_b60", drop_path=0.).drop_path == 0
    (tmp_path / "mine.toml").write_text('base = "paper"\ndrop_path = 0.25\n')
    r = get_recipe(tmp_path / "mine.toml", arch="patchconvnet_b60")
    assert (r.wd, r.drop_path) == (.05, .25)
    for name in ("paper", "fixres", "finetune-21k", "paper-small"):   # from a file as from the table
        assert read_recipe(save_recipe(RECIPES[name], tmp_path / "r.toml")) == RECIPES[name]
        assert get_recipe(tmp_path / "r.toml", arch="patchconvnet_b60") == get_recipe(name, arch="patchconvnet_b60")


def test_a_spec_of_the_paper_has_plain_numbers():
    from attnpool.runs.spec import make_spec, read_spec
    spec = make_spec(arch="patchconvnet_s60", recipe="paper", size=64)
    assert (spec.recipe.wd, spec.recipe.drop_path) == (.01, .15)
    typed = make_spec(arch="patchconvnet_s60", recipe="paper", size=64, wd=.01, drop_path=.15)
    assert typed.id == spec.id and read_spec(json.loads(json.dumps(spec.to_json()))) == spec
    assert make_spec(arch="xeca_resnext_tiny", recipe="paper").recipe.drop_path == 0


# Repeated augmentation

@given(st.integers(1, 90), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_repeats_are_those_of_timms_sampler_list_for_list(n, repeats, processes, bs, epoch):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()   # as the sampler shuffles
    for r in range(processes):
        sampler = RepeatAugSampler(range(n), processes, r, num_repeats=repeats, selected_round=0)
        sampler.set_epoch(epoch)
        theirs, ours = list(sampler), shard(repeated(order, repeats), bs, processes, r, drop_last=True, apart=True)
        assert len(ours) == n // (processes * bs) * bs and ours == theirs[:len(ours)]
        if n % processes == 0: assert shard(repeated(order, repeats), n, processes, r, apart=True) == theirs


def test_repeats_are_not_rounded_on_small_data():
    assert len(repeated(range(1500), 3)) == 1500
    assert len(list(RepeatAugSampler(range(1500), 1, 0))) == 1280   # its default, for large data


class Watch(Callback):
    "Keeps what a network gets in training."
    order, run_valid = 8, False
    def before_fit(self): self.seen = []
    def before_batch(self): self.seen.append((self.x.clone(), self.y.clone()))


def numbered(n, bs, workers=0, **tfms):
    "DataLoaders of pictures that hold their own number, one epoch of each is an order."
    from fastai.data.all import Datasets, TensorCategory
    ds = Datasets(range(n), [[lambda i: torch.full((1, 4, 4), float(i))], [lambda i: TensorCategory(i % 3)]])
    dl = TfmdDL(ds, bs=bs, shuffle=True, drop_last=True, num_workers=workers, device=torch.device("cpu"), **tfms)
    return DataLoaders(dl, dl.new(shuffle=False, drop_last=False), device=torch.device("cpu"))


def numbers(watch): return [[int(v) for v in x[:, 0, 0, 0]] for x, _ in watch.seen]


def net(n=16, n_out=3): return nn.Sequential(nn.Flatten(), nn.Linear(n, n_out))


@pytest.mark.parametrize("bs, micro_bs", [(6, None), (6, 3), (6, 2), (6, 1)])
def test_repeats_in_a_learner_are_thirds_of_the_pictures_in_rows(bs, micro_bs):
    recipe = Recipe(2, 4, bs, lr=1e-3, opt="adam", repeats=3, micro_bs=micro_bs, precision="float32")
    learn = learner_for(numbered(20, micro_bs or bs), net(), recipe, CrossEntropyLossFlat(), [], cbs=(watch := Watch()))
    fitted(learn)
    order = sum(numbers(watch), [])
    assert len(order) == 2 * 18   # three steps in an epoch of 20
    for epoch in (order[:18], order[18:]):
        assert len(set(epoch)) == 6 and epoch == [i for i in epoch[::3] for _ in range(3)]
    assert order[:18] != order[18:] and len(learn.recorder.lrs) == 6
    assert len(learn.dls.train) == 20 // (micro_bs or bs)   # the user's own are left alone


def test_repeats_keep_the_loaders_own_order():
    "What a loader would show, each three times: no number is drawn beside it."
    def orders(repeats):
        set_seed(5)
        dls = numbered(18, 6)
        recipe = Recipe(2, 4, 6, lr=1e-3, opt="adam", repeats=repeats, precision="float32")
        learn = learner_for(dls, net(), recipe, CrossEntropyLossFlat(), [], cbs=(watch := Watch()))
        fitted(learn)
        return sum(numbers(watch), []), random.getstate()
    (plain, state), (thrice, state3) = orders(1), orders(3)
    assert thrice == repeated(plain[:18], 3) + repeated(plain[18:], 3) and state == state3


@pytest.mark.parametrize("mix", ["none", "paper", "cutmixup"])
def test_repeats_are_augmented_anew(mix, tmp_path):
    "Pictures from a cache of pixels, with a mixing callback and without."
    from PIL import Image

    from attnpool.data.pictures import picture_dls
    rng = np.random.default_rng(0)
    for i in range(24):
        (tmp_path / "d" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / "d" / "ab"[i % 2] / f"{i}.png")
    dls = picture_dls(tmp_path / "d", 24, 6, "cpu", augment="randaugment", cache=tmp_path / "cache")
    recipe = Recipe(1, 24, 6, lr=1e-3, opt="adam", repeats=3, mix=mix, precision="float32")
    learn = learner_for(dls, net(3 * 24 * 24, 2), recipe, CrossEntropyLossFlat(), [], cbs=(watch := Watch()))
    fitted(learn)
    pictures = torch.cat([x for x, _ in watch.seen])
    assert len(pictures) == 18 and len({p.numpy().tobytes() for p in pictures}) == 18


# What is done to the pictures

def test_the_papers_mix_is_timms_in_pictures_and_in_loss():
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy
    shares, cuts = [], 0
    class Check(Callback):
        order, run_valid = 9, False   # after the mix
        def before_batch(self):
            nonlocal cuts
            mixer = self.learn.cut_mix_up
            x, lam = originals.pop(), mixer.lam[0].item()
            shares.append(lam)
            assert (mixer.lam == lam).all() and torch.equal(mixer.yb1[0], self.y.flip(0))
            plain = torch.allclose(self.x, lam * x + (1 - lam) * x.flip(0), atol=1e-6)
            if plain and 0 < lam < 1: return
            assert ((self.x == x) | (self.x == x.flip(0))).all() and ((self.x != x).any(1).float().mean((1, 2)) <= 1 - lam + 1e-6).all()
            cuts += 1
        def after_loss(self):
            y = mixup_target(self.y.as_subclass(torch.Tensor), 10, shares[-1], .1)
            losses.append((self.loss.item(), SoftTargetCrossEntropy()(self.pred.as_subclass(torch.Tensor), y).item()))
    originals, losses = [], []
    class Before(Callback):
        order, run_valid = -5, False
        def before_batch(self): originals.append(self.x.clone())
    dls = digits_dls(20, 8, n_train=80, n_valid=8)
    recipe = Recipe(4, 20, 8, lr=1e-3, opt="adam", mix="paper", label_smoothing=.1, precision="float32")
    fitted(learner_for(dls, net(3 * 20 * 20, 10), recipe, LOSSES["cross_entropy"](recipe), [], cbs=[Check(), Before()]))
    assert len(losses) == 40 and np.allclose(*zip(*losses), rtol=1e-5) and 8 < cuts < 32
    assert min(shares) < .3 and max(shares) > .7   # not the larger of the two


def test_the_papers_randaugment_is_timms_pixel_for_pixel():
    from PIL import Image
    from skimage import data
    from timm.data import create_transform

    from attnpool.data.augment import AUGMENTS
    for name, config in {"imagenet": "rand-m9-mstd0.5-inc1", "imagenet-m7": "rand-m7-mstd0.5-inc1"}.items():
        theirs, ours = create_transform(48, True, auto_augment=config, color_jitter=None, interpolation="bicubic", normalize=False), AUGMENTS[name].items(48)[0]
        photo, same = Image.fromarray(data.chelsea()), 0
        for seed in range(60):
            set_seed(seed)
            try: wanted = np.asarray(theirs(photo)).transpose(1, 2, 0)
            except ValueError: continue   # of newer Pillows, which posterise to no fewer bits than 1
            set_seed(seed)
            assert np.array_equal(np.asarray(ours(PILImage.create(photo), split_idx=0)), wanted)
            same += 1
        assert same > 40


# Batches larger than the memory

class Doubled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, x): return self.model(x.double())


class Gradients(Callback):
    "Keeps what the optimizer sees."
    order = 12   # after the scaler
    def before_fit(self): self.steps = []
    def before_step(self): self.steps.append([p.grad.clone() for p in self.model.parameters() if p.grad is not None])


def in_parts(model, micro_bs, cbs=(), **settings):
    "A training with a batch of 8, whole or in parts."
    set_seed(3)
    dls = digits_dls(24, micro_bs or 8, n_train=20, n_valid=4)
    settings = dict(opt="timm-lamb", wd=.05, schedule="cosine", precision="float32") | settings
    recipe = Recipe(2, 24, 8, lr=1e-3, micro_bs=micro_bs, **settings)
    learn = learner_for(dls, deepcopy(model), recipe, CrossEntropyLossFlat(), [], cbs=[keep := Gradients(), *cbs])
    set_seed(2)
    return fitted(learn), keep.steps


def farthest(one, other): return max((p - q).abs().max().item() for p, q in zip(one, other))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("micro_bs", [1, 2, 4, 8])
def test_paper_batches_in_parts_have_the_gradient_of_the_whole(micro_bs, repeats):
    model = Doubled(column().double())
    (a, parts), (b, whole) = in_parts(model, micro_bs, repeats=repeats), in_parts(model, None, repeats=repeats)
    assert len(parts) == len(whole) == 4   # two steps in an epoch of 20
    assert max(map(farthest, parts, whole)) < 1e-12 and farthest(a.model.parameters(), b.model.parameters()) < 1e-12
    assert len(a.recorder.lrs) == 4 and np.allclose(a.recorder.lrs, b.recorder.lrs, rtol=1e-12)
    assert np.allclose(a.recorder.values, b.recorder.values, rtol=1e-6) and list(a.recorder.iters) == list(b.recorder.iters)


@pytest.mark.parametrize("settings", [dict(precision="bf16"), dict(precision="fp16"), dict(train="head"), dict(mix="paper"), dict(mix="cutmixup")], ids=str)
def test_paper_batches_in_parts_work_with_what_else_there_is(settings):
    "With mixed precision the optimizer sees the sum, without the scaler's factor; with train head the body stands."
    model = column()
    settings = dict(wd=0.) | settings
    (a, parts), (b, whole) = in_parts(model, 2, **settings), in_parts(model, None, **settings)
    assert len(parts) == len(whole) == 4 and len(a.recorder.lrs) == 4
    if "mix" in settings: return   # one λ for each part: other pictures
    assert len(parts[0]) == len(whole[0]) > 8
    for s, t in zip(parts[0], whole[0]): assert torch.allclose(s, t, atol=2e-2 * t.abs().max().item() + 1e-7)
    if "train" in settings: assert farthest(a.model.stem.parameters(), model.stem.parameters()) == 0


def test_a_paper_batch_that_was_stopped_within_a_step_leaves_nothing():
    class Stop(Callback):
        order, at = 70, 2
        def before_batch(self):
            if self.training and self.iter == self.at: raise KeyboardInterrupt
    dls = numbered(20, 2)
    recipe = Recipe(1, 4, 8, lr=1e-2, opt="sgd", wd=0., micro_bs=2, precision="float32")
    learn = learner_for(dls, net(), recipe, CrossEntropyLossFlat(), [], cbs=(stop := Stop()))
    with pytest.raises(KeyboardInterrupt): fitted(learn)
    assert any(p.grad is not None and p.grad.abs().sum() for p in learn.model.parameters())   # of half a step
    learn.remove_cb(stop)
    learn.add_cb(keep := Gradients())
    set_seed(1)
    other = learner_for(dls, deepcopy(learn.model), recipe, CrossEntropyLossFlat(), [], cbs=(clean := Gradients()))
    other.model.zero_grad()
    state = dls.train.rng.getstate()
    fitted(learn)
    dls.train.rng.setstate(state)
    fitted(other)
    assert max(map(farthest, keep.steps, clean.steps)) == 0 and len(keep.steps) == 2


class Exchanges(Callback):
    order = 12
    def before_fit(self): self.seen = []
    def before_backward(self): self.seen.append(getattr(self.learn.model, "require_backward_grad_sync", None))


def shared_training(micro_bs):
    "In this process, or together with the others: weights, pictures, exchanges, rates, loss."
    join_processes("cpu")
    recipe = Recipe(2, 4, 12, lr=1e-2, opt="timm-lamb", wd=.05, schedule="cosine", repeats=3, micro_bs=micro_bs, precision="float32")
    set_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)).double()
    dls = numbered(30, recipe.loader_bs(processes()))
    learn = learner_for(dls, Doubled(model), recipe, CrossEntropyLossFlat(), [], cbs=[watch := Watch(), sync := Exchanges()])
    set_seed(5)
    with distributed(learn): fitted(learn)
    return [p.tolist() for p in model.parameters()], numbers(watch), sync.seen, list(map(float, learn.recorder.lrs)), learn.recorder.values[-1][0]


def test_repeated_paper_batches_in_parts_are_the_same_in_two_processes(tmp_path):
    "Two processes with two parts each, against one with six: the same steps, copies in turn to the one and the other."
    (tmp_path / "train.py").write_text("import json, os, sys\nfrom test_paper_recipe import shared_training\n"
                                       "open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}.json', 'w').write(json.dumps(shared_training(3)))\n")
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "train.py"), str(tmp_path)],
                          capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (w2, mine, sync2, lrs2, loss2), (_, theirs, *_) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    w1, seen, sync1, lrs1, loss1 = shared_training(2)
    assert max(np.abs(np.array(a) - b).max() for a, b in zip(w1, w2)) < 1e-12
    assert lrs1 == pytest.approx(lrs2, rel=1e-12) and len(lrs1) == 4 and loss1 == pytest.approx(loss2, rel=1e-6)
    assert sync2 == [False, True] * 4 and sync1 == [None] * 24
    order = sum(seen, [])
    assert all(len(set(order[i:i + 3])) == 1 for i in range(0, len(order), 3))
    assert (sum(mine, []), sum(theirs, [])) == (order[::2], order[1::2])


@pytest.mark.parametrize("f, words", [
    (lambda: Recipe(1, 64, 64, micro_bs=24), "micro_bs: the batch of 64 does not divide into parts of 24. Use 16 or 32, or another bs"),
    (lambda: change_recipe("paper", micro_bs=1000), "micro_bs: the batch of 2048 does not divide into parts of 1000. Use 512 or 1024"),
    (lambda: RECIPES["paper"].loader_bs(3), "bs: 2048 is not a multiple of 3, the number of processes that share each batch"),
    (lambda: Recipe(1, 64, 96, micro_bs=32).loader_bs(2), "micro_bs: the batch of 48, the share of one of 2 processes, does not divide into parts of 32. Use 24 or 48"),
    (lambda: change_recipe("paper", micro_bs=0), "micro_bs: expected a number above 0, got 0"),
    (lambda: change_recipe("paper", repeats=1.5), "repeats: expected a whole number, got 1.5"),
    (lambda: change_recipe("paper", drop_path=1.2), r"drop_path: expected a share in \[0, 1\), got 1.2"),
    (lambda: check_frozen(change_recipe("probe", repeats=3)), "repeats: with train frozen .* got 3. Leave repeats out"),
    (lambda: check_frozen(change_recipe("probe", micro_bs=8)), "micro_bs: with train frozen .* got 8. Leave micro_bs out"),
    (lambda: fitted(learner_for(numbered(20, 5), net(), Recipe(1, 4, 8, lr=1e-2, micro_bs=4), CrossEntropyLossFlat(), [])),
     "bs: 8 is not a multiple of 5, which the DataLoaders give at a time. Make them with bs=micro_bs"),
    (lambda: fitted(learner_for(numbered(20, 4), net(), Recipe(1, 4, 32, lr=1e-2, micro_bs=4), CrossEntropyLossFlat(), [])),
     r"bs: expected 1 to 20, the number of training pictures, got 32. Use a smaller bs \(--bs 5\)"),
    (lambda: get_recipe("paper", opt="timm-lam"), "opt: 'timm-lam' is unknown. Did you mean 'timm-lamb'?"),
])
def test_paper_settings_that_cannot_be_meant(f, words):
    with pytest.raises(BadInput, match=words): f()


def test_a_paper_batch_is_that_of_any_number_of_processes():
    r = get_recipe("paper", "avg", arch="patchconvnet_s60")
    assert [r.loader_bs(n) for n in (1, 8, 16, 64)] == [128, 128, 128, 32] and scale_up(r, 8) is r
    whole = replace(r, micro_bs=None)
    assert scale_up(whole, 4) == replace(whole, bs=4 * 2048, lr=2 * 3e-3) and whole.loader_bs(8) == 256


def test_recipe_learner_takes_a_paper_batch_larger_than_its_loaders(dls):
    learn = recipe_learner(dls, "xeca_resnext_tiny", "avg", "quick", bs=32, micro_bs=16, epochs=1, lr=1e-3, metrics=[])
    assert len(fitted(learn).recorder.lrs) == 1   # 48 pictures
    with pytest.raises(BadInput, match="bs: the DataLoaders decide it, got 32"): recipe_learner(dls, recipe="quick", bs=32)


def test_a_paper_recipe_goes_through_lr_find_and_export(dls, tmp_path):
    learn = learner_for(dls, column(), Recipe(1, 64, 32, lr=1e-3, opt="timm-lamb", repeats=3, micro_bs=16, precision="float32"), CrossEntropyLossFlat(), [])
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=40, show_plot=False)
    fitted(learn)
    learn.path = tmp_path
    learn.save("kept"), learn.load("kept")
    fitted(learn)
    twin = pickle.loads(pickle.dumps(learn.opt))
    assert [len(g["params"]) for g in twin.opt.param_groups] == [len(g["params"]) for g in learn.opt.opt.param_groups] and len(twin.weights) == len(learn.opt.weights)
