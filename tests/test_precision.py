"Mixed precision and channels last: what the network computes in, and that it is as before afterwards."
import json
from contextlib import suppress

import pytest
import torch
from fastai.callback.fp16 import AMPMode, MixedPrecision as FastaiMixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.vision.all import Callback, CancelBatchException, CrossEntropyLossFlat, Learner, SGD, TensorCategory, TensorImage
from fastai.data.all import DataLoader, DataLoaders
from torch import nn

from attnpool.callback.precision import best_amp, ChannelsLast, MixedPrecision, quickest
from attnpool.choices import PRECISIONS
from attnpool.data.digits import digits_dls
from attnpool.measured import measured
from attnpool.recipe import get_recipe, recipe_learner
from attnpool.runs.spec import make_spec

DTYPES = dict(fp16=torch.float16, bf16=torch.bfloat16)


def make_learn(**kw):
    torch.manual_seed(0)
    batches = [(TensorImage(torch.randn(4, 3, 8, 8)), TensorCategory(torch.arange(4))) for _ in range(4)]
    dls = DataLoaders(*(DataLoader(batches, bs=None, num_workers=0) for _ in range(2)), device=torch.device('cpu'))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1, **kw)
    return learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else learn


class Seen(Callback):
    order = 9   # before mixed precision turns the predictions to float32
    def before_fit(self): self.preds, self.inputs = [], []
    def after_pred(self):
        self.preds.append(self.pred.dtype)
        self.inputs.append(self.x.is_contiguous(memory_format=torch.channels_last))


def fit(learn, cbs=(), epochs=1):
    seen = Seen()
    with learn.no_logging(): learn.fit(epochs, cbs=[*cbs, seen])
    return seen


@pytest.mark.parametrize("mode", ['fp16', 'bf16', AMPMode.BF16, None])
def test_dtype_on_the_device_of_the_data(mode):
    learn = make_learn()
    seen = fit(learn, [MixedPrecision(mode)])
    assert set(seen.preds) == {DTYPES['bf16' if mode is None else getattr(mode, 'value', mode)]}   # training and validation
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in learn.model.parameters())
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize("name", ['fp16', 'bf16', None])
def test_to_amp(name):
    learn = make_learn().to_amp(name)
    assert isinstance(learn.mixed_precision, MixedPrecision) and set(fit(learn).preds) == {DTYPES[name or 'bf16']}
    learn.to_amp(name)
    assert len([cb for cb in learn.cbs if isinstance(cb, FastaiMixedPrecision)]) == 1
    learn.to_fp32()
    assert set(fit(learn).preds) == {torch.float32} and not hasattr(learn, 'mixed_precision')


def test_arguments_of_the_scaler():
    scales = []
    class Scale(Callback):
        order = 9
        def before_step(self): scales.append(self.learn.scaler.get_scale())
    learn = make_learn().to_amp('fp16', init_scale=8., growth_interval=2)
    fit(learn, [Scale()])
    assert scales == [8, 8, 16, 16] and learn.scaler is None


def test_close_to_float32():
    a, b = make_learn(), make_learn(cbs=MixedPrecision())
    for learn in (a, b): fit(learn, epochs=2)
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, atol=2e-2)


def test_gradients_that_overflow_are_skipped():
    learn = make_learn(cbs=MixedPrecision('fp16', init_scale=2.**40))
    weight = learn.model[0].weight.detach().clone()
    class First(Callback):
        order = 80
        def after_batch(self):
            if self.training and self.iter == 0: assert torch.equal(self.learn.model[0].weight, weight)
    fit(learn, [First()])
    assert torch.isfinite(learn.model[0].weight).all()


def test_with_accumulation_and_clipping():
    learn = make_learn(cbs=[MixedPrecision(), GradientAccumulation(8), GradientClip(.5)])
    fit(learn, epochs=2)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


class Break(Callback):
    order = 11
    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.act)
    def act(self): raise self.error


@pytest.mark.parametrize("event", ['before_batch', 'after_pred', 'after_loss', 'after_batch'])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError('x'), CancelBatchException()], ids=lambda e: type(e).__name__)
def test_autocast_does_not_pile_up(event, error):
    if isinstance(error, CancelBatchException) and event == 'after_batch': pytest.skip("caught nowhere")
    learn = make_learn(cbs=MixedPrecision())
    with suppress(KeyboardInterrupt, RuntimeError): fit(learn, [Break(event, error)])
    if isinstance(error, CancelBatchException): assert not torch.is_autocast_enabled('cpu')
    learn.validate()   # the next batch closes what a broken one left open
    assert not torch.is_autocast_enabled('cpu')
    assert set(fit(learn).preds) == {torch.bfloat16} and not torch.is_autocast_enabled('cpu')


def test_best_amp():
    assert best_amp('cpu') == AMPMode.BF16 and best_amp('mps') == AMPMode.FP16
    with pytest.raises(ValueError, match="no mixed precision for 'meta'"): best_amp('meta')


