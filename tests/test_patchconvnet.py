"PatchConvNet against a slow, literal form of the paper's equations, and against the authors' file where ATTNPOOL_DEIT names a clone."
import importlib.util
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
from torch import nn

from attnpool.cost.networks import PeakMemory
from attnpool.heads import AvgAttnConcatPoolHead, HEADS
from attnpool.layers import TokenBatchNorm
from attnpool.models import deit as named
from attnpool.models.deit import default_cfgs, from_deit, load_deit, to_deit, VARIANTS
from attnpool.models.patchconvnet import patch_stem, PatchConvBlock, PatchConvNet
from attnpool.pooling.paper import PaperAggregation, PerClassLinear, _in_slices
from attnpool.models.surgery import timm_splitter, TimmMap, with_head

FORMS = dict(single=dict(), heads=dict(num_heads=4), classes=dict(class_queries=True), class_heads=dict(class_queries=True, num_heads=4))


def tiny(**options): return PatchConvNet(**dict(embed_dim=32, depth=2, num_classes=7, gamma_init=.3) | options)


# The slow form: names of the authors' state dict, one equation per line, float64.

def conv(x, w, b=None, stride=1, pad=0, groups=1):
    "Convolution as a sum over the places of its kernel."
    k, (h, wd) = w.shape[-1], x.shape[2:]
    x = torch.nn.functional.pad(x, [pad] * 4)
    ho, wo = (h + 2 * pad - k) // stride + 1, (wd + 2 * pad - k) // stride + 1
    out = 0
    for i in range(k):
        for j in range(k):
            part = x[:, :, i:i + stride * (ho - 1) + 1:stride, j:j + stride * (wo - 1) + 1:stride]
            out = out + (part * w[:, 0, i, j][:, None, None] if groups > 1 else torch.einsum("bchw,oc->bohw", part, w[:, :, i, j]))
    return out if b is None else out + b[:, None, None]


def gelu(x): return x * (1 + torch.erf(x / math.sqrt(2))) / 2
def linear(x, s, name): return x @ s[name + ".weight"].T + s[name + ".bias"]


def layer_norm(x, s, name):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * s[name + ".weight"] + s[name + ".bias"]


