"Every head of others, row by row: the contract, and numbers against the library or against the paper's equation."
import copy
import inspect
import pickle
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from attnpool.cli import main
from attnpool.cost.timing import peak_memory
from attnpool.functional import attention_pool_plain
from attnpool.heads import ABLATIONS, fold, get_head, HEADS
from attnpool.maps.compute import attention_maps, find_pools, maps_of
from attnpool.models.surgery import swap_pool, with_head
from attnpool.pooling.others import BlogAttention, ClipAttention
from attnpool.pooling.peers import AttentionPeer, PEERS
from attnpool.recipe import name_of, recipe_learner
from attnpool.registry import BadInput
from attnpool.runs.asked import read_specs
from attnpool.runs.store import load_run
from attnpool.runs.train import open_run

C = 64
SMALL = dict(mldecoder=dict(dim=32), query2label=dict(dim=32))   # decoders of the papers' sizes take a second each
LOOK = ["torch-mha", "timm-attn", "timm-rotary", "timm-latent", "simpool", "blog", "abmil", "ep", "clip", "mldecoder", "query2label"]
FIXED_SIZE = []            # peers whose library's layer takes maps of one size only
IN_FOURS = ["timm-rotary"] # whose channels have to come in fours
NEVER_EMPTY = ["timm-attn", "timm-rotary"]   # whose library's layer fails on no picture at all
BATCH_NORM = ["fastai", "ep"]   # cannot be trained on one picture at a time
PER_QUERY = ["mldecoder", "query2label"]


@pytest.fixture
def compiler():
    "torch counts how often the `forward` of a class is compiled, for whichever layers, and stops: as if none had been."
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


def head_of(name, ni=C, n_out=5, dtype=torch.float64, **options):
    "With weights away from their start, so that no bias is zero and no map uniform."
    head = PEERS[name](ni, n_out, **SMALL.get(name, {}) | options).to(dtype)
    g = torch.Generator().manual_seed(2)
    for p in head.parameters(): p.data += torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) * (p.shape[-1] if p.ndim else 1)**-.5
    return head


def random_map(*shape, dtype=torch.float64): return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
def positions(x): return x.flatten(2).mT
def split(t, heads): return t.unflatten(-1, (heads, -1)).transpose(-2, -3)   # (..., n, c) to (..., heads, n, c/heads)


# The contract

