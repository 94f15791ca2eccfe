"What was made quicker computes what it did: augmentation, optimizers, channel attention, Mish."
import platform
import random
import subprocess
import sys
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from fastai.optimizer import Lamb, Lookahead, QHAdam, RMSProp, SGD
from fastai.vision.all import (
    Adam, aug_transforms, Hue, Learner, load_learner, OptimWrapper, RAdam, ranger, Saturation, TensorBBox, TensorImage, TensorMask, TensorPoint)
from fastxtend.vision.models.attention_modules import ECA as FastxtendECA
from fastxtend.vision.models.pooling import BlurPool
from fastxtend.vision.models.xresnet import ECAResNeXtBlock, XResNet
from skimage.data import astronaut, chelsea
from torch import nn

from attnpool import layers
from attnpool.choices import OPTIMIZERS
from attnpool.data.augment import AUGMENTS, Hues, Lights, Warps
from attnpool.layers import channel_attention, mish
from attnpool.models.xresnet import ECA, xeca_resnext_tiny
from attnpool.optimizers import quick, QuickAdam
from attnpool.registry import BadInput

LAST = torch.channels_last
ROWS = dict(blog=dict(max_rotate=20), petals=dict(flip_vert=True, max_rotate=45))


# Augmentation of a batch

def photos(n=6, h=48, w=64):
    both = [torch.tensor(np.array(im)[:300, :400]).permute(2, 0, 1)[None].float() for im in (chelsea(), astronaut())]
    both = [nn.functional.interpolate(im, (h, w), mode="area").round() / 255 for im in both]
    return TensorImage(torch.cat([both[i % 2] for i in range(n)]))


def fastais(row): return aug_transforms(max_zoom=1, **ROWS[row], xtra_tfms=[Hue(), Saturation()])


def drawn(seed, transform, x, split_idx=0):
    torch.manual_seed(seed), random.seed(seed)
    return transform(x.clone(), split_idx=split_idx), (torch.get_rng_state().tolist(), random.getstate())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("size", [(64, 64), (48, 64), (33, 20)])
def test_speed_of_augmentation_changes_no_draw_and_no_pixel(row, size):
    "Warps to 5e-5 of the range, colours to 2e-6; the same random numbers, in the same order."
    theirs, ours = fastais(row), AUGMENTS[row].batch()
    assert [type(t) for t in ours] == [Warps, Lights, Hues] and [t.order for t in ours] == [t.order for t in theirs]
    moved = 0
    for seed in range(8):
        x = photos(6, *size)
        for t, u, most in zip(theirs, ours, (5e-5, 2e-6, 2e-6)):
            (a, after), (b, after_ours) = drawn(seed, t, x), drawn(seed, u, x)
            assert after == after_ours and type(b) is TensorImage and b.shape == x.shape
            assert (a - b).abs().max() < most, type(u).__name__
            moved, x = moved + (a - x).abs().mean().item(), a
    assert moved > .5   # they did change the photos


def test_speed_of_augmentation_at_grey_black_and_white():
    x = TensorImage(torch.tensor([0., .5, 1.]).view(3, 1, 1, 1).repeat(1, 3, 8, 8))
    x[1, 0] += .25   # and a pure red
    for seed in range(5):
        for t, u in zip(fastais("blog"), AUGMENTS["blog"].batch()):
            a, b = drawn(seed, t, x)[0], drawn(seed, u, x)[0]
            assert b.isfinite().all() and (a - b).abs().max() < 5e-6


def test_speed_of_augmentation_leaves_validation_as_it_is():
    x = photos()
    for t, u in zip(fastais("blog"), AUGMENTS["blog"].batch()):
        (a, after), (b, after_ours) = drawn(1, t, x, split_idx=1), drawn(1, u, x, split_idx=1)
        assert torch.equal(b, x) and (a - b).abs().max() < 1e-4 and after == after_ours


@pytest.mark.parametrize("target", [
    TensorMask(torch.arange(6 * 48 * 64).view(6, 48, 64) % 7), TensorPoint(torch.rand(6, 5, 2) * 2 - 1, img_size=(64, 48)),
    TensorBBox(torch.tensor([[[-.5, -.5, .2, .3]]]).repeat(6, 1, 1), img_size=(64, 48))], ids=["mask", "points", "boxes"])
def test_speed_of_augmentation_moves_masks_points_and_boxes_along(target):
    "A mask goes where its picture goes: what fastai can do with them is left."
    (_, a), (_, b) = (both(t, target) for t in (fastais("blog")[0], AUGMENTS["blog"].batch()[0]))
    assert type(a) is type(b) and torch.equal(a, b) and not torch.equal(a.float(), target.float())


