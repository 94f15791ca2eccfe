"Every setting of a training, from the command line to the weights."
import inspect
from dataclasses import fields, replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from fastai.vision.all import Categorize, CrossEntropyLossFlat, Datasets, Learner
from torch import nn

import attnpool.recipe
from attnpool.cli import main
from attnpool.data.digits import digits_dls
from attnpool.heads import AvgAttnConcatPoolHead, HEADS
from attnpool.models.xresnet import ARCHS
from attnpool.recipe import (
    decided, get_recipe, learner_for, MIXES, NAMES, rates_of, Recipe, recipe_learner, RECIPES, network_for, SCHEDULES)
from attnpool.registry import BadInput

SETTINGS = [f for f in fields(Recipe) if f.compare]


def other(field):
    "A value that is not its default."
    if field.name in NAMES: return [name for name in NAMES[field.name] if name != field.default or len(NAMES[field.name]) == 1][-1]
    return 24 if int in (field.type, *get_args(field.type)) else .25


@pytest.fixture
def asked(monkeypatch):
    "The specs that a command would have made runs of."
    import attnpool.runs.sweep as sweeping
    specs = []
    monkeypatch.setattr(sweeping, "sweep", lambda todo, *args: specs.extend(todo) or [])
    return specs


def test_every_field_is_an_option_and_reaches_the_spec(asked, capsys, tmp_path):
    torch.save(ARCHS["xeca_resnext_tiny"](10).state_dict(), file := tmp_path / "body.pth")
    of_one = dict(freeze_epochs=dict(train="finetune", schedule="one_cycle", freeze_epochs=2), views=dict(train="frozen", augment="light", views=2),
                  min_steps=dict(min_steps=24))
    values = {f.name: other(f) for f in SETTINGS if f.name not in of_one} | dict(train="head", schedule="cosine", precision="bf16", loss="cross_entropy")   # with which all others can be meant; quickest is resolved
    for values in (values, *of_one.values()):
        flags = [word for k, v in values.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        with pytest.raises(SystemExit) as e:
            main(["bench", "digits", "--heads", "avg,slim", "--seeds", "1", "--device", "cpu", "--start", str(file), *flags])
        specs = [asked.pop() for _ in list(asked)][::-1]
        assert e.value.code == 0 and len(specs) == 2, capsys.readouterr().err
        for s in specs: assert s.recipe == get_recipe("quick", s.head, **values) and decided(s.recipe).keys() >= values.keys() - {"loss"}
    with pytest.raises(SystemExit): main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{f.name.replace('_', '-')} " in text for f in SETTINGS)
    words = " ".join(text.split()).replace("- ", "-")   # a line may end at a hyphen
    for table in NAMES.values(): assert ", ".join(table) in words
    assert "`" not in words


@pytest.mark.parametrize("changes, steps, least", [
    (dict(), None, 200), (dict(lr=1e-3), None, 200), (dict(epochs=4), None, None), (dict(epochs=4, min_steps=50), None, 50), (dict(steps=60), 60, None),
    (dict(epochs=4, steps=60), 60, None), (dict(train="frozen", augment="none"), None, None)])
def test_passes_that_were_asked_for_are_passes(changes, steps, least):
    r = get_recipe("finetune", "avg", **changes)
    assert (r.steps, r.min_steps) == (steps, least)


def test_steps_of_an_epoch():
    least, fixed, plain = Recipe(6, 128, 32, min_steps=200), Recipe(6, 128, 32, steps=120), Recipe(6, 128, 32)
    assert [least.epoch_steps(n) for n in (8, 90, 1087, 1088, 5000)] == [34, 34, 34, None, None]
    assert [r.epoch_steps(n) for r in (fixed, plain) for n in (90, 5000)] == [20, 20, None, None]
    assert [least.shown(n) for n in (90, 5000)] == [6 * 34 * 32, 30_000] and fixed.shown(90) == 120 * 32 and plain.shown(90) == 540
    with pytest.raises(BadInput, match="min_steps: steps says how many there are, 60, got 50. Leave one out."): Recipe(6, 128, 32, steps=60, min_steps=50)


def test_tuning_has_the_same_options_but_the_rate(asked, capsys):
    with pytest.raises(SystemExit): main(["lr", "--help"])
    text = capsys.readouterr().out
    assert all((f"--{f.name.replace('_', '-')} " in text) == (f.name != "lr") for f in SETTINGS)
    with pytest.raises(Exception): main(   # no results to choose from
        ["lr", "digits", "--heads", "avg,slim", "--rates", "1e-3,1e-2", "--seeds", "0", "--opt", "lamb", "--device", "cpu"])
    assert [(s.head, s.recipe.lr, s.recipe.opt) for s in asked] == [(h, r, "lamb") for h in ("avg", "slim") for r in (1e-3, 1e-2)]


def test_a_new_field_is_an_option_without_a_word_elsewhere(monkeypatch, capsys, tmp_path):
    line = "    views: int = 1 # Views of each picture that stand in one batch\n    noisy: bool = False # Whether noise is added\n"
    source = inspect.getsource(Recipe).replace("    train: str", line + "    train: str")
    (tmp_path / "wider.py").write_text("import attnpool.settings\nglobals().update({k: v for k, v in vars(attnpool.settings).items() if k[:2] != '__'})\n\n" + source)
    monkeypatch.syspath_prepend(tmp_path)
    import wider
    monkeypatch.setattr(attnpool.recipe, "Recipe", wider.Recipe)
    with pytest.raises(SystemExit): main(["bench", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--views <int> Views of each picture that stand in one batch. [default: the recipe's]" in words and "--noisy / --no-noisy" in words


@pytest.mark.parametrize("change, words", [
    (dict(epochs=0), "epochs: expected a number above 0, got 0"),
    (dict(epochs=2.5), "epochs: expected a whole number, got 2.5"),
    (dict(size="40"), "size: expected a number above 0, got '40'"),
    (dict(bs=True), "bs: expected a number above 0, got True"),
    (dict(lr=float("nan")), "lr: expected a number above 0, got nan"),
    (dict(lr=float("inf")), "lr: expected a number above 0, got inf"),
    (dict(lr={"avg": -1}), "lr: expected a number above 0, got -1"),
    (dict(wd=-.1), "wd: expected a number of 0 or more, got -0.1"),
    (dict(label_smoothing=1.), r"label_smoothing: expected a share in \[0, 1\), got 1.0"),
    (dict(drop_path=-.1), r"drop_path: expected a share in \[0, 1\), got -0.1"),
    (dict(warmup=.1), "warmup: flat_cos begins at its rate, got 0.1. Use schedule one_cycle or cosine"),
    (dict(train="haed"), "train: 'haed' is unknown. Did you mean 'head'?"),
    (dict(loss="crossentropy"), "loss: 'crossentropy' is unknown. Did you mean 'cross_entropy'?"),
    (dict(augment="nothing"), "augment: 'nothing' is unknown"),
    (dict(precision=None), "precision: None is unknown"),
])
def test_what_cannot_be_meant_is_an_error_at_once(change, words):
    with pytest.raises(BadInput, match=words): Recipe(**dict(epochs=8, size=40, bs=32) | change)
    with pytest.raises(BadInput, match=words): replace(RECIPES["mixed"], **change)


def test_an_unknown_field_is_told_with_the_nearest(dls):
    for f in (partial(get_recipe, "quick"), partial(recipe_learner, dls)):
        with pytest.raises(BadInput, match="recipe: 'epocs' is unknown. Did you mean 'epochs'?"): f(epocs=3)
    with pytest.raises(BadInput, match="recipe: 'name' is unknown"): get_recipe("quick", name="mine")   # no setting


def test_numbers_of_any_kind_are_the_same_recipe():
    a, b = Recipe(8, 40, 32, lr=1, wd=0), Recipe(np.int64(8), 40., np.int32(32), lr=np.float32(1), wd=np.float64(0))
    assert a == b and repr(a) == repr(b) == "Recipe(epochs=8, size=40, bs=32, lr=1.0, wd=0.0)"
    assert Recipe(None, None, None, 1e-3).epochs is None   # of another's training, not known


def test_a_recipe_at_hand_is_used_as_it_is(dls):
    recipe = Recipe(1, 40, 32, lr=.123, opt="lamb", schedule="cosine", precision="float32")
    assert recipe_learner(dls, "xeca_resnext_tiny", "slim", recipe).recipe is recipe and get_recipe(recipe) is recipe
    assert recipe_learner(dls, "xeca_resnext_tiny", "slim", RECIPES["quick"]).recipe == get_recipe("quick", "slim")
    with pytest.raises(BadInput, match="lr: the recipe has no learning rate for 'slim'"):
        recipe_learner(dls, "xeca_resnext_tiny", "slim", Recipe(1, 40, 32, lr={"avg": 1e-2}))


def test_rates_belong_to_head_data_and_recipe(dls):
    assert get_recipe("quick", "avg").lr == rates_of("quick")["avg"] and get_recipe("quick", "somebody's").lr == rates_of("quick")["*"]
    assert get_recipe("quick", "concat", "imagenette").lr == rates_of("quick")["imagenette/concat"] != get_recipe("quick", "concat").lr
    mine = Recipe(1, 40, 32, lr={"avg": 1e-2, "slim": 2e-2, "*": 3e-2})
    assert {head: mine.for_head(head).lr for head in ("avg", "slim-rms", "slim-of-mine", "avg-norm", None)} == \
        {"avg": 1e-2, "slim-rms": 2e-2, "slim-of-mine": 2e-2, "avg-norm": 3e-2, None: 3e-2}   # a peer is no ablation
    assert replace(mine, lr={"avg-norm": 4e-2, "*": 3e-2}).for_head("avg-norm").lr == 4e-2
    assert recipe_learner(dls, "xeca_resnext_tiny", partial(AvgAttnConcatPoolHead, ffn_expand=1)).recipe.lr == rates_of("quick")["concat"]
    for name, recipe in RECIPES.items():
        if rates_of(name): assert set(HEADS) | {"*"} <= {k for k in rates_of(name) if "/" not in k}, name
        else: assert isinstance(recipe.lr, float) or recipe.train == "frozen", name   # which finds its own


def flat_learner(**kwargs):
    return Learner(digits_dls(24, 16, "cpu", 320, 16), nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 10)), CrossEntropyLossFlat(), **kwargs)


@pytest.mark.parametrize("schedule, own", [("one_cycle", .25), ("cosine", .05)])
@pytest.mark.parametrize("warmup", [None, .5])
def test_the_rate_rises_for_its_share_of_the_training(schedule, own, warmup):
    learn = flat_learner()
    with learn.no_bar(), learn.no_logging(): SCHEDULES[schedule](learn, 2, 1e-2, warmup)
    lrs = np.array(learn.recorder.lrs)
    assert len(lrs) == 40 and max(lrs) == pytest.approx(1e-2, rel=.02)
    assert abs(lrs.argmax() / 40 - (own if warmup is None else warmup)) <= 1 / 40 + 1e-9


def test_stochastic_depth_reaches_our_networks_and_timms(dls):
    from timm.layers import DropPath
    def drops(arch, p): return [m for m in network_for(dls, arch, HEADS["avg"], p)[0].modules() if "drop" in type(m).__name__.lower() or "stoch" in type(m).__name__.lower()]
    assert len(drops("xeca_resnext_tiny", .2)) > len(drops("xeca_resnext_tiny", 0.))
    assert any(isinstance(m, DropPath) for m in drops("resnet10t", .2)) and not any(isinstance(m, DropPath) for m in drops("resnet10t", 0.))
    with pytest.raises(BadInput, match="drop_path: the network ghostnet_050 has no such option"): network_for(dls, "ghostnet_050", HEADS["avg"], .2)


def test_with_train_head_no_number_of_the_body_changes(dls):
    recipe = get_recipe("quick", "learned", epochs=2, train="head", drop_path=.5, precision="float32")
    learn = recipe_learner(dls, "xeca_resnext_tiny", "learned", recipe)
    last = f"{len(learn.model) - 1}."
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    changed = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    assert any("running_mean" in k for k in before) and changed and all(k.startswith(last) for k in changed)
    assert all(p.requires_grad for p in learn.model.parameters())   # as it was
    learn.recipe = replace(recipe, train="all")
    free = learner_for(dls, learn.model, learn.recipe, learn.loss_func, [])
    with free.no_bar(), free.no_logging(): free.fit_recipe()
    assert not torch.equal(learn.model.state_dict()["0.0.weight"], before["0.0.weight"])


def kinds(mix, batches=30, bs=16):
    "What happened to each picture, by batch. A picture is one colour of its own: mixed up it is another, cut and mixed it has two."
    items = list(range(bs))
    def picture(i): return torch.full((3, 16, 16), float(2**i))
    dls = Datasets(items, [picture, [lambda i: i, Categorize(items)]], splits=(items, items[:2])).dataloaders(bs=bs, val_bs=2, device="cpu", num_workers=0)
    seen = []
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(bs))
        def forward(self, x):
            if self.training: seen.append(["cut" if len(p.unique()) > 1 else "own" if p.max().log2() % 1 == 0 else "up" for p in x])
            return x.mean((1, 2, 3))[:, None] * self.weight
    learn = Learner(dls, Net(), CrossEntropyLossFlat(), lr=0., cbs=MIXES[mix]())
    with learn.no_bar(), learn.no_logging(): learn.fit(batches)
    return seen


def test_the_blog_decides_for_a_batch_and_mixed_for_each_sample():
    assert RECIPES["blog"].mix == "cutmixup-batch" and RECIPES["mixed"].mix == "cutmixup"
    torch.manual_seed(0)
    whole = kinds("cutmixup-batch")
    assert all(len({k for k in batch if k != "own"}) <= 1 for batch in whole)   # one mixed with itself looks like its own
    assert {max(set(batch), key=batch.count) for batch in whole} == {"up", "cut", "own"}
    single = kinds("cutmixup")
    assert sum({"up", "cut", "own"} <= set(batch) for batch in single) > 20