def slow(s, x, heads=1, per_class=False):
    "Logits and attention weights `(b, queries, heads, positions)`, the query's own first in the single form."
    for i in (0, 2, 4, 6):
        x = conv(x, s[f"patch_embed.proj.{i}.0.weight"], stride=2, pad=1)
        if i < 6: x = gelu(x)
    b, c, h, w = x.shape
    x = x.flatten(2).transpose(1, 2)
    depth = 1 + max(int(k.split(".")[1]) for k in s if k.startswith("blocks."))
    for i in range(depth):
        p = f"blocks.{i}.attn.qkv_pos."
        y = layer_norm(x, s, f"blocks.{i}.norm1").transpose(1, 2).unflatten(2, (h, w))
        y = gelu(conv(y, s[p + "0.weight"], s[p + "0.bias"]))
        y = gelu(conv(y, s[p + "2.weight"], s[p + "2.bias"], pad=1, groups=c))
        squeeze = conv(y.mean((2, 3), keepdim=True), s[p + "4.conv_reduce.weight"], s[p + "4.conv_reduce.bias"]).clamp(min=0)
        y = y / (1 + torch.exp(-conv(squeeze, s[p + "4.conv_expand.weight"], s[p + "4.conv_expand.bias"])))
        y = conv(y, s[p + "5.weight"], s[p + "5.bias"])
        x = x + s[f"blocks.{i}.gamma_1"] * y.flatten(2).transpose(1, 2)
    p, z = "blocks_token_only.0.", s["cls_token"].expand(b, -1, -1)
    k = z.shape[1]
    u = layer_norm(torch.cat([z, x], 1), s, p + "norm1")
    query, seen = u[:, :k], u[:, k:] if per_class else u
    split = lambda t: t.unflatten(2, (heads, c // heads)).transpose(1, 2)
    Q, K, V = (split(linear(t, s, p + "attn." + n)) for t, n in ((query, "q"), (seen, "k"), (seen, "v")))
    e = torch.exp(Q @ K.transpose(2, 3) / math.sqrt(c / heads))
    a = e / e.sum(-1, keepdim=True)
    z = z + s[p + "gamma_1"] * linear((a @ V).transpose(1, 2).flatten(2), s, p + "attn.proj")
    z = z + s[p + "gamma_2"] * linear(gelu(linear(layer_norm(z, s, p + "norm2"), s, p + "mlp.fc1")), s, p + "mlp.fc2")
    z = layer_norm(z, s, "norm")
    if not per_class: return linear(z[:, 0], s, "head"), a.transpose(1, 2)
    return torch.cat([linear(z[:, i], s, f"head.{i}") for i in range(k)], 1), a.transpose(1, 2)


def random_deit(options, dtype=torch.float64):
    "A random state dict under the authors' names."
    model = tiny(**options).to(dtype)
    return {k: torch.randn_like(v) * (.3 if v.ndim > 1 else .1) + (1 if "norm" in k and k.endswith("weight") else 0)
            for k, v in to_deit(model.state_dict(), options.get("class_queries")).items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_logits_gradients_and_attention_are_the_papers(form, size):
    options, x = FORMS[form], torch.randn(3, 3, *size, dtype=torch.float64)
    theirs = {k: v.requires_grad_() for k, v in random_deit(options).items()}
    model = load_deit(tiny(**options).double(), {"model": {k: v.detach() for k, v in theirs.items()}})
    per_class = options.get("class_queries", False)
    expected, weights = slow(theirs, x, options.get("num_heads", 1), per_class)
    logits = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    logits.backward(upstream)
    expected.backward(upstream)
    grads = to_deit({k: p.grad for k, p in model.named_parameters()}, per_class)
    for name, p in theirs.items():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-10 * max(1, p.grad.abs().max().item()), msg=name)
    maps = model.pool.attention_map(model.forward_features(x))
    own = 0 if per_class else 1   # our maps sum to one over the map, theirs over map and query
    over_map = (weights[..., own:] / weights[..., own:].sum(-1, keepdim=True)).flatten(1, 2)
    torch.testing.assert_close(maps.flatten(2), over_map, rtol=1e-10, atol=1e-12)


def test_batch_norm_takes_statistics_of_query_and_positions_together():
    pool = PaperAggregation(16, norm=TokenBatchNorm, gamma_init=.5).double()
    x = torch.randn(4, 16, 3, 2, dtype=torch.float64)
    u = torch.cat([pool.query.expand(4, 1, -1), x.flatten(2).mT], 1)
    n = (u - u.mean((0, 1))) / (u.var((0, 1), unbiased=False) + 1e-5).sqrt()
    a = (pool.attn.q(n[:, :1]) @ pool.attn.k(n).mT / 4).softmax(-1)
    z = pool.query + .5 * pool.attn.proj(a @ pool.attn.v(n))[:, 0]
    m = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(pool(x), z + .5 * pool.ffn(m), rtol=1e-10, atol=1e-10)
    pool.eval()
    u = pool.attn.norm(u)
    a = (pool.attn.q(u[:, :1]) @ pool.attn.k(u).mT / 4).softmax(-1)
    z = pool.query + .5 * pool.attn.proj(a @ pool.attn.v(u))[:, 0]
    torch.testing.assert_close(pool(x), z + .5 * pool.ffn(pool.norm(z)), rtol=1e-10, atol=1e-10)


# The authors' own file

def deit():
    path = os.environ.get("ATTNPOOL_DEIT")
    if not path: pytest.skip("ATTNPOOL_DEIT names no clone of facebookresearch/deit")
    from timm.models import _efficientnet_blocks, _registry
    for name, module in {"efficientnet_blocks": _efficientnet_blocks, "registry": _registry}.items():   # as timm called them then
        sys.modules.setdefault(f"timm.models.{name}", module)
    sys.modules["timm.models.layers"] = timm.layers
    spec = importlib.util.spec_from_file_location("deit_patchconvnet", Path(path) / "patchconvnet_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", FORMS)
def test_same_numbers_as_the_authors_file(form):
    d, options = deit(), FORMS[form]
    multi = options.get("class_queries", False)
    more = dict(Attention_block_token_only=partial(d.Learned_Aggregation_Layer_multi, num_classes=7)) if multi else {}
    theirs = d.PatchConvnet(embed_dim=32, depth=2, num_classes=7, num_heads=options.get("num_heads", 1), qkv_bias=True, multiclass=multi, init_scale=.3,
                            norm_layer=partial(nn.LayerNorm, eps=1e-6), Attention_block=d.Conv_blocks_se, **more).double()
    theirs.load_state_dict(random_deit(options))
    ours, x = load_deit(tiny(**options).double(), theirs.state_dict()), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    a, b = theirs(x), ours(x)
    torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(a)
    a.backward(upstream), b.backward(upstream)
    grads = to_deit({k: p.grad for k, p in ours.named_parameters()}, multi)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-10 * max(1, p.grad.abs().max().item()), msg=name)


# The parts

@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_stem(patch, kind):
    assert patch_stem(5, 32, patch, kind)(torch.randn(2, 5, 2 * patch, 3 * patch)).shape == (2, 32, 2, 3)


def test_stochastic_depth_leaves_out_what_it_drops():
    block = PatchConvBlock(16, drop_path_rate=.5, gamma_init=1.).double()
    x = torch.randn(64, 16, 4, 4, dtype=torch.float64)
    whole = block.eval()(x) - x
    change = block.train()(x) - x
    dropped = (change == 0).flatten(1).all(1)
    assert 10 < dropped.sum() < 54
    torch.testing.assert_close(change[~dropped], 2 * whole[~dropped])


def test_stochastic_depth_that_drops_everything_has_gradients():
    block = PatchConvBlock(16, drop_path_rate=.999)
    x = torch.randn(2, 16, 4, 4)
    torch.manual_seed(0)
    out = block(x)
    assert torch.equal(out, x)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_slices_change_nothing():
    f = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)).double()
    x = torch.randn(3, 10, 8, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(_in_slices(f, x, rows).square().sum(), [x, *f.parameters()]) for rows in (7, 1000)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b)


