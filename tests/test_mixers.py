"Callbacks that mix meet others of their kind, are driven by hand, weigh labels; and whatever a callback changes is put back."
import pickle
import random
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.data.all import Pipeline
from fastai.vision.all import (Callback, CancelEpochException, CancelFitException, CrossEntropyLossFlat,
                               FocalLossFlat, LabelSmoothingCrossEntropyFlat, Adam, Learner, OptimWrapper, SchedCos, SGD)
from safetensors.torch import save
from torch import nn

from attnpool.callback.cutmixup import CutMixUp, CutMixUpAugment, stacked_loss
from attnpool.callback.ends import PutsBack
from attnpool.callback.precision import ChannelsLast, MixedPrecision
from attnpool.data.batches import RawBatches
from attnpool.callback.ends import BodyStands
from attnpool.recipe import MIXES, recipe_learner
from test_cutmixup import C, NORM, Items, Mark, Net, Probe, make_dls, make_learn, state


class Ours(CutMixUpAugment):
    "A subclass with another name."


class OfABlog(Callback):
    "What notebooks carry along."
CutMixOfABlog = type('CutMix', (OfABlog,), {})


class MixHandlerX(Callback):
    "What fastxtend's mixers have in common: they change the loss and the DataLoader for a fit, and an error in another's `before_fit` keeps that changed."
    run_valid = False
    def before_fit(self):
        self.pipe = self.dls.train.after_batch
        self.dls.train.after_batch = Pipeline([])
    def after_fit(self): self.dls.train.after_batch = self.pipe
Xtends = type('CutMixUpAugment', (type('MixUp', (MixHandlerX,), {}),), {})


MIXERS = dict(ours=CutMixUp, augment=CutMixUpAugment, subclass=Ours, fastai_mixup=MixUp, fastai_cutmix=CutMix, blog=CutMixOfABlog, xtend=Xtends)
PAIRS = [pair for one in ('ours', 'augment', 'subclass') for other in MIXERS for pair in ((one, other), (other, one))]


def draws(): return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.parametrize("where", ['learner', 'fit', 'both', 'add_cb'])
@pytest.mark.parametrize("first, second", list(dict.fromkeys(PAIRS)))
def test_a_second_mixer_is_refused_by_name_and_leaves_no_trace(first, second, where):
    dls, a, b = make_dls(32, 8, tfms=[Mark(), NORM]), MIXERS[first](), MIXERS[second]()
    learn = make_learn(dls, cbs=dict(learner=[a, b], fit=[], both=[a], add_cb=[a])[where])
    if where == 'add_cb': learn.add_cb(b)
    before, weight = state(learn), learn.model.lin.weight.detach().clone()
    names, of_learner = [cb.name for cb in learn.cbs], [cb.learn for cb in learn.cbs]
    drawn = draws(), dls.train.rng.getstate()
    with pytest.raises(ValueError, match="cbs: .* both mix the pictures of a batch") as e, learn.no_logging():
        learn.fit(1, .1, cbs=dict(fit=[a, b], both=[b]).get(where))
    for cb in (a, b): assert f"{type(cb).__module__}.{type(cb).__name__}" in str(e.value)
    assert all(x is y for x, y in zip(before, state(learn), strict=True)) and torch.equal(learn.model.lin.weight, weight)
    assert (draws(), dls.train.rng.getstate()) == drawn   # the next training has the same order and the same draws
    assert [cb.name for cb in learn.cbs] == names and [cb.learn for cb in learn.cbs] == of_learner
    if where == 'both' and isinstance(a, CutMixUp): assert getattr(learn, a.name) is a
    for cb in (a, b): learn.remove_cb(cb)
    probe = Probe()
    with learn.no_logging(): learn.fit(1, .1, cbs=[CutMixUpAugment(augment_ratio=0, seed=0), probe])   # and one of them alone trains
    pixels = torch.cat([x for (x,), *_ in probe.batches]) * 2 + .5
    assert len(probe.batches) == 4 and .24 < pixels.mean() < .26   # normalised once


def test_one_mixer_given_twice_is_refused_and_stays():
    cb = CutMixUp()
    learn = make_learn(make_dls(16, 8), cbs=cb)
    with pytest.raises(ValueError, match="once only"), learn.no_logging(): learn.fit(1, .1, cbs=cb)
    assert learn.cut_mix_up is cb and cb.learn is learn and list(learn.cbs).count(cb) == 1
    with learn.no_logging(): learn.fit(1, .1)


