"The callbacks in fastai's training loop: labels, losses, augmentations, and that everything is as before afterwards."
import inspect
import pickle
import random
import socket
import subprocess
import sys
import textwrap
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.training import GradientAccumulation
from fastai.data.all import DataLoader, DataLoaders, Normalize, Pipeline, TfmdDL, Transform
from fastai.vision.all import (BCEWithLogitsLossFlat, Callback, CancelBatchException, CancelFitException, CrossEntropyLossFlat, FocalLossFlat,
                               IntToFloatTensor, LabelSmoothingCrossEntropyFlat, Learner, MSELossFlat, RandTransform, SGD, TensorCategory, TensorImage,
                               TensorMask, TensorMultiCategory, aug_transforms)
from scipy import stats
from torch import nn

from attnpool.callback.cutmixup import CutMixUp, CutMixUpAugment, knows_reduction, RawBatches, stacked_loss
from attnpool.callback.precision import MixedPrecision
from attnpool.mixing import REST
from test_mixing import NoAsking, NoSync

C = 4   # classes; the picture of class i is 1 in channel i and 0 in the others, so its mean over the pixels is its label


class Items:
    "Picture and target by index."
    def __init__(self, n, size=(6, 8), target='index', dtype=torch.float32, inputs=1):
        self.n, self.size, self.target, self.dtype, self.inputs = n, size, target, dtype, inputs
    def __len__(self): return self.n
    def __getitem__(self, i):
        k = i % C
        x = torch.zeros(C, *self.size, dtype=self.dtype)
        x[k] = 1
        y = dict(index=lambda: TensorCategory(torch.tensor(k)), onehot=lambda: TensorMultiCategory(F.one_hot(torch.tensor(k), C).float()),
                 binary=lambda: TensorCategory(torch.tensor(k % 2)), number=lambda: torch.tensor(k / C), mask=lambda: TensorMask(torch.zeros(self.size)),
                 text=lambda: 'cat')[self.target]()
        return (*((x * (j + 1)).as_subclass(TensorImage) for j in range(self.inputs)), y)   # TensorImage() makes float64 float32


def make_dls(n=32, bs=8, tfms=(), n_valid=8, shuffle=True, drop_last=False, **kw):
    train, valid = Items(n, **kw), Items(n_valid, **kw)
    train.split_idx, valid.split_idx = 0, 1
    common = dict(bs=bs, num_workers=0, after_batch=list(tfms), device=torch.device('cpu'))
    dls = DataLoaders(TfmdDL(train, shuffle=shuffle, drop_last=drop_last, **common), TfmdDL(valid, **common), device=torch.device('cpu'))
    dls.c, dls.vocab = C, list('abcd')
    dls.n_inp = kw.get('inputs', 1)
    return dls


class Net(nn.Module):
    def __init__(self, n_out=C, dtype=torch.float32):
        super().__init__()
        self.lin = nn.Linear(C, n_out, dtype=dtype)
    def forward(self, *xs): return self.lin(sum(x.mean((2, 3)) for x in xs))


def make_learn(dls, loss=None, net=None, **kw):
    torch.manual_seed(1)
    learn = Learner(dls, net or Net(), loss_func=loss or CrossEntropyLossFlat(), opt_func=SGD, lr=.1, **kw)
    learn.create_mbar = False
    return learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else learn


class Probe(Callback):
    "Keeps what the network and the loss got."
    order = 1
    def before_fit(self): self.batches, self.losses, self.valid = [], [], []
    def before_batch(self):
        cb = self.mixer()
        if self.training: self.batches.append((self.xb, self.yb, cb.yb1, cb.lam))
    def after_loss(self): (self.losses if self.training else self.valid).append(self.learn.loss.detach().item())
    def mixer(self): return next(cb for cb in self.learn.cbs if isinstance(cb, CutMixUp))


def fit(dls, cb, epochs=1, cbs=(), loss=None, net=None, lr=.1, **kw):
    learn, probe = make_learn(dls, loss, net), Probe()
    with learn.no_logging(): learn.fit(epochs, lr, cbs=[cb, probe, *cbs], **kw)
    return learn, probe


CALLBACKS = [CutMixUp, CutMixUpAugment]


def test_arguments_are_those_of_fastxtend():
    fastxtend = dict(mix_alpha=.4, cut_alpha=1., mixup_ratio=1, cutmix_ratio=1, augment_ratio=1, augment_finetune=None, cutmix_uniform=True, cutmixup_augs=None,
                     element=True, interp_label=None)
    ours = inspect.signature(CutMixUpAugment).parameters
    assert list(ours)[:len(fastxtend)] == list(fastxtend) and all(ours[k].default == v for k, v in fastxtend.items())
    assert list(inspect.signature(CutMixUp).parameters)[:7] == ['mix_alpha', 'cut_alpha', 'mixup_ratio', 'cutmix_ratio', 'cutmix_uniform', 'element', 'interp_label']