def test_per_class_linear_is_one_layer_per_class():
    layer, x = PerClassLinear(8, 5), torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x), (x * layer.weight).sum(-1) + layer.bias)


# The network

@pytest.mark.parametrize("options", [{}, dict(global_pool="avg"), dict(stem="linear"), dict(norm=TokenBatchNorm), dict(num_heads=4), dict(class_queries=True),
                                     dict(class_queries=True, norm=TokenBatchNorm), dict(drop_path_rate=.4, drop_rate=.1, proj_drop_rate=.1, attn_drop_rate=.1)],
                         ids=str)
def test_every_ablation_trains_saves_and_loads(options, tmp_path):
    model, x = tiny(**options), torch.randn(4, 3, 48, 32)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    twin = tiny(**options)
    twin.load_state_dict(torch.load(tmp_path / "w.pt"))
    torch.testing.assert_close(twin.eval()(x), model.eval()(x))
    assert model(x).shape == (4, 7)


@pytest.mark.parametrize("options", [dict(patch_size=8), dict(patch_size=32), dict(in_chans=1), dict(in_chans=5)], ids=str)
@pytest.mark.parametrize("size", [(32, 32), (32, 96), (160, 64)])
@pytest.mark.parametrize("form", ["single", "classes"])
def test_any_input(options, size, form):
    model = tiny(**options, **FORMS[form])
    x = torch.randn(2, options.get("in_chans", 3), *size)
    fmap = model.forward_features(x)
    assert fmap.shape == (2, 32, *(s // model.patch_size for s in size))
    assert model(x).shape == (2, 7)
    maps = model.pool.attention_map(fmap)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 7 if form == "classes" else 1))


def test_memory_order_and_batch_do_not_matter():
    model, x = tiny().eval(), torch.randn(3, 3, 64, 48)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), model(x))
    assert model(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["single", "classes"])