@pytest.mark.parametrize("mix", [m for m in MIXES if m != 'none'])
def test_a_recipes_mixer_beside_another(mix, dls):
    learn = recipe_learner(dls, 'xeca_resnext_tiny', 'avg', 'quick', mix=mix, cbs=MixUp(), epochs=1)
    with pytest.raises(ValueError, match="MixUp.*mix='none'"), learn.no_bar(), learn.no_logging(): learn.fit_recipe()


@pytest.mark.parametrize("cb", [ChannelsLast, MixedPrecision, OfABlog, partial(ParamScheduler, {'lr': SchedCos(.1, .01)})])
def test_other_callbacks_beside_a_mixer_are_not(cb):
    learn = make_learn(make_dls(16, 8))
    with learn.no_logging(): learn.fit(1, .1, cbs=[CutMixUpAugment(), cb()])
    probe = Probe()
    with learn.no_logging(): learn.fit(1, .1, cbs=[Ours(), probe])   # a subclass alone
    assert len(probe.batches) == 2


class ProgressiveResize(Callback):
    "Grows the pictures over the training, after they are mixed."
    order = 11
    def before_batch(self): self.learn.xb = (F.interpolate(self.x, size=(self.epoch + 2) * 2),)


def test_progressive_resizing_beside_a_mixer():
    sizes = []
    learn = make_learn(make_dls(16, 8, tfms=[NORM]))
    learn.model.register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[-1]))
    with learn.no_logging(): learn.fit(2, .1, cbs=[CutMixUp(), ProgressiveResize()])
    assert set(sizes) == {4, 6}


# One batch by hand

@pytest.mark.parametrize("before_fit", [True, False])
@pytest.mark.parametrize("before_train", [True, False])
@pytest.mark.parametrize("after_a_fit", [True, False])
@pytest.mark.parametrize("cb", [CutMixUp, partial(CutMixUp, element=False), partial(CutMixUpAugment, augment_ratio=0), CutMixUpAugment,
                                partial(CutMixUpAugment, element=False, augment_finetune=.5)], ids=range(5))
def test_one_batch_by_hand(cb, after_a_fit, before_train, before_fit):
    dls, cb = make_dls(32, 8, tfms=[Mark(), NORM]), cb(seed=1)
    learn = make_learn(dls, cbs=cb)
    if after_a_fit:
        with learn.no_logging(): learn.fit(1, 0.)
    for entering in ([True, False] if before_fit else [False]):
        if entering: learn.__enter__()
        elif before_fit: learn('before_fit')
        learn.epoch, learn.training, learn.dl = 0, True, dls.train
        b = dls.one_batch()
        learn._split(b)
        if before_train: learn('before_train')
        learn('before_batch')
        x, y = learn.xb[0].as_subclass(torch.Tensor), F.one_hot(learn.yb[0].as_subclass(torch.Tensor), C)
        lam = torch.ones(8) if cb.lam is None else cb.lam
        y1 = y if cb.lam is None else F.one_hot(cb.yb1[0].as_subclass(torch.Tensor), C)
        label = lam[:, None] * y + (1 - lam[:, None]) * y1
        assert torch.equal(learn.yb[0], b[1]) and torch.allclose((x * 2 + .5).mean((2, 3)) - 100, label, atol=1e-3)   # transformed once
        if ((lam < 1) & (y != y1).any(1)).any(): assert not torch.equal(x, b[0].as_subclass(torch.Tensor))
        if entering: learn.__exit__(None, None, None)


def test_a_raw_batch_by_hand_is_transformed():
    dls, cb = make_dls(32, 8, tfms=[NORM]), CutMixUpAugment()
    class Bytes(Items):
        def __getitem__(self, i): x, y = super().__getitem__(i); return (x * 255).byte(), y
    from fastai.vision.all import IntToFloatTensor
    dls = make_dls(32, 8, tfms=[IntToFloatTensor(), NORM])
    dls.train.dataset.__class__ = Bytes
    learn = make_learn(dls, cbs=cb)
    with learn:
        learn.epoch, learn.training, learn.dl = 0, True, dls.train
        learn('before_train')
        learn._split(learn.dl.one_batch())
        learn('before_batch')
        assert learn.xb[0].dtype == torch.float32 and -.26 < learn.xb[0].min() and learn.xb[0].max() < .26


def test_progress_by_hand_is_the_learners():
    cb = CutMixUpAugment(augment_ratio=0, augment_finetune=.5)
    dls = make_dls(32, 8)
    learn = make_learn(dls, cbs=cb)
    with learn:
        learn.epoch, learn.training, learn.dl = 0, True, dls.train
        for pct, mixes in ((0., True), (.49, True), (.5, False), (.9, False)):
            learn._split(dls.one_batch())
            learn('before_train')
            learn.pct_train = pct
            learn('before_batch')
            assert (cb.lam is not None) == mixes