@pytest.mark.parametrize("target", ['index', 'onehot'])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("element", [True, False])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_labels_are_the_pixels(callback, element, uniform, target):
    dls = make_dls(1000, 250, target=target, dtype=torch.float64)
    kinds = set()
    for seed in range(3):
        _, probe = fit(dls, callback(element=element, cutmix_uniform=uniform, seed=seed), 1, net=Net(dtype=torch.float64), loss=BCEWithLogitsLossFlat() if target == 'onehot' else None)
        for (x,), (y,), y1, lam in probe.batches:
            y = F.one_hot(y.as_subclass(torch.Tensor), C) if target == 'index' else y.as_subclass(torch.Tensor)
            if lam is None: y1, lam = y, torch.ones(len(y))
            else: y1 = F.one_hot(y1[0].as_subclass(torch.Tensor), C) if target == 'index' else y1[0].as_subclass(torch.Tensor)
            label = lam[:, None] * y + (1 - lam[:, None]) * y1
            assert (x.as_subclass(torch.Tensor).mean((2, 3)) - label).abs().max() < 1e-12
            kinds |= set((lam < 1).tolist())
    assert True in kinds


class Smooth(nn.Module):
    "A loss of one's own with y_int and reduction."
    y_int = True
    def __init__(self, reduction='mean'):
        super().__init__()
        self.reduction = reduction
    def forward(self, pred, targ): return F.cross_entropy(pred, targ, reduction=self.reduction) * 2


def smoothed(pred, label, eps=.1): return -((1 - eps) * label + eps / C) * pred.log_softmax(1)


LOSSES = dict(   # loss, target, what it should be for label weights: one number per sample
    ce=(CrossEntropyLossFlat, 'index', lambda p, t: -(t * p.log_softmax(1)).sum(1)), ce_sum=(lambda: CrossEntropyLossFlat(reduction='sum'), 'index', None),
    smoothing=(LabelSmoothingCrossEntropyFlat, 'index', lambda p, t: smoothed(p, t).sum(1)),
    torch_ce=(nn.CrossEntropyLoss, 'index', lambda p, t: -(t * p.log_softmax(1)).sum(1)),
    torch_smoothing=(lambda: nn.CrossEntropyLoss(label_smoothing=.1), 'index', lambda p, t: smoothed(p, t).sum(1)),
    function=(lambda: F.cross_entropy, 'index', lambda p, t: -(t * p.log_softmax(1)).sum(1)),
    own=(Smooth, 'index', lambda p, t: -2 * (t * p.log_softmax(1)).sum(1)),
    ce_soft=(lambda: CrossEntropyLossFlat(flatten=False), 'onehot', lambda p, t: -(t * p.log_softmax(1)).sum(1)),
    bce=(BCEWithLogitsLossFlat, 'onehot', lambda p, t: F.binary_cross_entropy_with_logits(p, t, reduction='none').mean(1)))