def test_half_precision_and_autocast(dtype, form):
    model, x = tiny(gamma_init=1e-6, **FORMS[form]).eval(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(model.to(dtype)(x.to(dtype)).float(), expected, rtol=.1, atol=.03)
    with torch.autocast("cpu", dtype): torch.testing.assert_close(model.float()(x).float(), expected, rtol=.1, atol=.03)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_memory_only(form):
    model, x = tiny(**FORMS[form]).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).sum().backward()
    for p, g in zip(model.parameters(), grads): torch.testing.assert_close(p.grad, g)


def test_one_class_and_features():
    x = torch.randn(2, 3, 32, 32)
    for form in FORMS.values():
        assert tiny(**form | dict(num_classes=1))(x).shape == (2, 1)
        assert tiny(**form | dict(num_classes=0))(x).shape == (2, 32)
    one = tiny(class_queries=True, num_classes=1)
    assert not one.pool.sees_itself and len(one.pool.query) == 1
    back = to_deit(one.state_dict(), class_queries=True)
    assert back["head.0.weight"].shape == (1, 32) and back["cls_token"].shape == (1, 1, 32)
    load_deit(tiny(class_queries=True, num_classes=1), back)


def test_reset_classifier():
    x = torch.randn(2, 3, 32, 32)
    model = tiny(class_queries=True)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and len(model.pool.query) == 3 and model.get_classifier() is model.head
    query = model.pool.query
    model.reset_classifier(0)
    assert model(x).shape == (2, 32) and model.pool.query is not query
    single = tiny()
    query = single.pool.query
    single.reset_classifier(5)
    assert single.pool.query is query and single(x).shape == (2, 5)
    single.reset_classifier(5, "avg")
    assert single(x).shape == (2, 5)
    single.reset_classifier(0, "")
    assert single(x).shape == (2, 32, 2, 2)


@pytest.mark.parametrize("make, message", [
    (lambda: tiny(depth=0), "depth: expected at least 1"),
    (lambda: tiny(num_classes=-1), "num_classes"),
    (lambda: tiny(patch_size=12), "patch_size"),
    (lambda: tiny(stem="patch"), "stem"),
    (lambda: tiny(embed_dim=4), "embed_dim"),
    (lambda: tiny(num_heads=5), "num_heads"),
    (lambda: tiny(global_pool="max"), "global_pool"),
    (lambda: tiny(global_pool=""), "Use num_classes=0"),
    (lambda: tiny(global_pool="avg", class_queries=True), "class_queries"),
    (lambda: tiny(drop_path_rate=1.), "drop_path_rate"),
    (lambda: tiny(norm=nn.BatchNorm2d), "TokenBatchNorm"),
    (lambda: tiny()(torch.randn(1, 3, 40, 64)), "48x64"),
    (lambda: tiny()(torch.randn(1, 3, 8, 16)), "16x16"),
    (lambda: PaperAggregation(8, queries=0), "queries"),
    (lambda: PaperAggregation(8, queries=2), "sees_itself=False"),
    (lambda: load_deit(tiny(), to_deit(tiny(num_classes=9).state_dict())), r"head.weight is \(9, 32\) instead of \(7, 32\)"),
    (lambda: load_deit(tiny(), to_deit(tiny(depth=3).state_dict())), "blocks.2.norm.weight is not in the network"),
    (lambda: load_deit(tiny(depth=3), to_deit(tiny().state_dict())), "is missing"),
    (lambda: to_deit(tiny(global_pool="avg").state_dict()), "global_pool='learned'"),
    (lambda: timm_splitter(nn.Linear(2, 2)), "group_matcher"),
])
def test_mistakes_say_what_to_type(make, message):
    with pytest.raises(ValueError, match=message): make()


# timm

