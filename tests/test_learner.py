"vision_learner and recipes with real Learners."
import subprocess
import sys
from functools import partial

import pytest
import torch
from fastai.data.all import DataLoaders, TfmdDL
from fastai.vision.all import (Learner, Normalize, TensorCategory, accuracy, load_learner, mobilenet_v2, resnet18, shufflenet_v2_x0_5, squeezenet1_0,
                               trainable_params, vgg11_bn, xresnet18)
from torch import nn

from attnpool.heads import AvgAttnConcatPoolHead, HEADS, LearnedAggregationHead
from attnpool.learner import vision_learner
from dataclasses import replace
from attnpool.recipe import get_recipe, rates_of, Recipe, recipe_learner, RECIPES
from attnpool.settings import GO_ON
from attnpool.models.surgery import map_width, TimmMap
from attnpool.models.xresnet import xeca_resnext_tiny

quiet = dict(pretrained=False)


@pytest.mark.parametrize("arch, ni", [(resnet18, 512), (vgg11_bn, 512), (squeezenet1_0, 512), (xresnet18, 512), (xeca_resnext_tiny, 256),
                                      ("xeca_resnext_tiny", 256), ("resnet10t", 512), ("convnext_atto", 320), ("regnetx_002", 368), ("edgenext_xx_small", 168)])
def test_the_head_gets_the_map_of_any_network(dls, arch, ni):
    learn = vision_learner(dls, arch, custom_head=LearnedAggregationHead, **quiet)
    body, head = learn.model
    assert head[0].attn.ni == ni
    xb = dls.one_batch()[0]
    assert body.eval()(xb).ndim == 4
    assert learn.model(xb).shape == (len(xb), 10)


def test_vision_transformers_give_their_patches_as_a_map(dls):
    learn = vision_learner(dls, "vit_tiny_patch16_224", custom_head=LearnedAggregationHead, **quiet)
    assert learn.model[1][0].attn.ni == 192 and learn.model[0].eval()(dls.one_batch()[0]).shape == (16, 192, 4, 4)   # for the size of dls
    learn = vision_learner(dls, "vit_tiny_patch16_224", custom_head=LearnedAggregationHead, img_size=224, **quiet)
    assert learn.model[0].eval()(torch.randn(1, 3, 224, 224)).shape == (1, 192, 14, 14)


def test_patchconvnet_keeps_its_aggregation_or_takes_a_head(dls):
    own = vision_learner(dls, "patchconvnet_s20", depth=2, **quiet)
    assert type(own.model[0].model.pool).__name__ == "PaperAggregation" and own.model(dls.one_batch()[0]).shape == (16, 10)
    assert len(own.splitter(own.model)) == 3   # stem and first half, second half, the rest: for differential rates
    other = vision_learner(dls, "patchconvnet_s20", depth=2, custom_head=LearnedAggregationHead, **quiet)
    assert other.model[0](dls.one_batch()[0]).shape == (16, 384, 4, 4) and other.model[1][0].attn.ni == 384


@pytest.mark.parametrize("arch, cut, ni", [(resnet18, -3, 256), (resnet18, lambda m: nn.Sequential(*list(m.children())[:-4]), 128), (mobilenet_v2, -1, 1280)])
def test_cut_is_where_the_network_ends(dls, arch, cut, ni):
    learn = vision_learner(dls, arch, custom_head=LearnedAggregationHead, cut=cut, **quiet)
    assert learn.model[1][0].attn.ni == ni and learn.arch is arch
    assert learn.model(dls.one_batch()[0]).shape[1] == 10


def test_what_stands_after_weights_is_named(dls):
    with pytest.raises(TypeError): vision_learner(dls, resnet18, True, 10, False, None, LearnedAggregationHead)