@pytest.mark.parametrize("interp", [None, True, False])
@pytest.mark.parametrize("element", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_against_an_independent_formula(name, element, interp):
    make, target, due = LOSSES[name]
    loss = make()
    net = Net()
    dls = make_dls(20, 8, target=target)
    preds, cb = [], CutMixUpAugment(element=element, interp_label=interp, mix_alpha=1., seed=3)
    class Pred(Callback):
        order = 2
        def after_pred(self):
            if self.training: preds.append(self.pred.detach().as_subclass(torch.Tensor))
    learn, probe = fit(dls, cb, 2, [Pred()], loss, net, lr=0.)
    assert len(preds) == len(probe.losses) == 6
    for pred, ((x,), *_), got in zip(preds, probe.batches, probe.losses):
        label = x.as_subclass(torch.Tensor).mean((2, 3))
        each = (due or LOSSES['ce'][2])(pred, label)
        assert got == pytest.approx((each.sum() if name == 'ce_sum' else each.mean()).item(), rel=1e-5)
    with torch.no_grad():
        x, y = (t.as_subclass(torch.Tensor) for t in dls.valid.one_batch())
        plain = loss(net(x), y).item()
    assert probe.valid == pytest.approx([plain, plain], rel=1e-6)   # validation asks the plain loss
    assert learn.loss_func is loss and getattr(loss, 'reduction', 'mean') == ('sum' if name == 'ce_sum' else 'mean')


def test_focal_loss_is_stacked_and_numbers_are_blended():
    _, probe = fit(make_dls(), CutMixUp(seed=0), loss=FocalLossFlat())
    assert np.isfinite(probe.losses).all()
    for loss, target, net in ((MSELossFlat(), 'number', Net(1)), (BCEWithLogitsLossFlat(), 'binary', Net(1)), (BCEWithLogitsLossFlat(), 'number', Net(1))):
        _, probe = fit(make_dls(target=target), CutMixUp(seed=0), loss=loss, net=net)
        assert np.isfinite(probe.losses).all()
    pred, y, y1, lam = torch.randn(5, 1), torch.tensor([0, 1, 1, 0, 1]), torch.tensor([1, 1, 0, 0, 1]), torch.rand(5)
    blended = F.binary_cross_entropy_with_logits(pred[:, 0], lam * y + (1 - lam) * y1)
    assert torch.allclose(stacked_loss(BCEWithLogitsLossFlat(), pred, (y,), (y1,), lam), blended)


def test_one_output_blends_its_target_as_a_number():
    seen = []
    def loss(pred, targ, reduction='mean'):
        seen.append(targ)
        return F.binary_cross_entropy_with_logits(pred[:, 0], targ.float(), reduction=reduction)
    fit(make_dls(target='binary', n_valid=8), CutMixUp(seed=0), loss=loss, net=Net(1))
    assert any(((0 < t) & (t < 1)).any() for t in seen) and all(t.ndim == 1 for t in seen)


class Mark(RandTransform):
    "An augmentation that shows: adds 100. Order 30: after IntToFloat, before Normalize."
    order = 30
    def encodes(self, x: TensorImage): return x + 100


class Kept(Transform):
    "Not random, also for validation: adds 10."
    order = 20
    def encodes(self, x: TensorImage): return x + 10


NORM = Normalize.from_stats([.5] * C, [2.] * C, cuda=False)


@pytest.mark.parametrize("element", [True, False])
def test_only_the_rest_is_augmented(element):
    dls = make_dls(400, 100, tfms=[Mark(), Kept(), NORM])
    before = list(dls.train.after_batch.fs)
    counts = np.zeros(2)
    for seed in range(4):
        learn, probe = fit(dls, CutMixUpAugment(element=element, seed=seed, mixup_ratio=1, cutmix_ratio=1, augment_ratio=2, mix_alpha=8.))
        for (x,), (y,), y1, lam in probe.batches:
            pixels = x * 2 + .5
            augmented = pixels.mean((1, 2, 3)) > 100
            expected = torch.where(augmented, 110., 10.).as_subclass(torch.Tensor)
            assert torch.allclose(pixels.as_subclass(torch.Tensor).amin((1, 2, 3)), expected, atol=1e-3)
            own = (pixels - expected[:, None, None, None]).as_subclass(torch.Tensor).mean((2, 3))
            due = F.one_hot(y.as_subclass(torch.Tensor), C).float()
            if lam is not None:
                assert (lam[augmented] == 1).all()
                due = lam[:, None] * due + (1 - lam)[:, None] * F.one_hot(y1[0].as_subclass(torch.Tensor), C)
            assert torch.allclose(own, due, atol=1e-4)
            counts += [augmented.sum().item(), (~augmented).sum().item()]
    if element: assert stats.chisquare(counts).pvalue > .01
    assert all(a is b for a, b in zip(before, dls.train.after_batch.fs)) and len(before) == len(dls.train.after_batch.fs)
    assert probe.valid and (dls.valid.one_batch()[0] * 2 + .5).max() < 12   # validation: kept and normalised, not marked
    assert (dls.train.one_batch()[0] * 2 + .5).min() > 100                  # outside of a fit the DataLoader augments as ever


@pytest.mark.parametrize("element", [True, False])
def test_kinds_are_drawn_per_sample_or_per_batch(element):
    seen, cb = [], CutMixUpAugment(element=element, seed=0)
    class Kinds(Probe):
        def before_batch(self):
            if self.training: seen.append(set((self.x.as_subclass(torch.Tensor).amin((1, 2, 3)) >= 100).tolist()))
    dls = make_dls(480, 8, tfms=[Mark()])
    draws, real = [], cb._draw_kinds
    def spy(xb): draws.append(real(xb)); return draws[-1]
    cb._draw_kinds = spy
    with (learn := make_learn(dls)).no_logging(): learn.fit(1, .1, cbs=[cb, Kinds()])
    assert len(seen) == len(draws) == 60
    for marked, kinds in zip(seen, draws): assert marked == {k == REST for k in kinds.tolist()}   # what is drawn is done
    kinds_per_batch = [len(set(k.tolist())) for k in draws]
    assert max(kinds_per_batch) == (3 if element else 1)
    if not element: assert stats.chisquare(np.bincount([k[0] for k in draws], minlength=3)).pvalue > .01


def test_raw_batches_is_what_it_says():
    dls = make_dls(24, 8, tfms=[Mark(), NORM])
    dl, view = dls.train, RawBatches(dls.train)
    assert type(view).__mro__[:3] == (type(view), RawBatches, TfmdDL) and view.__class__ is type(view) and isinstance(view, DataLoader)
    assert len(view) == 3 and view.dataset is dl.dataset and view.bs == 8
    random.seed(0)
    dl.rng.seed(3)
    raw = [x for x, _ in view]
    state = dl.rng.getstate()
    dl.rng.seed(3)
    whole = [x for x, _ in dl]
    assert dl.rng.getstate() == state   # the same order, and the loader goes on as if it had been asked itself
    for r, w in zip(raw, whole): assert torch.allclose((r + 100 - .5) / 2, w, atol=1e-5)
    for batch in iter(view): assert torch.equal(dl.after_batch(batch[:1])[0], dl.after_batch(batch[:1])[0]); break   # left in the middle
    assert (dl.one_batch()[0] * 2 + .5).min() > 99 and view.one_batch()[0].max() == 1
    assert type(view.new(shuffle=False)) is TfmdDL and pickle.loads(pickle.dumps(view)).one_batch()[0].max() == 1


def test_shares_and_lambdas_in_a_fit():
    dls = make_dls(1920, 64)
    cb = CutMixUpAugment(mixup_ratio=2, cutmix_ratio=1, augment_ratio=3, mix_alpha=.4, cutmix_uniform=False, seed=0)
    kinds, lams, real = [], [], cb.mix_batch
    def spy(xb, yb, k):
        out = real(xb, yb, k)
        kinds.append(k)
        lams.append(out[2].numpy())
        return out
    cb.mix_batch = spy
    fit(dls, cb)
    kinds, lams = np.concatenate(kinds), np.concatenate(lams)
    assert stats.chisquare(np.bincount(kinds, minlength=3), np.array([2, 1, 3]) / 6 * len(kinds)).pvalue > .01
    beta = stats.beta(.4, .4)
    assert stats.kstest(lams[kinds == 0], lambda v: beta.cdf(v) - beta.cdf(1 - v)).pvalue > .01
    assert (lams[kinds == 2] == 1).all() and lams[kinds == 0].min() >= .5


def test_size_of_the_augmentations_is_that_of_all():
    for kw in (dict(size=5), dict(size=(4, 9)), dict(size=5, min_scale=.5)):
        dls = make_dls(32, 8, tfms=[*aug_transforms(**kw, max_warp=.1), NORM], size=(8, 8))
        want = (5, 5) if kw['size'] == 5 else (4, 9)
        for element in (True, False):
            _, probe = fit(dls, CutMixUpAugment(element=element, seed=1), 2)
            assert all(x.shape[-2:] == want for (x,), *_ in probe.batches)
    dls = make_dls(8, 8, tfms=[*aug_transforms(size=5), NORM], size=(8, 8), shuffle=False, n_valid=8)
    _, probe = fit(dls, CutMixUpAugment(augment_ratio=0, mix_alpha=0, cut_alpha=0))
    assert torch.allclose(probe.batches[0][0][0], dls.valid.one_batch()[0], atol=1e-6)   # unmixed, they are what validation sees


def test_uint8_pictures_become_floats():
    class Bytes(Items):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return TensorImage((x * 255).byte()), y
    dls = make_dls(16, 8, tfms=[IntToFloatTensor(), *aug_transforms(), NORM])
    dls.train.dataset.__class__ = dls.valid.dataset.__class__ = Bytes
    for element in (True, False): _, probe = fit(dls, CutMixUpAugment(element=element), 2)
    x = torch.cat([x for (x,), *_ in probe.batches])
    assert x.dtype == torch.float32 and -.26 < x.min() and x.max() < .26


def test_augmentations_of_the_mixed():
    dls = make_dls(32, 8, tfms=[Mark(), NORM])
    class Small(RandTransform):
        order = 30
        def encodes(self, x: TensorImage): return x + 50
    _, probe = fit(dls, CutMixUpAugment(cutmixup_augs=[Small()], augment_ratio=1, seed=0), 3)
    pixels = torch.cat([x * 2 + .5 for (x,), *_ in probe.batches]).as_subclass(torch.Tensor).mean((1, 2, 3))
    assert {round(v) for v in pixels.tolist()} == {50, 100}
    with pytest.raises(ValueError, match="cutmixup_augs: there is a Normalize"): CutMixUpAugment(cutmixup_augs=[NORM])
    dls = make_dls(32, 8, tfms=aug_transforms(size=5), size=(8, 8))
    for augs in (aug_transforms(size=5), aug_transforms()):
        _, probe = fit(dls, CutMixUpAugment(cutmixup_augs=augs, seed=0))
        assert all(x.shape[-1] == 5 for (x,), *_ in probe.batches)


def mixing_batches(probe): return [lam is not None for *_, lam in probe.batches]


@pytest.mark.parametrize("finetune, epochs, mixing", [(None, 4, 16), (0, 4, 16), (1, 4, 12), (3, 4, 4), (4, 4, 0), (.25, 4, 12), (.5, 1, 2), (1.5, 2, 2), (.1, 10, 36)])
def test_augment_finetune_in_epochs_or_as_a_share(finetune, epochs, mixing):
    dls, cb = make_dls(32, 8), CutMixUpAugment(augment_ratio=0, augment_finetune=finetune)
    learn, probe = make_learn(dls), Probe()
    for _ in range(2):   # the same in the second fit
        with learn.no_logging(): learn.fit(epochs, .1, cbs=[cb, probe])
        assert mixing_batches(probe) == [True] * mixing + [False] * (4 * epochs - mixing)
    assert cb.augment_finetune == finetune


class Break(Callback):
    "Raises at an event of the second training batch."
    order = 70
    def __init__(self, event, error):
        self.event, self.error = event, error
        setattr(self, event, self.act)
    def act(self):
        if not self.event.endswith('batch') or self.training and self.iter == 1: raise self.error


def state(learn): return [learn.dls.train.after_batch, *learn.dls.train.after_batch.fs, learn.dls.valid.after_batch, learn.loss_func, *learn.cbs, learn.dls.train, learn.model]


@pytest.mark.parametrize("where", ['fit', 'learner'])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError('x'), CancelFitException(), CancelBatchException()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("event", ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'after_batch', 'after_train', 'before_validate'])
@pytest.mark.parametrize("loss", [CrossEntropyLossFlat(), nn.CrossEntropyLoss()], ids=['stacked', 'blended'])
def test_everything_is_as_before(event, error, where, loss):
    if isinstance(error, CancelBatchException) and event not in ('before_batch', 'after_pred', 'after_loss'): pytest.skip("caught nowhere else")
    dls = make_dls(32, 8, tfms=[Mark(), NORM])
    mixer = CutMixUpAugment(seed=0)
    learn = make_learn(dls, loss, cbs=mixer if where == 'learner' else None)
    before = state(learn)
    with learn.no_logging(), suppress(KeyboardInterrupt, RuntimeError):
        learn.fit(2, .1, cbs=([] if where == 'learner' else [mixer]) + [Break(event, error)])
    after = state(learn)
    assert len(before) == len(after) and all(a is b for a, b in zip(before, after))
    assert getattr(loss, 'reduction') == 'mean'
    probe = Probe()
    with learn.no_logging(): learn.fit(1, .1, cbs=[probe] + ([] if where == 'learner' else [mixer]))   # and the next fit is a whole one
    assert len(probe.batches) == 4 and any(mixing_batches(probe))
    assert learn.validate()[0] == pytest.approx(probe.valid[0])
    assert (dls.train.one_batch()[0] * 2 + .5).min() > 99