def both(transform, target):
    torch.manual_seed(4)
    return transform((photos(), target.clone()), split_idx=0)


def test_speed_of_augmentation_for_any_number_of_pictures():
    for n in (1, 2, 5): assert AUGMENTS["blog"].batch()[0](photos(n), split_idx=0).shape[0] == n
    for t in AUGMENTS["blog"].batch(): assert drawn(0, t, photos(9, 200, 190))[0].shape == (9, 3, 200, 190)


def test_speed_of_augmentation_for_pictures_that_lie_otherwise():
    "Pixels in columns, channels last, a part of a larger batch: whatever is written to is what comes out."
    x = photos(4, 48, 64)
    lying = x.transpose(2, 3).contiguous().transpose(2, 3), x.contiguous(memory_format=LAST), photos(8, 48, 64)[::2]
    for t in AUGMENTS["blog"].batch():
        for other in lying:
            torch.manual_seed(2), random.seed(2)
            a = t(x if other is not lying[2] else other.clone().contiguous(), split_idx=0)
            torch.manual_seed(2), random.seed(2)
            assert (t(other, split_idx=0) - a).abs().max() < 1e-6, type(t).__name__


# Optimizers

def network(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Mish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return net.to(dtype).to(memory_format=LAST), torch.randn(16, 3, 9, 9).to(dtype)


def train(make, dtype=torch.float64, steps=50, start=0, state=None, net=None, **options):
    if net is None: net, x = network(dtype)
    else: x = network(dtype)[1]
    opt = make([[*net[0].parameters()], [*net[1:].parameters()]], lr=slice(1e-3, 1e-2), **options)
    if state: opt.load_state_dict(deepcopy(state))
    else:
        for p in net[1].parameters(): opt.state[p]["do_wd"] = False   # as a Learner does for norms and biases
    for i in range(start, start + steps):
        net(x).square().mean().backward()
        opt.set_hyper("lr", slice(1e-3 / (1 + .1 * i), 1e-2 / (1 + .1 * i)))
        opt.step(), opt.zero_grad()
    return net, opt


def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("options", [{}, dict(wd=.1), dict(wd=.1, decouple_wd=False), dict(mom=.8, sqr_mom=.999, eps=1e-3), dict(beta=50.)], ids=str)
@pytest.mark.parametrize("make", [ranger, RAdam, Adam])
def test_speed_of_the_optimizer_gives_fastais_numbers(make, options):
    "Groups, rates by group, a schedule, norms without decay; fifty steps, the first ones without the second moment."
    if make is Adam and "beta" in options: pytest.skip("RAdam's alone")
    (theirs, a), (ours, b) = train(make, **options), train(partial(quick, make), **options)
    assert (weights(theirs) - weights(ours)).abs().max() < 1e-12 and (weights(ours) - weights(network()[0])).abs().max() > .005
    assert isinstance(getattr(b, "opt", b), QuickAdam) and isinstance(b, Lookahead) == (make is ranger)
    for s, t in zip(a.state_dict()["state"], b.state_dict()["state"]):
        assert s.keys() == t.keys() and s["step"] == t["step"] == 50 and torch.allclose(s["sqr_avg"], t["sqr_avg"], rtol=1e-11, atol=1e-20)


@pytest.mark.parametrize("first, second", [(ranger, partial(quick, ranger)), (partial(quick, ranger), ranger), (partial(quick, ranger),) * 2])
def test_speed_of_the_optimizer_reads_and_writes_fastais_state(first, second):
    "A training that changes hands after twenty steps ends where one goes that did not."
    net, opt = train(first, steps=20)
    net, _ = train(second, steps=30, start=20, state=opt.state_dict(), net=net)
    straight = weights(train(ranger)[0])
    assert (weights(net) - straight).abs().max() < 1e-12


def test_speed_of_the_optimizer_goes_on_bit_by_bit():
    net, opt = train(partial(quick, ranger), torch.float32, steps=20)
    net, _ = train(partial(quick, ranger), torch.float32, steps=30, start=20, state=opt.state_dict(), net=net)
    assert torch.equal(weights(net), weights(train(partial(quick, ranger), torch.float32)[0]))


def test_speed_of_the_optimizer_with_weights_of_any_layout():
    "torch's one operation goes through memory, so it must not run where a gradient lies otherwise than its weight."
    found = []
    for make in (ranger, partial(quick, ranger)):
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(4, 6, 3, 3, dtype=torch.float64).to(memory_format=LAST))
        q = nn.Parameter(torch.randn(5, 4, dtype=torch.float64).T)
        opt = make([p, q], lr=1e-2)
        for _ in range(20):
            p.grad, q.grad = torch.randn(4, 6, 3, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
            opt.step()
        found.append(torch.cat([p.detach().flatten(), q.detach().flatten()]))
    assert (found[0] - found[1]).abs().max() < 1e-12


def test_speed_of_the_optimizer_leaves_what_is_frozen_and_can_begin_anew():
    net, x = network()
    opt = quick(ranger, [[*net[0].parameters()], [*net[1:].parameters()]], lr=1e-2)
    opt.freeze()
    before = net[0].weight.clone()
    net(x).square().mean().backward()
    opt.step()
    assert torch.equal(net[0].weight, before) and opt.state[net[0].weight] == {}
    opt.clear_state()
    assert opt.count == 0 and all("step" not in s for s in opt.state.values())
    with pytest.raises(NotImplementedError, match="closure"): opt.opt.step(lambda: 0)


@pytest.mark.parametrize("make", [SGD, Lamb, QHAdam, RMSProp, partial(OptimWrapper, opt=torch.optim.AdamW)], ids="SGD Lamb QHAdam RMSProp AdamW".split())
def test_speed_of_the_optimizer_is_for_adams_alone(make):
    "Another would take Adam's steps, and nobody would see it."
    with pytest.raises(BadInput, match="make: expected fastai's Adam, RAdam or ranger, got "): quick(make, [nn.Parameter(torch.ones(2))], lr=1e-3)


def test_speed_of_the_optimizer_with_complex_weights():
    found = []
    for make in (ranger, partial(quick, ranger)):
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
        opt = make([p], lr=1e-2)
        for _ in range(12):
            p.grad = torch.randn_like(p)
            opt.step()
        found.append(p.detach())
    assert (found[0] - found[1]).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["ranger", "adam"])