def test_registered():
    names = timm.list_models("patchconvnet*")
    assert set(names) == set(VARIANTS) and len(names) == 25
    assert {f"patchconvnet_{w}{d}" for w in "sbl" for d in (20, 36, 60, 120)} < set(names)
    assert len(timm.list_models("patchconvnet*", pretrained=True)) == 13
    gammas = {n: VARIANTS[f"patchconvnet_{n}"]["gamma_init"] for n in ("s60", "s60_multi", "s120", "b60", "b120", "l60", "l120")}
    assert gammas == dict(s60=1e-4, s60_multi=1e-4) | {n: 1e-6 for n in ("s120", "b60", "b120", "l60", "l120")}
    with pytest.raises(RuntimeError, match="Unknown model"): timm.create_model("patchconvnet_s61")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_builds_with_its_config(name):
    with torch.device("meta"): model = timm.create_model(name, num_classes=3)
    cfg = model.default_cfg
    assert cfg["pool_size"] == (cfg["input_size"][1] // model.patch_size, cfg["input_size"][2] // model.patch_size) and model.get_submodule(cfg["first_conv"]) is model.stem[0] and model.get_submodule(cfg["classifier"]) is model.head
    assert model.num_features == VARIANTS[name]["embed_dim"] and len(model.blocks) == VARIANTS[name]["depth"]
    assert getattr(named, name).__name__ == name


def test_a_named_network_takes_options():
    model = timm.create_model("patchconvnet_s20", num_classes=5, in_chans=4, drop_path_rate=.2, depth=1, embed_dim=32)
    assert model(torch.randn(2, 4, 32, 48)).shape == (2, 5)
    assert model.blocks[0].drop_path.drop_prob == .2
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


def test_features_only_and_intermediates():
    model = timm.create_model("patchconvnet_s20", depth=4, embed_dim=32, features_only=True, out_indices=(1, 3))
    maps = model(torch.randn(2, 3, 32, 64))
    assert [m.shape for m in maps] == [(2, 32, 2, 4)] * 2
    assert model.feature_info.channels() == [32, 32] and model.feature_info.reduction() == [16, 16]
    whole, x = tiny(depth=3).eval(), torch.randn(2, 3, 32, 32)
    last, maps = whole.forward_intermediates(x)
    assert len(maps) == 3
    torch.testing.assert_close(last, whole.forward_features(x))
    torch.testing.assert_close(maps[-1], last)
    torch.testing.assert_close(whole.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)[0], maps[0])


def test_groups_go_from_the_picture_to_the_classifier():
    from timm.models import group_parameters
    model = tiny(depth=3)
    groups = list(group_parameters(model, model.group_matcher()).values())
    assert [sorted({n.split(".")[0] for n in g}) for g in groups] == [["stem"], ["blocks"], ["blocks"], ["blocks"], ["head", "norm", "pool"]]
    assert len(group_parameters(model, model.group_matcher(coarse=True))) == 3
    assert sum(map(len, groups)) == len(list(model.parameters()))
    parts = timm_splitter(nn.Sequential(nn.Sequential(model), nn.Linear(7, 2)))
    assert len(parts) == 3 and all(parts)
    assert len({id(p) for part in parts for p in part}) == len(list(model.parameters())) + 2
    assert parts[0][0] is model.stem[0].weight and {id(p) for p in parts[-1]} >= {id(model.head.weight), id(model.pool.query)}
    body = timm.create_model("resnet18", num_classes=0)
    head = nn.Linear(512, 2)
    parts = timm_splitter(nn.Sequential(TimmMap(body), head))
    assert [id(p) for p in parts[2]] == [id(p) for p in head.parameters()] and len(parts[0]) + len(parts[1]) == len(list(body.parameters()))


@pytest.mark.parametrize("head", [None, AvgAttnConcatPoolHead])
def test_fastai_learner_with_learning_rates_by_depth(head, monkeypatch):
    from attnpool.data.digits import digits_dls
    from attnpool.learner import vision_learner
    dls = digits_dls(size=64, bs=16, n_train=48, n_valid=16)
    monkeypatch.setitem(VARIANTS, "patchconvnet_s20", dict(embed_dim=32, depth=2))
    more = {} if head is None else dict(custom_head=head)
    learn = vision_learner(dls, "patchconvnet_s20", pretrained=False, splitter=timm_splitter, **more)
    net = learn.model[0].model
    out = learn.model[0](dls.one_batch()[0])
    assert out.shape == (16, 32) if head is None else out.shape == (16, 32, 4, 4)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, slice(1e-6, 1e-2))
    assert len(learn.opt.param_groups) == 3 and learn.opt.hypers[0]["lr"] < learn.opt.hypers[1]["lr"] < learn.opt.hypers[2]["lr"]
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert ("pool.query" in moved) == (head is None) and "stem.0.weight" in moved