class Loses(nn.Module):
    y_int = True
    def __init__(self, error): super().__init__(); self.error, self.reduction, self.calls = error, 'mean', 0
    def forward(self, pred, targ):
        self.calls += 1
        if self.calls > 3: raise self.error
        return F.cross_entropy(pred, targ, reduction=self.reduction)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_broken_in_the_loss_the_network_or_the_loader(error):
    dls = make_dls(32, 8, tfms=[NORM])
    class Net2(Net):
        broken = False
        def forward(self, x):
            if self.broken: raise error('x')
            return super().forward(x)
    for kind in ('loss', 'net', 'loader', 'transform'):
        loss, net = Loses(error('x')) if kind == 'loss' else CrossEntropyLossFlat(), Net2()
        learn = make_learn(dls, loss, net)
        net.broken = kind == 'net'
        before, items = state(learn), dls.train.dataset
        if kind == 'loader': items.__class__ = type('Bad', (Items,), dict(__getitem__=lambda self, i: (_ for _ in ()).throw(error('x'))))
        class Bad(Transform):
            def encodes(self, x: TensorImage): raise error('x')
        cb = CutMixUpAugment(cutmixup_augs=[Bad()] if kind == 'transform' else None)
        with pytest.raises(error), learn.no_logging(): learn.fit(1, cbs=cb)
        items.__class__ = Items
        assert all(a is b for a, b in zip(before, state(learn))) and learn.loss_func.reduction == 'mean'
    assert dls.train.one_batch()[0].min() == -.25