def test_channels_last_networks_of_timm_are_turned():
    import timm
    net = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(TimmMap(net)(x), net.forward_features(x).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_own_initialisation_survives(dls, name):
    torch.manual_seed(3)
    expected = HEADS[name](512, 10).state_dict()
    class Seeded(nn.Sequential):
        def __init__(self, ni, n):
            torch.manual_seed(3)
            super().__init__(HEADS[name](ni, n))
    ours = vision_learner(dls, resnet18, custom_head=Seeded, **quiet).model[1][0].state_dict()
    assert all(torch.equal(expected[k], ours[k]) for k in expected)


def test_init_is_used_when_asked_for(dls):
    ones = vision_learner(dls, resnet18, custom_head=AvgAttnConcatPoolHead, init=nn.init.ones_, **quiet).model[1][-1].weight
    assert torch.equal(ones, torch.ones_like(ones))


def pretrained_arch(pretrained):   # a fastai-style network function whose weights are to be had without a network
    torch.manual_seed(8)
    return xeca_resnext_tiny(10)


def test_pretrained_bodies_are_frozen_and_trained_with_the_head(dls):
    learn = vision_learner(dls, pretrained_arch, pretrained=True, custom_head=LearnedAggregationHead, metrics=accuracy)
    assert {id(p) for group in learn.opt.param_lists for p in group} == {id(p) for p in learn.model.parameters()}
    body, head = learn.model
    assert not any(p.requires_grad for p in trainable_params(nn.Sequential(*[m for m in body.modules() if isinstance(m, nn.Conv2d)])))
    assert all(p.requires_grad for p in head.parameters())
    assert torch.equal(body[0][0].weight, pretrained_arch(True)[0][0].weight)
    before = [p.detach().clone() for p in head.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, base_lr=1e-2)
    assert sum(not torch.equal(a, b) for a, b in zip(before, head.parameters())) > len(before) / 2
    assert all(p.requires_grad for p in learn.model.parameters())


def test_without_a_custom_head_it_is_fastais(dls):
    from fastai.vision.learner import vision_learner as fastais
    torch.manual_seed(1)
    ours = vision_learner(dls, resnet18, **quiet)
    torch.manual_seed(1)
    theirs = fastais(dls, resnet18, **quiet)
    assert str(ours.model) == str(theirs.model)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters()))


@pytest.mark.parametrize("cut, head", [(-3, dict()), (-2, dict(ps=.1, lin_ftrs=[32], concat_pool=False))])
def test_cut_holds_for_fastais_own_head_too(dls, cut, head):
    from fastai.vision.learner import create_body, create_head
    learn = vision_learner(dls, resnet18, cut=cut, **head, **quiet)
    ni = 256 if cut == -3 else 512
    assert str(learn.model) == str(nn.Sequential(create_body(resnet18(), cut=cut), create_head(ni, 10, **head)))


def statistics(dls): return [[round(v, 3) for v in t.mean.flatten().tolist()] for t in dls.after_batch.fs if isinstance(t, Normalize)]


def fresh(n_in=3):
    class Pictures(list): split_idx = 0
    items = Pictures((torch.rand(n_in, 64, 64), TensorCategory(i % 3)) for i in range(4))
    dls = DataLoaders(TfmdDL(items, bs=2, num_workers=0), TfmdDL(items, bs=2, num_workers=0), device=torch.device("cpu"))
    dls.c = 3
    return dls


@pytest.mark.parametrize("head", [None, LearnedAggregationHead])
def test_the_pictures_get_the_statistics_of_the_weights(head, monkeypatch, tmp_path):
    import timm
    from fastai.vision.learner import default_split, model_meta
    quietly = dict(loss_func=nn.CrossEntropyLoss(), custom_head=head, lr=1e-4, moms=(.9, .8, .9), wd=.1)
    known = partial(pretrained_arch)   # a function whose statistics fastai knows
    monkeypatch.setitem(model_meta, known, dict(cut=-4, split=default_split, stats=([.1, .2, .3], [1., 1., 1.])))
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    on_disk = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")))   # as downloaded before
    for arch, expected, published in ((known, [.1, .2, .3], {}), ("resnet10t", [.485, .456, .406], on_disk)):
        dls = fresh()
        learn = vision_learner(dls, arch, **quietly, **published)
        assert statistics(dls) == [expected] and (learn.lr, learn.moms, learn.wd) == (1e-4, (.9, .8, .9), .1)
        vision_learner(dls, arch, **quietly, **published)
        assert statistics(dls) == [expected]   # not a second time
        for options in (dict(normalize=False, **published), dict(pretrained=False)):
            dls = fresh()
            vision_learner(dls, arch, **quietly, **options)
            assert not statistics(dls)
    dls = fresh(1)
    learn = vision_learner(dls, "resnet10t", n_in=1, **quietly, **on_disk)
    assert not statistics(dls) and learn.model(dls.one_batch()[0]).shape == (2, 3)


def test_attributes_are_those_that_fastai_sets(dls):
    for arch in (resnet18, "resnet10t"):
        learn = vision_learner(dls, arch, custom_head=LearnedAggregationHead, n_out=7, **quiet)
        assert (learn.arch, learn.normalize, learn.n_out, learn.pretrained) == (arch, True, 7, False)
        assert len(learn.splitter(learn.model)) == (3 if arch is resnet18 else 2)
        own = vision_learner(dls, arch, custom_head=LearnedAggregationHead, splitter=trainable_params, **quiet)
        assert own.splitter is trainable_params