# Checkpoints

@pytest.mark.parametrize("form", FORMS)
def test_there_and_back(form):
    options = FORMS[form]
    theirs = random_deit(options, torch.float32)
    again = to_deit(from_deit({"model": theirs}))
    assert again.keys() == theirs.keys() and all(torch.equal(again[k], theirs[k]) for k in theirs)
    assert from_deit(theirs).keys() == tiny(**options).state_dict().keys()


OFFICIAL = {"s60": (384, 60), "s120": (384, 120), "b60": (768, 60), "b120": (768, 120), "l60": (1024, 60), "l120": (1024, 120), "s60_multi": (384, 60)}


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("classes", [1000, 21841])
def test_official_names_and_shapes(name, classes):
    c, depth = OFFICIAL[name]
    multi = name.endswith("multi")
    if multi and classes > 1000: pytest.skip("published for 1000 classes")
    e = lambda *shape: torch.empty(shape, device="meta")
    state = {"cls_token": e(1, classes if multi else 1, c)}
    for i, (a, b) in enumerate([(3, c // 8), (c // 8, c // 4), (c // 4, c // 2), (c // 2, c)]): state[f"patch_embed.proj.{2 * i}.0.weight"] = e(b, a, 3, 3)
    for i in range(depth):
        p = f"blocks.{i}."
        state |= {p + "gamma_1": e(c), p + "norm1.weight": e(c), p + "norm1.bias": e(c)}
        for part, shape in {"0": (c, c, 1, 1), "2": (c, 1, 3, 3), "4.conv_reduce": (c // 4, c, 1, 1), "4.conv_expand": (c, c // 4, 1, 1), "5": (c, c, 1, 1)}.items():
            state |= {f"{p}attn.qkv_pos.{part}.weight": e(*shape), f"{p}attn.qkv_pos.{part}.bias": e(shape[0])}
    p = "blocks_token_only.0."
    state |= {p + "gamma_1": e(c), p + "gamma_2": e(c)}
    for n in ("norm1", "norm2"): state |= {f"{p}{n}.weight": e(c), f"{p}{n}.bias": e(c)}
    for n, shape in {"attn.q": (c, c), "attn.k": (c, c), "attn.v": (c, c), "attn.proj": (c, c), "mlp.fc1": (3 * c, c), "mlp.fc2": (c, 3 * c)}.items():
        state |= {f"{p}{n}.weight": e(*shape), f"{p}{n}.bias": e(shape[0])}
    state |= {"norm.weight": e(c), "norm.bias": e(c)}
    if multi: state |= {f"head.{i}.weight": e(1, c) for i in range(classes)} | {f"head.{i}.bias": e(1) for i in range(classes)}
    else: state |= {"head.weight": e(classes, c), "head.bias": e(classes)}
    with torch.device("meta"): model = timm.create_model(f"patchconvnet_{name}", num_classes=classes)
    load_deit(model, {"model": state})
    back = to_deit(model.state_dict())
    assert back.keys() == state.keys() and all(back[k].shape == state[k].shape for k in state)


@pytest.mark.parametrize("variant", ["patchconvnet_s60", "patchconvnet_s60_multi"])
def test_pretrained_through_the_hub_cache(variant, tmp_path, monkeypatch):
    small = dict(embed_dim=32, depth=2, class_queries=variant.endswith("multi"), gamma_init=.3)
    monkeypatch.setitem(VARIANTS, variant, small)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    source = PatchConvNet(num_classes=1000, **small).eval()
    (tmp_path / "checkpoints").mkdir()
    file = default_cfgs[variant].default.url.rsplit("/", 1)[1]
    torch.save({"model": to_deit(source.state_dict())}, tmp_path / "checkpoints" / file)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(timm.create_model(variant, pretrained=True).eval()(x), source(x))
    other = timm.create_model(variant, pretrained=True, num_classes=5, in_chans=1)
    assert other(x[:, :1]).shape == (2, 5) and torch.equal(other.blocks[1].pw1.weight, source.blocks[1].pw1.weight)
    assert timm.create_model(variant, pretrained=True, num_classes=0)(x).shape == (2, 32)
    if variant.endswith("s60"): timm.create_model(variant, pretrained=True, num_classes=0, global_pool="")


def test_without_a_network_it_says_where_the_file_goes(monkeypatch):
    def offline(*args, **kwargs): raise URLError("no route")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", offline)
    monkeypatch.setitem(VARIANTS, "patchconvnet_s60", dict(embed_dim=32, depth=1))
    with pytest.raises(OSError, match="s60_384_21k.pth.*checkpoints"): timm.create_model("patchconvnet_s60.in21k_ft_in1k_384", pretrained=True)
    with pytest.raises(RuntimeError, match="pretrained=False"): timm.create_model("patchconvnet_l120", pretrained=True)


# Memory

def training_peak(model, bs=16, size=224):
    from torch._subclasses import FakeTensorMode
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.to_empty(device="cpu")
        x = torch.empty(bs, 3, size, size)
        with PeakMemory().start(*model.parameters(), *model.buffers(), x) as memory: model(x).sum().backward()
    return memory.peak


def test_training_memory():
    def build(name):
        with torch.device("meta"): return timm.create_model(name)
    single, classes, saving = build("patchconvnet_s60"), build("patchconvnet_s60_multi"), build("patchconvnet_s60")
    saving.set_grad_checkpointing()
    whole = training_peak(single)
    assert training_peak(classes) < 1.2 * whole
    assert training_peak(saving) < whole / 3


def test_memory_against_the_authors_file():
    d = deit()
    def build(name):
        with torch.device("meta"): return timm.create_model(name)
    for size in (224, 384):
        with torch.device("meta"): theirs = d.S60()
        original = training_peak(theirs, size=size)
        assert training_peak(build("patchconvnet_s60"), size=size) <= original
        saving = build("patchconvnet_s60")
        saving.set_grad_checkpointing()
        assert training_peak(saving, size=size) <= original / 3


# Any timm network with a head of ours

@pytest.mark.parametrize("arch, size, shape", [("resnet18", (96, 64), (512, 3, 2)), ("swin_tiny_patch4_window7_224", (224, 224), (768, 7, 7)),
                                               ("deit_tiny_patch16_224", (224, 224), (192, 14, 14)), ("patchconvnet_s20", (32, 64), (384, 2, 4))])
def test_with_head(arch, size, shape):
    model = with_head(arch, "learned", 7)
    x = torch.randn(2, 3, *size)
    assert isinstance(model[0], TimmMap) and model[0](x).shape == (2, *shape)
    model(x).sum().backward()
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("head", HEADS)
def test_with_every_head(head):
    assert with_head("resnet18", head, 3)(torch.randn(2, 3, 64, 64)).shape == (2, 3)


def test_tokens_go_back_to_their_places():
    model = timm.create_model("deit_tiny_patch16_224", num_classes=0).eval()
    x = torch.randn(1, 3, 224, 224)
    tokens = model.forward_features(x)
    torch.testing.assert_close(TimmMap(model)(x)[0, :, 3, 5], tokens[0, 1 + 3 * 14 + 5])


@pytest.mark.parametrize("make, error, message", [
    (lambda: with_head("resnet18", "lerned"), ValueError, "Did you mean 'learned'"),
    (lambda: with_head("resnet18", 3), TypeError, "callable"),
    (lambda: with_head("resnet18", num_classes=0), ValueError, "TimmMap"),
    (lambda: with_head("resnet1800"), RuntimeError, "resnet1800"),
])
def test_with_head_mistakes(make, error, message):
    with pytest.raises(error, match=message): make()


def test_importing_models_registers_and_loads_no_fastai():
    code = ("import sys, timm, attnpool.models; print(len(timm.list_models('patchconvnet*')), *[m for m in ('fastai', 'fastxtend') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["25"]