@pytest.mark.parametrize("capability, mode", [((7, 5), AMPMode.FP16), ((8, 0), AMPMode.BF16), ((9, 0), AMPMode.BF16)])
def test_best_amp_of_gpus(monkeypatch, capability, mode):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert best_amp('cuda') == mode


def test_errors():
    with pytest.raises(ValueError, match="amp_mode: expected 'fp16', 'bf16' or None, got 'fp8'"): MixedPrecision('fp8')


@pytest.mark.cuda
def test_on_a_gpu():
    learn = make_learn(cbs=[MixedPrecision(), ChannelsLast()])
    learn.dls.cuda()
    assert set(fit(learn).preds) == {DTYPES[best_amp('cuda').value]}


def last(p): return p.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_for_weights_and_pictures():
    learn, formats = make_learn(), []
    weight = learn.model[0].weight
    learn.model[0].register_forward_hook(lambda m, args, out: formats.append((last(args[0]), last(m.weight), last(out))))
    seen = fit(learn, [ChannelsLast()])
    assert all(map(all, formats)) and len(formats) == 8 and all(seen.inputs)
    assert learn.model[0].weight is weight and weight.is_contiguous() and not last(weight)
    assert not any(fit(learn).inputs)


def test_channels_last_changes_no_number_and_keeps_what_was_last():
    a, b = make_learn(), make_learn()
    b.model[0].to(memory_format=torch.channels_last)
    fit(a, epochs=2)
    fit(b, [ChannelsLast()], epochs=2)
    assert last(b.model[0].weight)   # turned by the user, not by the callback
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(p, q, atol=1e-5)


def test_all_together():
    learn = make_learn(cbs=[ChannelsLast(), MixedPrecision()])
    seen = fit(learn, epochs=2)
    assert all(seen.inputs) and set(seen.preds) == {torch.bfloat16}


# The quicker precision of a CPU

@pytest.fixture
def seconds(tmp_path, monkeypatch):
    "Answers that this machine has given: seconds of a step, by network."
    monkeypatch.setenv("ATTNPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("attnpool.measured._asked", {})
    monkeypatch.setattr("attnpool.callback.precision.default_device", lambda: torch.device("cpu"))
    def put(bf16, arch="xeca_resnext_tiny", n=16, size=32):
        return measured(f"training step of {arch}: {n} pictures of {size} px", lambda: dict(float32=1., bf16=bf16))
    return put


@pytest.mark.parametrize("bf16, found", [(.5, "bf16"), (.92, "auto"), (3., "auto")])
def test_speed_quickest_is_decided_in_the_spec(seconds, bf16, found):
    "bf16 only where it saves more than a tenth; else the spec, and so the run's name, is that of float32 as ever."
    seconds(bf16)
    options = dict(size=32, bs=16)
    spec = make_spec(precision="quickest", **options)
    assert spec.recipe.precision == found
    assert spec.id == make_spec(precision=found, **options).id
    assert (spec.id == make_spec(**options).id) == (found == "auto")
    assert {make_spec(head=head, precision="quickest", **options).recipe.precision for head in ("concat", "learned")} == {found}


def test_speed_quickest_is_measured_once_and_disturbs_nothing(seconds, tmp_path):
    state = torch.random.get_rng_state()
    first = quickest("xeca_resnext_tiny", 16, 4)
    assert first in ("bf16", "auto") and torch.equal(state, torch.random.get_rng_state())
    kept = json.loads((tmp_path / "cache/measured.json").read_text()).popitem()[1]
    (question, answer), = kept.items()
    assert question == "training step of xeca_resnext_tiny: 4 pictures of 16 px" and set(answer) == {"float32", "bf16"}
    assert all(0 < s < 60 for s in answer.values()) and quickest("xeca_resnext_tiny", 16, 4) == first
    seconds(.5, n=32)
    assert quickest("xeca_resnext_tiny", 32, 256) == "bf16"   # measured with 32 pictures


def test_speed_quickest_of_a_learner_trains_so(seconds):
    seconds(.5)
    dls = digits_dls(32, 16, n_train=32, n_valid=16)
    learn = recipe_learner(dls, "xeca_resnext_tiny", "avg", get_recipe("quick", epochs=1, size=32, bs=16, precision="quickest"), lr=1e-3)
    assert learn.recipe.precision == "bf16" and learn.mixed_precision.amp_mode in ("bf16", AMPMode.BF16)


def test_speed_quickest_without_a_network_says_what_to_type(seconds, monkeypatch):
    with pytest.raises(ValueError, match=r"^precision: 'quickest' is decided where a recipe meets its network.*bf16 or float32"):
        PRECISIONS["quickest"]("cpu")
    monkeypatch.setattr("attnpool.callback.precision.default_device", lambda: torch.device("cuda"))
    assert quickest("no network is built", 32, 16) == "auto"   # which is mixed there