def test_seed_reproduces_and_differs():
    def run(seed, n=2):
        random.seed(0); np.random.seed(0); torch.manual_seed(0)
        dls = make_dls(32, 8, shuffle=False)
        learn, probe = make_learn(dls), Probe()
        cb, out = CutMixUpAugment(seed=seed), []
        torch.manual_seed(5)
        for _ in range(n):
            with learn.no_logging(): learn.fit(1, .1, cbs=[cb, probe])
            out.append(torch.cat([x for (x,), *_ in probe.batches]).as_subclass(torch.Tensor))
        return out
    a, b = run(1)
    assert torch.equal(a, b) and torch.equal(a, run(1)[0]) and not torch.equal(a, run(2)[0])
    c, d = run(None)
    assert not torch.equal(c, d) and torch.equal(c, run(None)[0])   # torch.manual_seed decides; the second fit goes on


def test_each_process_draws_for_itself(monkeypatch):
    draws = []
    for rank in ('0', '1'):
        monkeypatch.setenv('RANK', rank)
        _, probe = fit(make_dls(32, 8, shuffle=False), CutMixUp(seed=1))
        draws.append(torch.cat([lam for *_, lam in probe.batches]))
    assert not torch.equal(*draws)


def test_several_inputs_are_mixed_alike():
    dls = make_dls(64, 16, inputs=2, tfms=[NORM])
    for cb in (CutMixUp(seed=0), CutMixUpAugment(seed=0), CutMixUpAugment(seed=0, element=False)):
        _, probe = fit(dls, cb)
        for (a, b), _, _, lam in probe.batches: assert torch.allclose((a * 2 + .5) * 2, b * 2 + .5, atol=1e-5)
    class Extra(Items):
        def __getitem__(self, i): x, y = super().__getitem__(i); return x, torch.tensor([float(i)] * 3), y
    class Two(Net):
        def forward(self, x, v): return super().forward(x) + 0 * v.sum()
    dls = make_dls(16, 8, shuffle=False)
    dls.train.dataset.__class__ = dls.valid.dataset.__class__ = Extra
    dls.n_inp = 2
    _, probe = fit(dls, CutMixUp(seed=0), net=Two())
    assert torch.equal(probe.batches[0][0][1][:, 0], torch.arange(8.))   # numbers beside the pictures stay with the sample