# Weights of labels

torch.manual_seed(0)
N, WEIGHT = 12, torch.tensor([1., 5., .5, 3.], dtype=torch.float64)
PRED = torch.randn(N, C, dtype=torch.float64)
Y, Y1 = torch.arange(N) % C, torch.randperm(N) % C
LAM = torch.rand(N, dtype=torch.float64)


def by_hand(eps, weight, ignored, weighs_smooth, lam):
    "Sample by sample in plain Python: the sum of both labels' losses over the sum of both labels' weights."
    top = bottom = even = 0.
    for p, y, y1, l in zip(PRED.tolist(), Y.tolist(), Y1.tolist(), lam.tolist()):
        logs = [v - np.log(sum(np.exp(p))) for v in p]
        even += -eps * sum(logs) / C / N
        for label, share in ((y, l), (y1, 1 - l)):
            if label == ignored: continue
            w = weight[label]
            top += share * (1 - eps) * w * -logs[label]
            if weighs_smooth: top += share * eps * sum(-a * b for a, b in zip(weight, logs)) / C
            bottom += share * w
    return top / bottom + (0 if weighs_smooth else even)


CROSS_ENTROPIES = dict(   # loss, share that is spread, weights, label to ignore, whether weights act on what is spread
    plain=(lambda: nn.CrossEntropyLoss(), 0., [1.] * C, None, True),
    torch=(lambda: nn.CrossEntropyLoss(WEIGHT), 0., WEIGHT.tolist(), None, True),
    fastai=(lambda: CrossEntropyLossFlat(weight=WEIGHT.float()), 0., WEIGHT.tolist(), None, True),
    ignoring=(lambda: nn.CrossEntropyLoss(ignore_index=2), 0., [1.] * C, 2, True),
    fastai_ignoring=(lambda: CrossEntropyLossFlat(weight=WEIGHT.float(), ignore_index=0), 0., WEIGHT.tolist(), 0, True),
    smooth=(lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=.2), .2, WEIGHT.tolist(), None, True),
    all_at_once=(lambda: nn.CrossEntropyLoss(WEIGHT, label_smoothing=.2, ignore_index=1), .2, WEIGHT.tolist(), 1, True),
    fastai_smooth=(lambda: LabelSmoothingCrossEntropyFlat(eps=.2, weight=WEIGHT.float()), .2, WEIGHT.tolist(), None, False),
    function=(lambda: partial(F.cross_entropy, weight=WEIGHT, ignore_index=3), 0., WEIGHT.tolist(), 3, True))


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_weighted_cross_entropy_by_hand(name):
    make, *terms = CROSS_ENTROPIES[name]
    loss, rel = make(), 1e-6 if 'fastai' in name else 1e-12   # fastai's losses compute in float32
    def stacked(lam): return stacked_loss(loss, PRED, (Y,), (Y1,), lam).item()
    assert stacked(LAM) == pytest.approx(by_hand(*terms, LAM), rel=rel)
    assert stacked(torch.ones(N)) == pytest.approx(loss(PRED, Y).item(), rel=rel)    # nothing mixed: the plain loss
    assert stacked(torch.zeros(N)) == pytest.approx(loss(PRED, Y1).item(), rel=rel)
    assert stacked(torch.ones(N) - 1e-9) == pytest.approx(loss(PRED, Y).item(), rel=1e-6)   # and no step to it


@pytest.mark.parametrize("make", [lambda: nn.NLLLoss(WEIGHT), lambda: nn.CrossEntropyLoss(WEIGHT, reduction='sum'), lambda: FocalLossFlat(weight=WEIGHT.float()),
                                  lambda: CrossEntropyLossFlat(weight=WEIGHT.float(), reduction='sum'), lambda: partial(F.cross_entropy, weight=WEIGHT, reduction='sum')])
def test_other_losses_unmixed_are_the_plain_ones(make):
    loss = make()
    pred = PRED.log_softmax(1) if isinstance(loss, nn.NLLLoss) else PRED
    assert stacked_loss(loss, pred, (Y,), (Y1,), torch.ones(N)).item() == pytest.approx(loss(pred, Y).item(), rel=1e-6)


@pytest.mark.parametrize("name, interp", [(name, interp) for name in ('torch', 'fastai', 'ignoring', 'smooth', 'fastai_smooth', 'function') for interp in (None, True, False)
                                          if not (interp and name == 'ignoring')])   # label weights know no label to ignore
