"vision_learner and recipes with real Learners."
from functools import partial

import pytest
import torch
from fastai.vision.all import (Learner, accuracy, load_learner, mobilenet_v2, resnet18, shufflenet_v2_x0_5, squeezenet1_0, trainable_params,
                               vgg11_bn, xresnet18)
from torch import nn

from attnpool.heads import AvgAttnConcatPoolHead, HEADS, LearnedAggregationHead
from attnpool.learner import vision_learner
from attnpool.recipe import get_recipe, Recipe, recipe_learner, RECIPES
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
    assert learn.model[1][0].attn.ni == 192 and learn.model[0].eval()(torch.randn(1, 3, 224, 224)).shape == (1, 192, 14, 14)


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
    (lambda dls: vision_learner(dls, resnet18, custom_head="concat", **quiet), TypeError, "custom_head: expected a class or callable"),
    (lambda dls: vision_learner(dls, resnet18, custom_head=LearnedAggregationHead, n_out=-1, **quiet), ValueError, "n_out: expected at least 1"),
    (lambda dls: vision_learner(dls, lambda pretrained: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), custom_head=LearnedAggregationHead, **quiet),
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


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("head", ["avg", LearnedAggregationHead, partial(LearnedAggregationHead, ffn_expand=1)])
def test_recipes_train(dls, recipe, head):
    learn = recipe_learner(dls, "xeca_resnext_tiny", head, recipe, epochs=1, lr=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert learn.recorder.values[0][-1] >= 0
    assert learn.recipe.lr == 1e-3


def test_recipes_hold_what_their_sources_say():
    blog = get_recipe("blog", "avg", "imagenette")
    assert (blog.epochs, blog.size, blog.bs, blog.lr, blog.opt, blog.schedule, blog.mix) == (80, 224, 64, 8e-3, "ranger", "flat_cos", "cutmixup")
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
    assert recipe_learner(dls, "xeca_resnext_tiny", head).recipe.lr == RECIPES["quick"].lr["concat"]


def test_every_head_has_its_learning_rate():
    for name, recipe in RECIPES.items():
        if isinstance(recipe.lr, dict): assert set(HEADS) | {"*"} == {k for k in recipe.lr if "/" not in k}, name
    assert get_recipe("quick", "avg").lr == RECIPES["quick"].lr["avg"]
    assert Recipe(1, 40, 32, lr={"avg": 1e-2}).for_head("avg").lr == 1e-2
    assert get_recipe("quick", "somebody's").lr == RECIPES["quick"].lr["*"]