def test_speed_of_the_optimizer_in_a_learner_that_is_saved_and_exported(dls, tmp_path, name):
    "Rates change, weights are saved with the optimizer's state, and the Learner is pickled."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(256, 10))
    learn = Learner(dls, net, opt_func=OPTIMIZERS[name], path=tmp_path, lr=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    learn.save("one", with_opt=True)
    kept = [s["grad_avg"].clone() for s in learn.opt.state_dict()["state"]]
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.load("one", with_opt=True)
    assert all(torch.equal(k, s["grad_avg"]) for k, s in zip(kept, learn.opt.state_dict()["state"]))
    learn.export("it.pkl")
    again = load_learner(tmp_path/"it.pkl")
    assert again.opt_func.args == (dict(ranger=ranger, adam=Adam)[name],)


# Layers

def layouts(c=6, dtype=torch.float64):
    x = torch.randn(3, c, 5, 4, dtype=dtype)
    return dict(contiguous=x, channels_last=x.to(memory_format=LAST), turned=torch.randn(3, 4, 5, c, dtype=dtype).transpose(1, 3),
                sliced=torch.randn(3, 2 * c, 5, 4, dtype=dtype)[:, ::2], vectors=torch.randn(3, c, 1, 1, dtype=dtype), none=x[:0])


@pytest.mark.parametrize("layout", layouts())
def test_speed_of_channel_attention_gives_fastxtends_numbers(layout):
    x = layouts()[layout].requires_grad_()
    theirs, ours = FastxtendECA(6, ks=5).double(), ECA(6, ks=5).double()
    ours.load_state_dict(theirs.state_dict())
    a, b = theirs(x), ours(x)
    for g in (torch.randn_like(a), torch.randn(a.shape, dtype=a.dtype), torch.ones_like(a[:, :1]).expand_as(a)):
        of_theirs, of_ours = (torch.autograd.grad(y, (x, m.conv.weight), g, retain_graph=True) for y, m in ((a, theirs), (b, ours)))
        for s, t in zip((a, *of_theirs), (b, *of_ours)): assert torch.allclose(s, t, rtol=1e-12, atol=1e-13)
    if layout != "turned": assert b.stride() == a.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_speed_of_channel_attention_has_first_and_second_derivatives(layout):
    x, w = layouts()[layout].requires_grad_(), torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(channel_attention, (x, w)) and torch.autograd.gradgradcheck(channel_attention, (x, w))
    assert torch.autograd.gradcheck(partial(channel_attention, weight=w.detach()), (x,))
    each = torch.autograd.grad(channel_attention(x, w), x, torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape), is_grads_batched=True)[0]
    assert torch.allclose(each[7], torch.autograd.grad(channel_attention(x, w).flatten()[7], x)[0], atol=1e-14)