@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("element", [True, False])
def test_batch_of_one_and_odd_last_batch(callback, element):
    for n, bs in ((3, 1), (9, 8), (7, 3)):
        _, probe = fit(make_dls(n, bs, tfms=[*aug_transforms(), NORM]), callback(element=element), 2)
        assert np.isfinite(probe.losses).all() and len(probe.losses) == 2 * -(-n // bs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    class Half(Net):   # fastai's Recorder cannot average a half loss
        def forward(self, x): return super().forward(x).to(torch.promote_types(dtype, torch.float32))
    for cb in (CutMixUp(), CutMixUpAugment(element=False), CutMixUpAugment()):
        _, probe = fit(make_dls(16, 8, dtype=dtype), cb, 2, net=Half(dtype=dtype))
        assert np.isfinite(probe.losses).all() and all(x.dtype == dtype for (x,), *_ in probe.batches)


def test_channels_last_is_kept():
    class Last(Transform):
        order = 200
        def encodes(self, x: TensorImage): return x.contiguous(memory_format=torch.channels_last)
    for cb in (CutMixUp(), CutMixUpAugment(), CutMixUpAugment(element=False)):
        _, probe = fit(make_dls(16, 8, tfms=[Last(), NORM]), cb, 2)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for (x,), *_ in probe.batches)


def test_the_batch_is_not_written_to():
    b = TensorImage(torch.rand(8, C, 6, 6)), TensorCategory(torch.arange(8) % C)
    copy = [t.clone() for t in b]
    dl = DataLoader([b] * 6, bs=None, num_workers=0)
    dls = DataLoaders(dl, dl, device=torch.device('cpu'))
    for cb in (CutMixUp(), CutMixUpAugment(), CutMixUpAugment(element=False)):
        fit(dls, cb, 2)
        assert all(torch.equal(a, c) for a, c in zip(b, copy))


def test_torch_dataloaders():
    data = torch.utils.data.TensorDataset(torch.rand(16, C, 6, 6), torch.arange(16) % C)
    dls = DataLoaders(*(torch.utils.data.DataLoader(data, batch_size=8) for _ in range(2)), device=torch.device('cpu'))
    _, probe = fit(dls, CutMixUpAugment(seed=0), 2)
    assert np.isfinite(probe.losses).all() and any(mixing_batches(probe))


@pytest.mark.parametrize("loss", [CrossEntropyLossFlat(), nn.CrossEntropyLoss()], ids=['stacked', 'blended'])
def test_gradient_accumulation(loss):
    "Four batches, one step, against the mean of the four gradients."
    dls, net, weights = make_dls(32, 8, shuffle=False), Net(), []
    start = {k: v.clone() for k, v in net.state_dict().items()}
    _, probe = fit(dls, CutMixUp(seed=2), cbs=[GradientAccumulation(32)], loss=loss, net=net, lr=1.)
    ours = net.lin.weight.detach().clone()
    net.load_state_dict(start)
    total = 0
    for (x,), *_ in probe.batches:
        x = x.as_subclass(torch.Tensor)
        total = total - (x.mean((2, 3)) * net(x).log_softmax(1)).sum() / 32
    (grad,) = torch.autograd.grad(total, net.lin.weight)
    assert torch.allclose(ours, start['lin.weight'] - grad, atol=1e-6)


@pytest.mark.parametrize("mode", ['bf16', 'fp16'])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_mixed_precision(callback, mode):
    seen = []
    class Seen(Callback):
        order = 9
        def after_pred(self): seen.append(self.pred.dtype)
    for loss in (CrossEntropyLossFlat(), nn.CrossEntropyLoss(), LabelSmoothingCrossEntropyFlat()):
        _, probe = fit(make_dls(32, 8), callback(), 2, [MixedPrecision(mode), Seen()], loss)
        assert np.isfinite(probe.losses).all() and set(seen) == {dict(bf16=torch.bfloat16, fp16=torch.float16)[mode]}
    assert not torch.is_autocast_enabled('cpu')


def test_lr_find(tmp_path):
    dls = make_dls(32, 8, tfms=[Mark(), NORM])
    for finetune in (None, 5, .5):
        learn = make_learn(dls, cbs=CutMixUpAugment(augment_finetune=finetune), path=tmp_path)
        before = state(learn)
        learn.lr_find(num_it=12, show_plot=False)
        assert all(a is b for a, b in zip(before, state(learn)))