def test_importing_replaces_nothing_of_others():
    code = """
import sys, warnings
warnings.filterwarnings('ignore')
import fastai.callback.all, fastai.vision.all, fastxtend.vision.models.xresnet, timm, torch, torchvision
def callables():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] not in ('fastai', 'fastcore', 'fasttransform', 'fastxtend', 'timm', 'torch', 'torchvision'): continue
        for key, value in list(vars(module).items()):
            if callable(value): found[name, key] = value
            if isinstance(value, type): found |= {(name, key, k): v for k, v in list(vars(value).items()) if callable(v) or isinstance(v, property)}
    return found
before = callables()
import attnpool.all
after = callables()
print(len(before) > 10_000, *sorted('.'.join(k) for k, v in before.items() if after.get(k) is not v))
print(*sorted(k[2] for k in after.keys() - before.keys() if k[:2] == ('fastai.learner', 'Learner')))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert done[0] == "True", done[0][:2000]
    assert {"fit_recipe", "show_attention", "to_amp"} <= set(done[1].split())


def test_exports_and_loads(dls, tmp_path):
    for arch in (resnet18, "resnet10t"):
        learn = vision_learner(dls, arch, custom_head=AvgAttnConcatPoolHead, path=tmp_path, **quiet)
        learn.export("learner.pkl")
        xb = dls.one_batch()[0]
        assert torch.equal(load_learner(tmp_path / "learner.pkl").model.eval()(xb), learn.model.eval()(xb))


def test_our_networks_in_a_plain_learner(dls):
    model = xeca_resnext_tiny(dls.c, custom_head=LearnedAggregationHead)
    learn = Learner(dls, model, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    assert len(learn.recorder.values) == 1


@pytest.mark.parametrize("make, error, words", [
    (lambda dls: vision_learner(dls, resnet18, custom_head=7, **quiet), TypeError, "custom_head: expected a class or callable"),
    (lambda dls: vision_learner(dls, resnet18, custom_head="concta", **quiet), ValueError, "custom_head: 'concta' is unknown. Did you mean 'concat'?"),
    (lambda dls: vision_learner(dls, resnet18, custom_head=LearnedAggregationHead, n_out=-1, **quiet), ValueError, "n_out: expected at least 1"),
    (lambda dls: vision_learner(dls, lambda pretrained: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.ReLU()), custom_head=LearnedAggregationHead, **quiet),
     ValueError, "has no pooling layer at which to cut it. Pass cut="),
    (lambda dls: vision_learner(dls, lambda pretrained: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.AdaptiveAvgPool2d(1)), custom_head=LearnedAggregationHead, **quiet),
     ValueError, "arch: cannot find the width of its map"),
    (lambda dls: map_width(nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Flatten(2))), ValueError, "tokens (b, n, c) as vision transformers do, instead of a map (b, c, h, w)"),
    (lambda dls: vision_learner(dls, resnet18, custom_head=LearnedAggregationHead, n_out=0, **quiet), ValueError, "n_out: expected at least 1 output, got 0"),
    (lambda dls: vision_learner(dls, resnet18, n_out=0, **quiet), ValueError, "n_out: expected at least 1 output, got 0"),
    (lambda dls: vision_learner(dls, shufflenet_v2_x0_5, custom_head=LearnedAggregationHead, **quiet), ValueError, "of its 56 convolutions"),
    (lambda dls: vision_learner(dls, "resnet10t", custom_head=LearnedAggregationHead, cut=-2, **quiet), ValueError, "cut: a timm network is used whole"),
    (lambda dls: vision_learner(dls, "resnet19", custom_head=LearnedAggregationHead, **quiet), ValueError, "arch: 'resnet19' is unknown. Did you mean"),
    (lambda dls: recipe_learner(dls, bs=64), ValueError, "bs: the DataLoaders decide it, got 64"),
    (lambda dls: Recipe(1, 40, 32, lr={"avg": 1e-2}).for_head("concat"), ValueError, "lr: the recipe has no learning rate for 'concat'"),
    (lambda dls: vision_learner(dls, xeca_resnext_tiny, custom_head=LearnedAggregationHead), ValueError, "Use pretrained=False"),
    (lambda dls: recipe_learner(dls, "xeca_resnext_tny"), ValueError, "arch: 'xeca_resnext_tny' is unknown. Did you mean 'xeca_resnext_tiny'?"),
    (lambda dls: recipe_learner(dls, recipe="quik"), ValueError, "recipe: 'quik' is unknown. Did you mean 'quick'?"),
    (lambda dls: get_recipe("quick", epocs=3), ValueError, "'epocs' is unknown. Did you mean 'epochs'?"),
    (lambda dls: get_recipe("quick", epochs=0), ValueError, "epochs: expected a number above 0, got 0"),
    (lambda dls: get_recipe("quick", opt="sdg"), ValueError, "opt: 'sdg' is unknown"),
    (lambda dls: get_recipe("quick", mix="cutmixp"), ValueError, "mix: 'cutmixp' is unknown. Did you mean 'cutmixup'?"),
    (lambda dls: get_recipe("quick", precision="bf61"), ValueError, "precision: 'bf61' is unknown. Did you mean 'bf16'?"),
    (lambda dls: get_recipe("quick", label_smoothing=1.), ValueError, "label_smoothing: expected a share in [0, 1), got 1.0"),
])
def test_bad_input(dls, make, error, words):
    with pytest.raises(error) as e: make(dls)
    assert words in str(e.value)


def test_width_of_a_body_that_needs_large_pictures():
    body = nn.Sequential(nn.Conv2d(3, 24, 65, stride=8), nn.ReLU())
    body[1].eval()
    body.train()
    body[1].training = False
    assert map_width(body) == 24
    assert [m.training for m in body.modules()] == [True, True, False]


@pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.loss != "balanced"])
@pytest.mark.parametrize("head", ["avg", LearnedAggregationHead, partial(LearnedAggregationHead, ffn_expand=1)])
def test_recipes_train(dls, recipe, head):
    r = RECIPES[recipe]
    trained = r.train != "all" or recipe in GO_ON   # a function may bring its weights along
    if r.bs > len(dls.train_ds): r = replace(r, bs=16, micro_bs=r.micro_bs and 8)
    arch, epochs = (xeca_resnext_tiny, 2) if trained else ("xeca_resnext_tiny", 1)
    learn = recipe_learner(dls, arch, head, r, epochs=epochs, lr=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert torch.tensor(learn.recorder.values[0]).isfinite().all()
    assert learn.recipe.lr == 1e-3


def test_recipes_hold_what_their_sources_say():
    blog = get_recipe("blog", "avg", "imagenette")
    assert (blog.epochs, blog.size, blog.bs, blog.lr, blog.opt, blog.schedule, blog.mix) == (80, 224, 64, 8e-3, "ranger", "flat_cos", "cutmixup-batch")
    rates = {(d, h): get_recipe("blog", h, d).lr for d in ("imagenette", "imagewoof", "petals") for h in (*HEADS, "avgattn-act")}
    from attnpool.report.published import published
    facts = published()
    facts = facts[(facts["size"] == 224) & (facts.metric == "valid_loss") & (facts["head"] != "avg")]
    for r in facts.itertuples(): assert rates[r.data, r.head] == (4e-3 if "4e-3" in str(r.note) else r.lr), (r.data, r.head)
    assert all(rates[d, "avg"] == 8e-3 for d in ("imagenette", "imagewoof", "petals"))


def test_a_recipe_reaches_the_learner(dls):
    from attnpool.callback.cutmixup import CutMixUpAugment
    from attnpool.callback.precision import MixedPrecision
    learn = recipe_learner(dls, "xeca_resnext_tiny", "slim", "mixed", epochs=1)
    kinds = [type(cb) for cb in learn.cbs]
    assert CutMixUpAugment in kinds and MixedPrecision in kinds and learn.loss_func.eps == .1
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert learn.recorder.metric_names[3:-1] == ["accuracy", "balanced_accuracy_score", "f1_score", "matthews_corrcoef"]
    assert torch.isfinite(torch.tensor(learn.recorder.values[0])).all()


def test_a_partial_trains_at_its_heads_rate(dls):
    head = partial(AvgAttnConcatPoolHead, ffn_expand=1)
    assert recipe_learner(dls, "xeca_resnext_tiny", head).recipe.lr == rates_of("quick")["concat"]


def test_every_head_has_its_learning_rate():
    for name, recipe in RECIPES.items():
        if recipe.lr is None and recipe.train != "frozen": assert set(HEADS) | {"*"} <= {k for k in rates_of(name) if "/" not in k}, name
    assert get_recipe("quick", "avg").lr == rates_of("quick")["avg"]
    assert Recipe(1, 40, 32, lr={"avg": 1e-2}).for_head("avg").lr == 1e-2
    assert get_recipe("quick", "somebody's").lr == rates_of("quick")["*"]