def test_a_fit_without_mixing_has_the_plain_loss(name, interp):
    loss = CROSS_ENTROPIES[name][0]()
    if isinstance(loss, nn.Module): loss.float()
    else: loss = partial(F.cross_entropy, weight=WEIGHT.float(), ignore_index=3) if name == 'function' else loss
    learn, probe, preds = make_learn(make_dls(16, 8), loss, Net()), Probe(), []
    class Pred(Callback):
        def after_pred(self): preds.append((self.pred.detach().as_subclass(torch.Tensor), self.y.as_subclass(torch.Tensor)))
    Pred.order = -5   # before the labels are mixed
    with learn.no_logging(): learn.fit(1, 0., cbs=[CutMixUp(mix_alpha=0, cut_alpha=0, interp_label=interp), probe, Pred()])
    due = [loss(p, y.long()).item() for p, y in preds]
    assert [*probe.losses, *probe.valid] == pytest.approx(due, rel=1e-6)


def test_label_weights_as_targets_keep_torchs_mean():
    soft, soft1 = F.one_hot(Y, C).double(), F.one_hot(Y1, C).double()
    loss = nn.CrossEntropyLoss(WEIGHT)
    mixed = LAM[:, None] * soft + (1 - LAM[:, None]) * soft1
    assert stacked_loss(loss, PRED, (soft,), (soft1,), LAM).item() == pytest.approx(loss(PRED, mixed).item(), rel=1e-12)


# Ways out

def conv_dls(): return make_dls(32, 8, tfms=[Mark(), NORM], size=(8, 8))


def conv_net(): return nn.Sequential(nn.Sequential(nn.Conv2d(C, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, C)))


class Break(Callback):
    "Raises at an event, of the second training batch where it is one of a batch."
    order = 80
    def __init__(self, event, error, order=80):
        self.event, self.error, self.order = event, error, order
        setattr(self, event, self.act)
    def act(self):
        inner = self.event in ('before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step', 'after_step', 'after_batch')
        if not inner or self.training and self.iter == 1: raise self.error


EVENTS = ['before_fit', 'before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step', 'after_step', 'after_batch',
          'after_train', 'before_validate', 'after_validate', 'after_epoch', 'after_fit']
CHANGERS = dict(layout=ChannelsLast, precision=lambda: MixedPrecision('bf16'), scaled=lambda: MixedPrecision('fp16'), body=BodyStands, mixer=CutMixUpAugment,
                all=lambda: [ChannelsLast(), MixedPrecision('bf16'), BodyStands(), CutMixUpAugment()])


def as_found(learn, loss):
    "What a Learner and this process should be, before and after."
    return ([p.is_contiguous() for p in learn.model.parameters()], [p.requires_grad for p in learn.model.parameters()],
            torch.is_autocast_enabled('cpu'), learn.loss_func is loss, loss.reduction, isinstance(getattr(learn, 'dl', None), RawBatches),
            getattr(learn, 'scaler', None), learn.dls.train.after_batch.fs, list(learn.cbs), [cb.learn for cb in learn.cbs])


ERRORS = [KeyboardInterrupt, RuntimeError, SystemExit, CancelFitException, CancelEpochException]
LETS_OUT = {CancelFitException: ['after_fit'], CancelEpochException: ['before_fit', 'after_epoch', 'after_fit']}   # fastai, which catches it elsewhere


@pytest.mark.parametrize("error, event", [(error, event) for error in ERRORS for event in EVENTS if event not in LETS_OUT.get(error, ())])
@pytest.mark.parametrize("name, where", [*((name, 'learner') for name in CHANGERS), ('all', 'fit')])
def test_every_way_out_leaves_the_learner_as_it_was(name, where, error, event):
    loss, cbs = CrossEntropyLossFlat(), CHANGERS[name]()
    learn = make_learn(conv_dls(), loss, conv_net(), cbs=cbs if where == 'learner' else None)
    before = as_found(learn, loss)
    with learn.no_logging(), suppress(KeyboardInterrupt, RuntimeError, SystemExit):
        learn.fit(1, .1, cbs=[*(cbs if where == 'fit' else []), Break(event, error('x'))])
    assert as_found(learn, loss) == before
    save(learn.model.state_dict())   # safetensors refuses other layouts
    with learn.no_logging(): learn.fit(1, .1, cbs=cbs if where == 'fit' else None)
    assert as_found(learn, loss) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ['network', 'loss', 'loader', 'optimizer'])