def test_after_a_fit_the_learner_is_whole(tmp_path, dls):
    from attnpool.models.xresnet import xeca_resnext_tiny
    learn = Learner(dls, xeca_resnext_tiny(10), loss_func=CrossEntropyLossFlat(), cbs=CutMixUpAugment(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        import matplotlib.pyplot as plt
        learn.show_results(max_n=4)
        plt.close('all')
        assert learn.get_preds(ds_idx=0)[0].shape == (48, 10)
        assert learn.validate()[0] == pytest.approx(learn.loss_func(*learn.get_preds(act=lambda p: p)).item(), rel=1e-4)
        learn.export('x.pkl')
    assert pickle.loads(pickle.dumps(CutMixUpAugment(seed=3))).seed == 3


def test_show_batch():
    import matplotlib.pyplot as plt
    for target in ('index', 'onehot'):
        dls = make_dls(16, 8, tfms=[*aug_transforms(size=9), NORM], target=target, n_valid=8)
        dls.train.dataset.size = (8, 8)
        for cb in (CutMixUp(cutmix_uniform=False), CutMixUpAugment(element=False), CutMixUpAugment(augment_ratio=0)):
            class Three(Items):
                def __getitem__(self, i): x, y = Items.__getitem__(self, i); return TensorImage(x[:3]), y
            dls.train.dataset.__class__ = Three
            dls.train.after_batch = Pipeline(aug_transforms(size=9))
            before = list(dls.train.after_batch.fs)
            fig = cb.show_batch(dls, max_n=6)
            titles = [ax.get_title() for ax in fig.axes]
            assert len(titles) == 6 and all(t for t in titles)
            for t in titles:
                lines = [l.split() for l in t.split('\n')]
                if len(lines) > 1: assert sum(float(w) for w, _ in lines) == pytest.approx(1, abs=.011)
                assert all(l[-1] in 'abcd' for l in lines)
            assert all(a is b for a, b in zip(before, dls.train.after_batch.fs))
            plt.close(fig)


@pytest.mark.parametrize("element", [True, False])
@pytest.mark.parametrize("loss", [CrossEntropyLossFlat(), nn.CrossEntropyLoss()], ids=['stacked', 'blended'])
def test_nothing_is_asked_of_the_device(loss, element):
    class Watch(CutMixUpAugment):
        def before_batch(self):
            with NoSync(), NoAsking(): super().before_batch()
        def after_pred(self):
            with NoSync(), NoAsking(): super().after_pred()
        def after_loss(self):
            with NoSync(), NoAsking(): super().after_loss()
    _, probe = fit(make_dls(32, 8, tfms=[Mark(), NORM]), Watch(element=element, cutmix_uniform=False), 2, loss=loss)
    assert any(mixing_batches(probe))


@pytest.mark.cuda
@pytest.mark.parametrize("element", [True, False])
def test_no_synchronisation_on_a_gpu(element):
    class Watch(CutMixUpAugment):
        def before_batch(self):
            torch.cuda.set_sync_debug_mode("error")
            try: super().before_batch()
            finally: torch.cuda.set_sync_debug_mode("default")
    dls = make_dls(32, 8, tfms=[Mark(), NORM]).cuda()
    learn = make_learn(dls, net=Net().cuda())
    with learn.no_logging(): learn.fit(2, .1, cbs=Watch(element=element, cutmix_uniform=False))


@pytest.mark.parametrize("make, error, words", [
    (lambda: CutMixUpAugment(mixup_ratio=-1), ValueError, "mixup_ratio: expected a number of 0 or more, got -1"),
    (lambda: CutMixUpAugment(mixup_ratio=0, cutmix_ratio=0, augment_ratio=0), ValueError, "all ratios are 0"),
    (lambda: CutMixUp(mixup_ratio=0, cutmix_ratio=0), ValueError, "all ratios are 0"),
    (lambda: CutMixUpAugment(augment_ratio=float('nan')), ValueError, "augment_ratio"),
    (lambda: CutMixUp(mix_alpha=-.1), ValueError, "mix_alpha"),
    (lambda: CutMixUp(cut_alpha='big'), ValueError, "cut_alpha"),
    (lambda: CutMixUpAugment(augment_finetune=-2), ValueError, "augment_finetune"),
])
def test_errors_of_arguments(make, error, words):
    with pytest.raises(error, match=words): make()


def no_reduction(pred, targ): return F.cross_entropy(pred, targ)


@pytest.mark.parametrize("element", [True, False])
@pytest.mark.parametrize("kw, cb, loss, error, words", [
    (dict(), dict(augment_finetune=3), None, ValueError, "augment_finetune: 3 epochs do not fit into a training of 2"),
    (dict(), dict(interp_label=False), no_reduction, ValueError, "knows no reduction"),
    (dict(), dict(), lambda p, t: F.nll_loss(p.log_softmax(1), t), ValueError, "knows no reduction"),
    (dict(), dict(), lambda p, t, reduction='mean': F.nll_loss(p.log_softmax(1), t), ValueError, "though reduction is 'none'"),
    (dict(target='mask'), dict(), MSELossFlat(), ValueError, "TensorMask .* cannot be mixed"),
    (dict(target='text'), dict(), None, TypeError, "Categorize"),
])
def test_errors_before_the_first_step(kw, cb, loss, error, words, element):
    for callback in CALLBACKS:
        if callback is CutMixUp and 'augment_finetune' in cb: continue
        if callback is CutMixUpAugment: cb = dict(cb, augment_ratio=0)   # or a batch without mixing might come first
        learn = make_learn(make_dls(16, 8, **kw), loss)
        weight = learn.model.lin.weight.detach().clone()
        with pytest.raises(error, match=words), learn.no_logging(): learn.fit(2, .1, cbs=callback(element=element, **cb))
        assert torch.equal(learn.model.lin.weight, weight)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_pictures_that_cannot_be_mixed(callback):
    class Uneven(Items):
        def __getitem__(self, i): x, y = super().__getitem__(i); return x, x[..., :3], y
    dls = make_dls(16, 8)
    dls.train.dataset.__class__ = Uneven
    dls.n_inp = 2
    with pytest.raises(ValueError, match="6x3 and 6x8"): fit(dls, callback())
    class Flat(Items):
        def __getitem__(self, i): x, y = super().__getitem__(i); return x.flatten(), y
    dls = make_dls(16, 8)
    dls.train.dataset.__class__ = Flat
    with pytest.raises(TypeError, match=r"expected pictures .* got \(8, 192\)"): fit(dls, callback())
    with pytest.raises(TypeError, match="IntToFloatTensor"): fit(make_dls(16, 8, dtype=torch.uint8), callback())


def test_knows_reduction():
    class Blind(nn.Module):
        def forward(self, pred, targ): return pred.mean()
    assert all(map(knows_reduction, (nn.CrossEntropyLoss(), CrossEntropyLossFlat(), F.cross_entropy, MSELossFlat(), lambda p, t, **kw: 0, lambda p, t, reduction='mean': 0)))
    assert not any(map(knows_reduction, (Blind(), no_reduction, 3)))


# imports little, because both processes have to load it
DISTRIBUTED = textwrap.dedent("""
    import os, sys, warnings
    warnings.filterwarnings('ignore')
    os.environ.update(RANK=sys.argv[1], LOCAL_RANK=sys.argv[1], WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=sys.argv[2])
    import torch
    from torch import distributed, nn
    distributed.init_process_group('gloo')
    import fastai.distributed as D
    from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, SGD, TfmdDL, Transform
    from attnpool.callback.cutmixup import CutMixUpAugment
    def broadcast(self, t, rank):
        t = torch.tensor(t)
        distributed.broadcast(t, rank)
        return t.tolist()
    D.DistributedDL._broadcast = broadcast   # fastai's goes by way of CUDA

    class Items(list): split_idx = 0
    class Mark(Transform):
        split_idx = 0
        def encodes(self, x: torch.Tensor): return x + 100 if x.ndim == 4 else x
    class Probe(Callback):
        order, seen = 1, []
        def before_batch(self):
            if self.training: self.seen.append((self.x.mean((1, 2, 3)) > 99, torch.ones(8) if self.cut_mix_up_augment.lam is None else self.cut_mix_up_augment.lam))
    torch.manual_seed(0)
    items = Items((torch.rand(4, 6, 6), torch.tensor(i % 4)) for i in range(32))
    dls = DataLoaders(*(TfmdDL(items, bs=8, shuffle=True, num_workers=0, after_batch=[Mark()]) for _ in range(2)), device=torch.device('cpu'))
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    def state(): return [*dls.loaders, *dls.train.after_batch.fs, learn.loss_func, *learn.cbs, learn.model]
    before = state()
    with learn.no_logging(): learn.fit(2, .1, cbs=[CutMixUpAugment(mix_alpha=1.), Probe(), D.DistributedTrainer(sync_bn=False, cpu=True)])
    assert len(before) == len(state()) and all(a is b for a, b in zip(before, state()))
    assert len(Probe.seen) == 4                                   # 32 samples, two processes, batches of 8, two epochs
    marked, lam = (torch.cat(t).float() for t in zip(*Probe.seen))
    assert 0 < marked.sum() < 32 and (lam[marked > 0] == 1).all()
    def everywhere(t):
        both = [torch.zeros_like(t) for _ in range(2)]
        distributed.all_gather(both, t)
        return both
    assert not torch.equal(*everywhere(lam))                      # each mixes its own share
    assert torch.equal(*everywhere(net[2].weight.detach()))       # and both learn the same
    print('fine')
""")


@pytest.mark.slow
def test_two_processes():
    pytest.importorskip("accelerate")
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    run = [subprocess.Popen([sys.executable, '-c', DISTRIBUTED, str(rank), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        for out, err in [p.communicate(timeout=400) for p in run]: assert out.strip().endswith('fine'), err[-3000:]
    finally:
        for p in run: p.kill()