def test_speed_of_channel_attention_calls_what_somebody_watches():
    e, seen, x = ECA(8), [], torch.randn(2, 8, 4, 4)
    plain = e(x)
    hook = e.sigmoid.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    assert torch.allclose(e(x), plain, atol=1e-6) and seen == [(2, 8, 1, 1)]
    hook.remove()
    e.sigmoid, e.conv = nn.Hardsigmoid(), nn.Conv1d(1, 1, 3, padding=1)   # somebody's change
    assert torch.equal(e(x), FastxtendECA.forward(e, x))
    for change in (dict(padding_mode="circular"), dict(dilation=2, padding=2), dict(groups=1, padding=1)):
        e.sigmoid, e.conv = nn.Sigmoid(), nn.Conv1d(1, 1, 3, bias=False, **dict(padding=1) | change)
        assert torch.allclose(e(x), FastxtendECA.forward(e, x), atol=1e-6), change
    e = ECA(8)
    plain = e(x)
    with torch.autocast("cpu", torch.bfloat16): half = e(x.bfloat16())
    assert half.dtype == FastxtendECA.forward(e, x.bfloat16().float()).bfloat16().dtype and (half.float() - plain).abs().max() < .1


def test_speed_of_the_body_changes_neither_names_nor_numbers():
    "fastxtend's network with torch's Mish, beside ours: names, outputs and gradients."
    torch.manual_seed(0)
    theirs = nn.Sequential(*XResNet(ECAResNeXtBlock, 4, [1, 1, 1], n_out=5, block_szs=[64, 128, 256], widen=.25, act_cls=nn.Mish,
                                    stem_szs=[16, 16, 32], stem_pool=lambda **kwargs: nn.Identity(), block_pool=BlurPool)).double()
    ours = xeca_resnext_tiny(5).double()
    assert [*ours.state_dict()] == [*theirs.state_dict()] and sum(type(m) is ECA for m in ours.modules()) == 3
    ours.load_state_dict(theirs.state_dict())
    x, y = torch.randn(4, 3, 40, 32, dtype=torch.float64), torch.arange(4)
    for layout in (torch.contiguous_format, LAST):
        found = []
        for net in (theirs, ours):
            net.to(memory_format=layout), net.zero_grad()
            out = net(x.to(memory_format=layout))
            nn.functional.cross_entropy(out, y).backward()
            found.append([out.detach(), *(p.grad for p in net.parameters())])
        for a, b in zip(*found): assert (a - b).abs().max() <= 1e-12 * max(1, a.abs().max())


def test_speed_of_the_body_is_no_matter_where_it_is_traced():
    net, x = xeca_resnext_tiny(3).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(): out = net(x)
    assert torch.allclose(torch.export.export(net, (x,)).module()(x), out, atol=1e-5)
    assert torch.allclose(torch.compile(net, backend="eager")(x), out, atol=1e-5)
    assert torch.allclose(torch.jit.trace(net, x)(x), out, atol=1e-5)


def test_speed_of_mish_keeps_the_slope_of_small_maps(monkeypatch):
    def kept(x):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t): y = mish(x)
        return y, found
    x, g = torch.randn(2, 6, 5, 4).to(memory_format=LAST).requires_grad_(), torch.randn(2, 6, 5, 4)
    y, (own, slope) = kept(x)
    exact = torch.autograd.grad(nn.functional.mish(x.double()).sum(), x)[0]
    assert own.data_ptr() == x.data_ptr() and slope.stride() == x.stride() and torch.allclose(slope, exact, atol=1e-6)
    from_slope, = torch.autograd.grad(y, x, g)
    monkeypatch.setattr(layers, "_MISH_SLOPE", x.numel() - 1)
    y, found = kept(x)
    assert [t.data_ptr() for t in found] == [x.data_ptr()] and torch.equal(torch.autograd.grad(y, x, g)[0], from_slope)
    monkeypatch.undo()
    for other in (x.detach(), x.detach().bfloat16().requires_grad_()): assert len(kept(other)[1]) <= 1   # nobody asks; two roundings


# Memory

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own")
@pytest.mark.parametrize("limit", ["unlimited", "6000000"])   # KB of addresses
def test_speed_freed_tensors_of_any_size_stay(limit):
    "After a few rounds the system hands out no page for tensors of 64 MB; where addresses are few, no error."
    code = """
import resource, torch
from attnpool.runs.workers import keep_memory
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for n in (24, 20, 24): assert torch.ones(1 << n).sum() == 1 << n
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = pages(), pages()
keep_memory(), keep_memory()
after = [pages() for _ in range(8)]
print(before[1], after[-1])
"""
    command = ["bash", "-c", f'ulimit -v {limit}; exec "$0" -W ignore -c "$1"', sys.executable, code]
    before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert before > 4096 and after < before / 16