def test_broken_in_what_is_no_callback(place, error):
    class Broken(nn.Module):
        def forward(self, x): raise error('x')
    class Loss(CrossEntropyLossFlat):
        def __call__(self, *args, **kw): raise error('x')
    loss = (Loss if place == 'loss' else CrossEntropyLossFlat)()
    net, dls = conv_net(), conv_dls()
    if place == 'network': net.insert(1, Broken())
    if place == 'loader': dls.train.dataset.__class__ = type('Bad', (Items,), dict(__getitem__=lambda self, i: (_ for _ in ()).throw(error('x'))))
    learn = make_learn(dls, loss, net, cbs=CHANGERS['all']())
    if place == 'optimizer':
        learn.create_opt()
        learn.opt.step = lambda: (_ for _ in ()).throw(error('x'))
    before = as_found(learn, loss)
    with pytest.raises(error), learn.no_logging(): learn.fit(1, .1)
    assert as_found(learn, loss) == before


def test_an_error_that_a_callback_of_a_lower_order_raises_at_the_end():
    learn = make_learn(conv_dls(), None, conv_net(), cbs=[ChannelsLast(), BodyStands()])
    with learn.no_logging(), pytest.raises(RuntimeError): learn.fit(1, .1, cbs=Break('after_fit', RuntimeError('x'), order=-5))
    assert all(p.is_contiguous() and p.requires_grad for p in learn.model.parameters())


@pytest.mark.parametrize("make", [partial(SGD, mom=.9), Adam, partial(OptimWrapper, opt=torch.optim.Adam)], ids=['sgd', 'adam', 'torch'])
def test_the_optimizers_own_maps_are_turned_back_too(make):
    seen = []
    class Look(Callback):
        def after_step(self): seen.append([v.is_contiguous() for v in maps()])
    def maps(): return [v for p in learn.model.parameters() for v in getattr(learn.opt, "opt", learn.opt).state[p].values() if isinstance(v, torch.Tensor) and v.ndim == 4]
    learn = Learner(conv_dls(), conv_net(), CrossEntropyLossFlat(), opt_func=make, cbs=[ChannelsLast(), Look()])
    with learn.no_logging(), learn.no_bar(): learn.fit(1, .1)
    assert not all(seen[-1]) and maps() and all(v.is_contiguous() for v in maps())
    weights = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_logging(), learn.no_bar(): learn.fit(1, .1)   # goes on from its state
    assert maps() and all(v.is_contiguous() for v in maps()) and any(not torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())


def test_a_fit_inside_an_except_block_and_a_learner_that_is_pickled():
    learn = make_learn(conv_dls(), None, conv_net(), cbs=CHANGERS['all']())
    try: raise ValueError
    except ValueError:
        with learn.no_logging(): learn.fit(1, .1)
    for cb in CHANGERS['all'](): assert type(pickle.loads(pickle.dumps(cb))) is type(cb)
    assert all(isinstance(cb, PutsBack) for cb in CHANGERS['all']()) and isinstance(learn.dls.train.after_batch, Pipeline)


INTERRUPTED = textwrap.dedent("""
    import os, signal, sys, threading, warnings
    warnings.filterwarnings('ignore')
    import torch
    from safetensors.torch import save_file
    from attnpool.data.digits import digits_dls
    from attnpool.recipe import recipe_learner
    from fastai.vision.all import Callback
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a process in the background of a shell ignores it
    class Say(Callback):
        order = 90
        def after_pred(self):
            if self.training and self.iter == 2: print('training', flush=True)
    learn = recipe_learner(digits_dls(40, n_train=512, n_valid=16, bs=16), 'xeca_resnext_tiny', 'avg', 'mixed', epochs=50, train='head', cbs=Say())
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    except KeyboardInterrupt: print('interrupted', flush=True)
    save_file(learn.model.state_dict(), sys.argv[1])
    print(torch.is_autocast_enabled('cpu'), all(p.requires_grad for p in learn.model.parameters()), type(learn.dl).__name__)
""")


def test_ctrl_c_in_a_real_process(tmp_path):
    with subprocess.Popen([sys.executable, '-c', INTERRUPTED, tmp_path / 'w.safetensors'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try:
            assert p.stdout.readline().strip() == 'training', p.communicate()[1][-2000:]
            p.send_signal(signal.SIGINT)
            out, err = p.communicate(timeout=120)
        finally: p.kill()
    assert out.split() == ['interrupted', 'False', 'True', 'TfmdDL'] and p.returncode == 0, (out, err[-2000:])
    assert (tmp_path / 'w.safetensors').stat().st_size > 1e5