def test_names_say_nothing_else_and_maps_are_promised_where_there_is_attention():
    assert set(PEERS) >= {"avg-norm", "max", "avgmax", "fastai", "gem", "lse", *LOOK}
    assert [n for n in PEERS if hasattr(head_of(n)[0], "attention_map")] == LOOK
    for name in PEERS: assert PEERS[name].__doc__ and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"), name
    assert not set(PEERS) & (set(HEADS) | set(ABLATIONS) | {"all", "peers"})


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("shape", [(2, 7, 7), (1, 1, 1), (3, 5, 9), (0, 4, 4), (2, 14, 3), (2, 1, 6)])
def test_forward_and_backward_at_any_size(name, shape):
    assert name not in FIXED_SIZE
    b, h, w = shape
    if not b and name in NEVER_EMPTY:
        with pytest.raises(RuntimeError, match="reshape"): head_of(name)(random_map(b, C, h, w))
        return
    head, x = head_of(name).train(b > 1 or name not in BATCH_NORM), random_map(b, C, h, w).requires_grad_()
    if not b: head.eval()
    pool, out = head[0](x), head(x)
    assert pool.shape == (b, head[0].c_out) and out.shape == (b, 5) and out.dtype == torch.float64
    (out**2).sum().backward()
    constant = name == "simpool" and h * w == 1   # see below
    assert x.grad.isfinite().all() and (not b or x.grad.any() or constant)
    for n, p in head.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), n   # DDP waits for each of them


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("ni, n_out", [(40, 3), (96, 1), (440, 7), (1280, 2)])
def test_widths_of_real_networks_and_numbers_of_classes(name, ni, n_out):
    head = PEERS[name](ni, n_out, **SMALL.get(name, {})).eval()
    assert head(torch.randn(2, ni, 3, 4)).shape == (2, n_out)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_memory_formats(name, dtype):
    head, x = head_of(name).eval(), random_map(3, C, 5, 7)
    exact = head(x)
    out = copy.deepcopy(head).to(dtype)(x.to(dtype).contiguous(memory_format=torch.channels_last))
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= 40 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", PEERS)
def test_copies_saves_and_compiles(name, tmp_path, compiler):
    head, x = head_of(name).eval(), random_map(2, C, 6, 4)
    expected = head(x)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = PEERS[name](C, 5, **SMALL.get(name, {})).double().eval()
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    for same in (other, copy.deepcopy(head), pickle.loads(pickle.dumps(head)), nn.Sequential(head[:-1], head[-1])):
        assert torch.equal(same(x), expected)
    assert torch.allclose(compiler(head, backend="aot_eager", fullgraph=True)(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_exports_and_takes_other_sizes_afterwards(name):
    head, dim = head_of(name, dtype=torch.float32).eval(), torch.export.Dim
    sizes = {0: dim("b", min=2, max=64), 2: dim("h", min=2, max=64), 3: dim("w", min=2, max=64)}
    exported = torch.export.export(head, (random_map(4, C, 7, 7, dtype=torch.float32),), dynamic_shapes=(sizes,)).module()
    for shape in ((4, C, 7, 7), (2, C, 5, 9)):
        x = random_map(*shape, dtype=torch.float32)
        assert torch.allclose(exported(x), head(x), rtol=1e-4, atol=1e-4), shape


@pytest.mark.parametrize("name", PEERS)
def test_options_are_in_the_signature_and_start_of_a_seed_is_the_same(name):
    parameters = inspect.signature(PEERS[name]).parameters
    assert list(parameters)[:2] == ["ni", "n_out"]
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    torch.manual_seed(1)
    one = PEERS[name](C, 5)
    torch.manual_seed(1)
    other = PEERS[name](C, 5, **{n: p.default for n, p in parameters.items() if n not in ("ni", "n_out")})
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    with pytest.raises(TypeError, match="no_such_option"): PEERS[name](C, 5, no_such_option=1)


# Where they look

VALUES = {   # what is averaged: a linear map of the positions, (b, n, c_out), and what the pool does with the average
    "torch-mha": (lambda l, t: F.linear(t, *[w.chunk(3)[2] for w in (l.attn.in_proj_weight, l.attn.in_proj_bias)]), lambda l: l.attn.out_proj),
    "timm-rotary": (lambda l, t: F.linear(t, *[w.chunk(3)[2] for w in (l.qkv.weight, l.qkv.bias)]), lambda l: l.proj),
    "timm-latent": (lambda l, t: l.kv(t).chunk(2, -1)[1], lambda l: lambda y: (lambda z: z + l.mlp(z))(l.proj(y))),
    "simpool": (lambda l, t: (l.norm(t) - l.norm(t).amin(1, keepdim=True) + 1e-6)**2, lambda l: torch.sqrt),
    "blog": (lambda l, t: l.kv(l.norm(t)).chunk(2, -1)[1], lambda l: l.proj),
    "abmil": (lambda l, t: t, lambda l: nn.Identity()),
    "ep": (lambda l, t: l.v(t), lambda l: nn.Identity()),
}


@pytest.mark.parametrize("name", LOOK)
def test_maps_sum_to_one_and_are_those_of_eval_mode(name):
    head, x = head_of(name), random_map(3, C, 4, 7)
    maps = head[0].attention_map(x)
    assert maps.shape[0] == 3 and maps.shape[2:] == (4, 7) and (maps >= 0).all()
    assert torch.allclose(maps.sum((2, 3)), torch.ones(maps.shape[:2], dtype=maps.dtype), atol=1e-12)
    assert maps.std() > 1e-4   # not uniform
    assert torch.allclose(maps, head.eval()[0].attention_map(x), atol=1e-12)   # no dropout in training either
    if name in PER_QUERY: assert maps.shape[1] == 5   # one for each class
    assert maps.requires_grad and head(x).requires_grad
    half = head.to(torch.bfloat16)[0].attention_map(x.to(torch.bfloat16))
    assert (half.double() - maps).abs().max() < .1 and (half.double().sum((2, 3)) - 1).abs().max() < .02


@pytest.mark.parametrize("name", VALUES)
def test_maps_give_the_pooled_vector(name):
    pool, x = head_of(name)[0], random_map(3, C, 4, 7)
    values, after = VALUES[name]
    maps = pool.attention_map(x).flatten(2)   # (b, k, n)
    shares = values(pool.layer, positions(x)).unflatten(2, (maps.shape[1], -1))   # (b, n, k, c_out/k)
    by_hand = after(pool.layer)(torch.einsum("bkn,bnkd->bkd", maps, shares).flatten(1))
    assert (by_hand - pool(x)).abs().max() <= 1e-12 * pool(x).abs().max()


@pytest.mark.parametrize("name, pos, value", [("clip", "pos", "in_proj"), ("timm-attn", "pos_embed", "qkv")])
def test_the_means_share_is_everyones(name, pos, value):
    "Without positions, a pool whose mean asks and is asked is a weighted sum of the positions, too."
    pool, x = head_of(name, num_heads=2)[0], random_map(2, C, 7, 7)
    getattr(pool.layer, pos).data.zero_()
    state = pool.layer.state_dict()
    weight, bias = (next(v for k, v in state.items() if value in k and k.endswith(kind)).chunk(3)[2] for kind in ("weight", "bias"))
    proj = pool.layer.attn.out_proj if name == "clip" else pool.layer.proj
    shares = F.linear(positions(x), weight, bias).unflatten(2, (2, -1))
    by_hand = proj(torch.einsum("bkn,bnkd->bkd", pool.attention_map(x).flatten(2), shares).flatten(1))
    assert (by_hand - pool(x)).abs().max() <= 1e-12 * pool(x).abs().max()


def test_simpool_without_a_power_averages_the_normed_map():
    pool, x = head_of("simpool", gamma=None)[0], random_map(3, C, 4, 7)
    by_hand = torch.einsum("bn,bnc->bc", pool.attention_map(x).flatten(1), pool.layer.norm(positions(x)))
    assert torch.allclose(pool(x), by_hand, atol=1e-13) and not torch.allclose(pool(x), head_of("simpool")[0](x), atol=1e-1)
    one, (plain, powered) = random_map(2, C, 1, 1), (head_of("simpool", gamma=g)[0] for g in (None, 2.))
    assert torch.allclose(plain(one), plain.layer.norm(positions(one))[:, 0])
    assert torch.allclose(powered(one), torch.full((2, C), 1e-6).double())   # nothing stands above its own least value


@pytest.mark.parametrize("fused", [True, False])
def test_maps_of_a_timm_layer_that_writes_its_softmax_out(fused):
    pool, x = head_of("simpool", num_heads=4)[0], random_map(2, C, 3, 5)
    expected = pool.attention_map(x)
    pool.layer.fused_attn = fused
    assert torch.allclose(pool.attention_map(x), expected, atol=1e-14)


@pytest.mark.parametrize("name", LOOK)
def test_maps_in_mixed_precision_and_of_fastais_tensors(name):
    from fastai.torch_core import TensorImage
    head, x = head_of(name, dtype=torch.float32).eval(), random_map(2, C, 4, 7, dtype=torch.float32)
    expected = head[0].attention_map(x)
    assert torch.equal(head[0].attention_map(TensorImage(x)).as_subclass(torch.Tensor), expected)
    with torch.autocast("cpu", torch.bfloat16): out, maps = head(x), head[0].attention_map(x)
    assert (maps - expected).abs().max() < .1 and (maps.sum((2, 3)) - 1).abs().max() < .02
    assert (out - head(x)).abs().max() < .1 * head(x).abs().max()


def test_maps_of_large_maps_take_no_square_of_the_positions():
    pool, x = head_of("timm-attn", dtype=torch.float32)[0], random_map(1, C, 40, 40, dtype=torch.float32)
    with torch.no_grad(): assert peak_memory(lambda: pool.attention_map(x)) < 4 * 1601**2


def test_maps_of_decoders_are_the_mean_over_heads():
    pool, x = head_of("mldecoder").eval()[0], random_map(2, C, 3, 5)
    caught = []
    pool.layer.layer.multihead_attn.register_forward_hook(lambda m, args, out: caught.append(out[1]))   # torch's own mean
    pool(x)
    assert torch.allclose(pool.attention_map(x).flatten(2), caught[0], atol=1e-14)


def test_networks_find_the_pools_of_peers():
    for name in PEERS:
        model = nn.Sequential(nn.Conv2d(3, C, 8, 8), head_of(name, dtype=torch.float32))
        x = torch.randn(2, 3, 40, 56)
        assert list(find_pools(model)) == (["1.0"] if name in LOOK else []), name
        if name in LOOK: assert torch.equal(maps_of(model.train(), x), model.eval()[1][0].attention_map(model[0](x))) and not model.training
        else:
            with pytest.raises(BadInput, match="there is no attention pool"): attention_maps(model, x)
    with pytest.raises(BadInput, match="no attention pool in it that folds"): fold(head_of("ep").eval())


def test_a_layer_of_ones_own_shows_its_maps():
    class Loudest(nn.Module):
        def forward(self, t): return (t.norm(dim=2, keepdim=True).mT.softmax(-1) @ t).squeeze(1)
    x = random_map(2, 8, 3, 4)
    maps = AttentionPeer(Loudest(), 8, positions=True).attention_map(x)
    assert torch.allclose(maps, x.norm(dim=1, keepdim=True).flatten(2).softmax(-1).view(2, 1, 3, 4))
    with pytest.raises(BadInput, match="layer: a Flatten computes no attention"): AttentionPeer(nn.Flatten(), 96, ni=8).attention_map(x)


# Numbers

def test_fastais_head_layer_by_layer():
    from fastai.vision.learner import create_head
    from fastai.torch_core import apply_init
    for options in (dict(), dict(lin_ftrs=32, ps=.2)):
        torch.manual_seed(0)
        theirs = create_head(C, 5, **options | ({"lin_ftrs": [32]} if options else {}))
        apply_init(theirs, nn.init.kaiming_normal_)   # as vision_learner does
        ours = PEERS["fastai"](C, 5, **options)
        theirs = [theirs[:2], *theirs[2:]]   # pool and flatten
        assert [type(m) for m in theirs[1:]] == [type(m) for m in ours[1:]]
        for a, b in zip(theirs[1:], ours[1:]):
            assert str(a) == str(b)
            for (n, p), q in zip(a.named_parameters(), b.parameters()):
                assert p.shape == q.shape and (p.ndim == 2 or torch.equal(p, q)), n   # norms start the same
        x = torch.randn(4, C, 3, 5)
        theirs = nn.Sequential(*theirs)
        theirs.load_state_dict({k: v for k, v in ours.state_dict().items()})
        assert torch.equal(theirs.eval()(x), ours.eval()(x))
        torch.manual_seed(0); a = theirs.train()(x)
        torch.manual_seed(0); b = ours.train()(x)
        assert torch.equal(a, b)   # dropout in the same places
        assert ours[3].weight.std().item() == pytest.approx((2 / (2 * C))**.5, rel=.1)


def test_plain_pools_are_the_libraries():
    from fastai.layers import AdaptiveConcatPool2d
    x, mean = random_map(3, C, 4, 5), random_map(3, C, 4, 5).mean((2, 3))
    assert torch.equal(head_of("avgmax")[0](x), AdaptiveConcatPool2d()(x).flatten(1))
    assert torch.equal(head_of("max")[0](x), x.amax((2, 3)))
    head, theirs = head_of("avg-norm"), timm.layers.NormMlpClassifierHead(C, 5).double()
    theirs.load_state_dict({"norm.weight": head[1].weight, "norm.bias": head[1].bias, "fc.weight": head[2].weight, "fc.bias": head[2].bias})
    assert torch.allclose(head(x), theirs(x), atol=1e-13) and torch.allclose(head[0](x), mean, atol=1e-15)
    lse, theirs = head_of("lse")[0], timm.layers.LsePlus2d().double()
    theirs.load_state_dict(lse.layer.state_dict())
    assert torch.equal(lse(x), theirs(x)) and torch.allclose(lse(x), (theirs.r * x).exp().mean((2, 3)).log() / theirs.r, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.floats(.2, 20), st.integers(1, 5), st.integers(1, 5))
def test_gem_is_the_equation(p, h, w):
    x = random_map(2, 3, h, w).abs() + .01
    slow = torch.tensor([[(sum(v**p for v in c.flatten().tolist()) / (h * w))**(1 / p) for c in m] for m in x], dtype=torch.float64)
    assert torch.allclose(PEERS["gem"](3, 2, p=p)[0].double()(x), slow, rtol=1e-6)   # p is a float32 at first
    below = PEERS["gem"](3, 2)[0](-x.float())   # what is below counts as eps
    assert torch.allclose(below, torch.full_like(below, 1e-6))


@pytest.mark.parametrize("name, build, positioned", [
    ("timm-attn", lambda: timm.layers.AttentionPool2d(C, feat_size=(7, 7), head_dim=64), False),
    ("timm-rotary", lambda: timm.layers.RotAttentionPool2d(C, ref_feat_size=7, head_dim=64), False),
    ("timm-latent", lambda: timm.layers.AttentionPoolLatent(C), True),
    ("simpool", lambda: timm.layers.SimPool2d(C, gamma=2), False),
])
def test_timms_layers_as_timm_builds_them(name, build, positioned):
    head, theirs, x = head_of(name), build().double(), random_map(3, C, 5, 9)
    theirs.load_state_dict(head[0].layer.state_dict())
    assert torch.equal(head(x), head[1](theirs(positions(x) if positioned else x)))


def test_timms_attention_is_the_equation():
    "Position by position, at the size of the embedding and at another."
    head = head_of("timm-attn", num_heads=4)
    l = head[0].layer
    x = random_map(2, C, 7, 7)
    t = torch.cat([positions(x).mean(1, keepdim=True), positions(x)], 1) + l.pos_embed
    q, k, v = (split(m, 4) for m in F.linear(t, l.qkv.weight, l.qkv.bias).chunk(3, -1))   # (b, heads, n+1, 16)
    out = torch.zeros(2, 4, 16, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            e = torch.stack([torch.exp(q[b, h, 0] @ k[b, h, i] / 4) for i in range(50)])
            for i in range(50): out[b, h] += e[i] / e.sum() * v[b, h, i]
    assert torch.allclose(head[0](x), l.proj(out.flatten(1)), atol=1e-12)


def test_clips_pool_is_timms_with_one_query():
    head, theirs = head_of("clip", num_heads=2), timm.layers.AttentionPool2d(C, feat_size=7, num_heads=2).double()
    l = head[0].layer
    theirs.load_state_dict({"pos_embed": l.pos, "qkv.weight": l.attn.in_proj_weight, "qkv.bias": l.attn.in_proj_bias,
                            "proj.weight": l.attn.out_proj.weight, "proj.bias": l.attn.out_proj.bias})
    assert torch.allclose(head[0](random_map(2, C, 7, 7)), theirs(random_map(2, C, 7, 7)), atol=1e-13)
    for size in ((1, 1), (5, 9), (14, 14)):   # timm resamples in float32
        assert torch.allclose(head[0](random_map(2, C, *size)), theirs(random_map(2, C, *size)), atol=2e-6)
    assert ClipAttention(C, 2, (3, 5)).pos.shape == (16, C)


def test_gated_attention_is_equation_9():
    head, x = head_of("abmil"), random_map(2, C, 3, 4)
    l, slow = head[0].layer, []
    for bag in positions(x):
        scores = [l.score.weight[0] @ (torch.tanh(l.what.weight @ h + l.what.bias) * torch.sigmoid(l.gate.weight @ h + l.gate.bias)) for h in bag]
        slow.append(sum(e.exp() / sum(s.exp() for s in scores) * h for e, h in zip(scores, bag)))
    assert torch.allclose(head[0](x), torch.stack(slow), atol=1e-12)
    fresh = PEERS["abmil"](C, 5)
    assert not fresh[1].bias.any() and fresh[1].weight.abs().max() <= (6 / (C + 5))**.5


def test_efficient_probing_is_the_equation():
    head, x = head_of("ep", n_queries=8), random_map(2, C, 3, 4)
    l, out = head[0].layer, torch.zeros(2, C, dtype=torch.float64)
    for b, tokens in enumerate(positions(x)):
        v = tokens @ l.v.weight.T   # values of every position
        for j in range(8):
            a = torch.softmax(torch.stack([l.query[j] @ t / C**.5 for t in tokens]), 0)
            for i in range(12): out[b, 8*j:8*(j + 1)] += a[i] * v[i, 8*j:8*(j + 1)]
    assert torch.allclose(head[0](x), out, atol=1e-12)
    assert len(PEERS["ep"](1280, 5)[0].layer.query) == 32 and len(PEERS["ep"](440, 5)[0].layer.query) == 22


def test_ml_decoder_is_timms():
    "timm's own head fails on today's torch before its decoder's layer is reached: that is called in its place."
    head, x = head_of("mldecoder", n_out=7, groups=3).eval(), random_map(2, C, 3, 5)
    theirs = timm.layers.ml_decoder.MLDecoder(7, 3, 32, C).double().eval()
    theirs.decoder.forward = head[0].layer.layer.forward
    state = {"embed_standart.weight": head[0].layer.embed[0].weight, "embed_standart.bias": head[0].layer.embed[0].bias,
             "query_embed.weight": head[0].layer.query, "duplicate_pooling": head[1].weight, "duplicate_pooling_bias": head[1].bias}
    assert not [k for k in theirs.load_state_dict(state, strict=False).missing_keys if not k.startswith("decoder.")]
    assert torch.allclose(head(x), theirs(x), atol=1e-12)
    fresh = PEERS["mldecoder"](C, 250)
    assert fresh[0].layer.query.shape == (100, 768) and not fresh[0].layer.query.requires_grad and fresh[1].weight.shape == (100, 768, 3)
    assert "0.layer.query" in fresh.state_dict() and "0.layer.query" not in dict(fresh.named_parameters())   # unfreezing leaves it


def test_query2label_reads_each_query_apart():
    head, x = head_of("query2label", n_out=3).eval(), random_map(2, C, 3, 5)
    d, t = head[0].layer, positions(x)
    q = d.query.expand(2, -1, -1)
    def attend(m, q, k):   # (b, ., 32), 4 heads
        (wq, wk, wv), (bq, bk, bv) = m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
        a = (split(F.linear(q, wq, bq), 4) @ split(F.linear(k, wk, bk), 4).mT / 8**.5).softmax(-1)
        return m.out_proj((a @ split(F.linear(k, wv, bv), 4)).transpose(1, 2).flatten(2))
    k, l = d.embed(t), d.layer
    q = l.norm1(q + attend(l.self_attn, q, q))
    q = l.norm2(q + attend(l.multihead_attn, q, k))
    q = l.norm3(q + l.linear2(F.relu(l.linear1(q))))
    by_hand = torch.stack([q[:, i] @ head[2].weight[i] + head[2].bias[i] for i in range(3)], 1)
    assert torch.allclose(head(x), by_hand, atol=1e-12)


def test_torch_and_blog_layer_are_one_function():
    blog, theirs, x = BlogAttention(16).double(), PEERS["torch-mha"](16, 2)[0].double(), random_map(3, 16, 4, 5)
    blog.norm = nn.Identity()
    with torch.no_grad():
        theirs.layer.query.copy_(blog.query[None])
        theirs.layer.attn.in_proj_weight.copy_(torch.cat([blog.q.weight * 4, blog.kv.weight]))   # torch scales by 16**-.5
        theirs.layer.attn.in_proj_bias.copy_(torch.cat([blog.q.bias * 4, blog.kv.bias]))
        theirs.layer.attn.out_proj.load_state_dict(blog.proj.state_dict())
    assert (theirs(x) - blog(x)).abs().max() <= 1e-13
    assert (theirs.attention_map(x) - AttentionPeer(blog, 16).attention_map(x)).abs().max() <= 1e-13


def test_the_blog_layer_is_the_plain_form():
    layer, x = BlogAttention(16).double(), random_map(3, 16, 4, 5)
    (wk, wv), (bk, bv) = layer.kv.weight.chunk(2), layer.kv.bias.chunk(2)
    expected = attention_pool_plain(x, layer.query, (layer.q.weight, layer.q.bias), (wk, bk), (wv, bv), (layer.proj.weight, layer.proj.bias), layer.norm)
    assert (layer(x) - expected.squeeze(1)).abs().max() <= 1e-14


# In use

def test_they_load_no_library_before_one_is_built():
    code = """import sys
import attnpool.heads
from attnpool.pooling.peers import PEERS
before = {"timm", "fastai", "torchvision"} & set(sys.modules)
for name in ("gem", "fastai", "abmil", "clip", "query2label"): PEERS[name](8, 2)
ours = {"timm", "fastai", "torchvision"} & set(sys.modules)
PEERS["simpool"](8, 2)
sys.exit(bool(before or ours) or "timm" not in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_names_are_found_with_the_nearest_of_all():
    assert get_head("gem") is PEERS["gem"] and get_head("timm-attn") is PEERS["timm-attn"] and get_head("avg") is HEADS["avg"]
    for wrong, near in {"gme": "gem", "timm-atn": "timm-attn", "conct": "concat", "slim-rsm": "slim-rms"}.items():
        with pytest.raises(BadInput, match=f"head: '{wrong}' is unknown. Did you mean '{near}'.*Known: avg, .*gem") as e: get_head(wrong)
        assert ("slim-rms" in str(e.value).partition("Known")[2]) == ("-" in wrong)


@pytest.mark.parametrize("words, heads", [
    ("peers", list(PEERS)), ("all,peers", [*HEADS, *PEERS]), ("all", list(HEADS)), ("all,gem", [*HEADS, "gem"]),
    ("gem,peers", ["gem", *(n for n in PEERS if n != "gem")]), ("avg, timm-attn,avg", ["avg", "timm-attn"])])
def test_words_for_all_heads(words, heads):
    specs = read_specs("digits", words, "1", "quick", arch="xeca_resnext_tiny")
    assert [s.head for s in specs] == heads and all(s.recipe.lr > 0 for s in specs)


def test_an_option_goes_to_the_heads_that_have_it():
    specs = {s.head: dict(s.options) for s in read_specs("digits", "avg,gem,ep,clip", "1", "quick", "n_queries=4,map_size=(3,5)", arch="resnet10t")}
    assert specs == {"avg": {}, "gem": {}, "ep": {"n_queries": 4}, "clip": {"map_size": (3, 5)}}
    assert read_specs("digits", "gem", "1", "quick", "p=3", arch="resnet10t")[0] == read_specs("digits", "gem", "1", "quick", arch="resnet10t")[0]
    with pytest.raises(BadInput, match="options: 'n_querys' is unknown. Did you mean 'n_queries'"):
        read_specs("digits", "ep,gem", "1", "quick", "n_querys=4", arch="xeca_resnext_tiny")
    with pytest.raises(BadInput, match="head: 'peer' is unknown.*query2label"): read_specs("digits", "peer", "1", "quick", arch="resnet10t")


def test_from_the_command_to_the_maps_of_a_photo(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label in ("left", "right"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(12):
            photo = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            photo[8:24, slice(0, 16) if label == "left" else slice(16, 32)] = 255
            Image.fromarray(photo).save(tmp_path / "photos" / label / f"{i}.png")
    words = ["bench", str(tmp_path / "photos"), "--heads", "gem,ep,fastai", "--options", "n_queries=4", "--seeds", "1", "--epochs", "1"]
    with pytest.raises(SystemExit) as e:
        main([*words, "--size", "32", "--bs", "8", "--device", "cpu", "--out", str(tmp_path / "runs")])
    told = capsys.readouterr().out
    assert e.value.code == 0 and all(re.search(rf"^ {row} +1 .* \S+ M ", told, re.M) for row in ("gem", "ep n_queries=4", "fastai")), told
    table = pd.read_csv(tmp_path / "runs/report.csv")
    assert list(table["head"]) == ["gem", "ep n_queries=4", "fastai"]
    run, = (tmp_path / "runs").glob("*-ep-*")
    assert load_run(run).spec.head == "ep" and open_run(run).model[-1][0].layer.query.shape == (4, 256)
    for folder, maps in ((run, 1), (next((tmp_path / "runs").glob("*-gem-*")), 0)):
        page = tmp_path / f"{maps}.html"
        with pytest.raises(SystemExit) as e: main(["maps", str(folder), str(tmp_path / "photos/left/0.png"), "--device", "cpu", "--out", str(page)])
        assert e.value.code == 0 and page.stat().st_size > 1000
        assert ("one map for all" in page.read_text()) == bool(maps)   # a map of attention, or of each class by its gradient


def test_heads_of_a_learner_are_known_by_name(dls):
    for head in (PEERS["gem"], partial(PEERS["gem"], p=2), "gem"): assert name_of(head) == "gem"
    learn = recipe_learner(dls, "xeca_resnext_tiny", partial(PEERS["mldecoder"], dim=32), "quick", epochs=1)
    learn.model[-1][0].layer.query.fill_(1.)
    learn.freeze(); learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert learn.model[-1][0].layer.query.eq(1.).all() and not learn.model[-1][0].layer.query.requires_grad   # as ML-Decoder's stay


def test_in_timm_networks_and_in_the_place_of_average_pooling():
    model = with_head("resnet10t", "simpool", 3)
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 3) and attention_maps(model, x).shape == (2, 1, 2, 2)
    trained = timm.create_model("resnet10t", num_classes=3).eval()
    before = trained(x)
    assert torch.allclose(swap_pool(trained, "simpool")(x), before, atol=1e-6) and attention_maps(trained, x).shape == (2, 1, 2, 2)
    with pytest.raises(BadInput, match="head: 'mldecoder' has no attention pool that gives a vector of 512"):
        swap_pool(timm.create_model("resnet10t", num_classes=3), "mldecoder")
    with pytest.raises(BadInput, match="head: 'gem' has no attention pool"): swap_pool(timm.create_model("resnet10t", num_classes=3), "gem")


@pytest.mark.parametrize("make, words", [
    (lambda: PEERS["gme"], "head: 'gme' is unknown. Did you mean 'gem'?"),
    (lambda: PEERS["gem"](0, 5), "ni: expected the number of channels"),
    (lambda: PEERS["timm-attn"](0, 5), "ni: expected the number of channels"),
    (lambda: PEERS["clip"](C, 0), "n_out: expected at least 1 output, got 0"),
    (lambda: PEERS["gem"](C, 5, p=0), "p: expected a power above 0, got 0"),
    (lambda: PEERS["gem"](C, 5, p="three"), "p: expected a power above 0, got 'three'"),
    (lambda: PEERS["clip"](C, 5, num_heads="two"), "num_heads: 'two' does not divide the 64 channels"),
    (lambda: PEERS["ep"](C, 5, n_queries=8.), "n_queries: 8.0 does not divide the 64 channels"),
    (lambda: PEERS["fastai"](C, 5, ps=1.5), "ps: expected a rate in [0, 1), got 1.5"),
    (lambda: PEERS["clip"](C, 5, num_heads=3), "num_heads: 3 does not divide the 64 channels"),
    (lambda: PEERS["timm-latent"](C, 5, num_heads=3), "num_heads: 3 does not divide the 64 channels"),
    (lambda: PEERS["simpool"](C, 5, num_heads=3), "num_heads: 3 does not divide the 64 channels"),
    (lambda: PEERS["torch-mha"](C, 5, num_heads=0), "num_heads: 0 does not divide the 64 channels"),
    (lambda: PEERS["timm-rotary"](C, 5, num_heads=32), "num_heads: rotary positions need heads of 4, 8, ... channels, got 64 channels for 32"),
    (lambda: PEERS["timm-rotary"](6, 5), "num_heads: rotary positions need heads of 4, 8, ... channels"),
    (lambda: PEERS["ep"](C, 5, n_queries=5), "n_queries: 5 does not divide the 64 channels"),
    (lambda: PEERS["mldecoder"](C, 5, groups=0), "groups: expected a whole number of at least 1, got 0"),
    (lambda: PEERS["query2label"](C, 5, dim=30, num_heads=4), "num_heads: 4 does not divide the 30 channels"),
    (lambda: PEERS["gem"](C, 5)(torch.randn(2, 8, 3, 3)), "x: expected 64 channels, got 8"),
    (lambda: PEERS["clip"](C, 5)(torch.randn(2, C, 3)), "x: expected a map of shape (b, c, h, w), got (2, 64, 3)"),
    (lambda: PEERS["ep"](C, 5)(torch.randn(2, C, 0, 3)), "has no positions to pool"),
    (lambda: PEERS["clip"](C, 5, map_size=0), "map_size: expected the side, or height and width, of a map, got 0"),
    (lambda: PEERS["abmil"](C, 5, hidden=0), "hidden: expected a whole number of at least 1, got 0"),
])
def test_bad_input(make, words):
    with pytest.raises(BadInput) as e: make()
    assert words in str(e.value)


def test_an_old_timm_is_named(monkeypatch):
    monkeypatch.delattr(timm.layers, "SimPool2d")
    with pytest.raises(BadInput, match=rf"head: timm {timm.__version__} has no SimPool2d. Install a newer one"): PEERS["simpool"](C, 5)
