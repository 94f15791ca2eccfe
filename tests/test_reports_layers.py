"Layers that are hooked, adapted, quantised, pruned or parametrized count as they would when called; transforms of pools."
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.hook import hook_outputs
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.ao.quantization import prepare_qat, quantize_dynamic
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

from attnpool import chunks, functional
from attnpool.chunks import in_chunks
from attnpool.fold import foldable
from attnpool.forms import affine, form, forms_used, readable
from attnpool.functional import attention_pool
from attnpool.heads import HEADS
from attnpool.layers import Mish
from attnpool.models.surgery import swap_pool
from attnpool.pooling.attention import AttentionPool2d
from attnpool.pooling.paper import PaperAggregation
from attnpool.pooling.start import ClassQueryPooling2d
from attnpool.registry import BadInput, Registry

NI = 16


@pytest.fixture(autouse=True, scope="module")
def the_fold_pays():
    "These maps are so small that the plain form would run; the fold is what is tested."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "FEW", -(1 << 62))
        yield


def relative(a, b): return ((a - b).abs().max() / b.abs().max()).item()


def called(attn, x, query, return_mean=False):
    "The attention by calling its layers, in plain torch."
    t = attn.norm(x.flatten(2).mT)
    def split(o): return o.unflatten(-1, (attn.num_heads, -1)).transpose(-3, -2)
    q, k, v = split(attn.q(query)), split(attn.k(t)), split(attn.v(t))
    found = ((attn.scale * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = attn.proj(found)
    out = out.squeeze(1) if len(query) == 1 else out
    return (out, x.mean((2, 3))) if return_mean else out


class Adapted(nn.Module):
    "A linear layer and a branch of low rank beside it, as adapters add it."
    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer, self.down, self.up = layer.requires_grad_(False), nn.Linear(layer.in_features, rank), nn.Linear(rank, layer.out_features)
    def forward(self, x): return self.layer(x) + self.up(self.down(x))


class Doubling(nn.Linear):
    "A subclass with a forward of its own, as quantised layers are."
    def forward(self, x): return 2 * super().forward(x)


def subclass(layer):
    layer.__class__ = Doubling
    return layer


def own_forward(layer):
    "As tools do that move weights about: a new forward on the object."
    layer.forward = lambda x, before=layer.forward: 3 * before(x)
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda m, args, out: out * 1.5)
    return layer


def pre_hooked(layer):
    layer.register_forward_pre_hook(lambda m, args: (args[0] * .5,))
    return layer


def lazy(layer): return nn.LazyLinear(layer.out_features)


CHANGES = dict(adapted=Adapted, subclass=subclass, own_forward=own_forward, hooked=hooked, pre_hooked=pre_hooked, lazy=lazy,
               weight_norm_hook=nn.utils.weight_norm, spectral_norm_hook=nn.utils.spectral_norm,
               pruned=lambda l: prune.l1_unstructured(l, "weight", .5), weight_norm=parametrizations.weight_norm,
               spectral_norm=parametrizations.spectral_norm, orthogonal=parametrizations.orthogonal)


def changed(change, where):
    "An attention with one changed layer, the same at every call."
    torch.manual_seed(1)
    attn = AttentionPool2d(NI, num_heads=2, init_std=.5).double()
    setattr(attn, where, CHANGES[change](getattr(attn, where)).double())
    return attn


def trained(attn, f, x, query, steps=3):
    "Outputs and gradients of a few steps of training."
    found, opt = [], None
    for i in range(steps):
        torch.manual_seed(i)
        if opt: opt.zero_grad()
        out = f(x, query)
        opt = opt or torch.optim.SGD(attn.parameters(), .01)   # a lazy layer has weights from its first call on
        out.square().sum().backward()
        found.append((out.detach(), {n: p.grad.clone() for n, p in attn.named_parameters() if p.grad is not None}))
        opt.step()
    return found


@pytest.mark.filterwarnings("ignore:`torch.nn.utils", "ignore:.*Lazy")
@pytest.mark.parametrize("where", ["q", "k", "v", "proj"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_counts_and_trains(change, where):
    ours, exact = changed(change, where), changed(change, where)
    x, query = torch.randn(3, NI, 3, 4, dtype=torch.float64), torch.randn(1, NI, dtype=torch.float64)
    with forms_used() as used: found = trained(ours, ours, x, query)
    for (out, grads), (wanted, wanted_grads) in zip(found, trained(exact, lambda *a: called(exact, *a), x, query)):
        assert relative(out, wanted) <= 1e-10 and grads.keys() == wanted_grads.keys()
        scale = max(g.abs().max() for g in wanted_grads.values())
        assert max((grads[n] - g).abs().max() for n, g in wanted_grads.items()) <= 1e-10 * scale
    assert not torch.equal(found[0][0], found[2][0])   # the steps are in what comes out
    folds = change in ("weight_norm", "spectral_norm", "orthogonal") or where in ("q", "proj")
    assert used == ({"folded"} if folds else {"folded", "plain"} if change == "lazy" else {"plain"})
    torch.manual_seed(5)
    maps = ours.eval().attention_map(x, query)
    t, scores = exact.eval().norm(x.flatten(2).mT), []
    torch.manual_seed(5)
    for q, k in zip(exact.q(query).chunk(2, -1), exact.k(t).chunk(2, -1)): scores.append((q @ k.mT).squeeze(1))
    assert (maps.flatten(2) - torch.stack(scores, 1).softmax(-1)).abs().max() <= 1e-10


POOLS = {name: (lambda name=name: HEADS[name](NI, 3)) for name in HEADS} | dict(
    mix=lambda: HEADS["avgstart"](NI, 3, mix=.5), rms=lambda: HEADS["concat"](NI, 3, norm=nn.RMSNorm), paper=lambda: PaperAggregation(NI),
    several=lambda: PaperAggregation(NI, queries=3, sees_itself=False), mish=Mish)


def built(pool):
    "In float64, with weights that are not those of the start."
    torch.manual_seed(2)
    module = POOLS[pool]().double().eval()
    with torch.no_grad():
        for p in module.parameters(): p += .3 * torch.randn_like(p)
    return module


def dual(f, x, dx):
    with forward_ad.dual_level(): return forward_ad.unpack_dual(f(forward_ad.make_dual(x, dx))).tangent


def twice(f, x, dx):
    g, = torch.autograd.grad(total(f)(x), x, create_graph=True)
    return torch.autograd.grad((g * dx).sum(), x)[0]


def many(f, x, dx):
    out = f(x)
    many = torch.linspace(-1, 1, 3 * out.numel(), dtype=x.dtype).view(3, *out.shape)
    return torch.autograd.grad(out, x, many, is_grads_batched=True)[0]


def total(f): return lambda x: f(x).square().sum()
def along(f, x, dx): return lambda s: total(f)(x + s.view(-1, 1, 1, 1) * dx)   # a number for each picture
ONES = torch.ones(2, dtype=torch.float64)


TRANSFORMS = dict(
    jvp=lambda f, x, dx: torch.func.jvp(f, (x,), (dx,))[1], dual=dual,
    vjp=lambda f, x, dx: torch.func.vjp(total(f), x)[1](torch.ones((), dtype=x.dtype))[0],
    vmap=lambda f, x, dx: torch.func.vmap(lambda one: f(one[None])[0])(x),
    vmap_grad=lambda f, x, dx: torch.func.vmap(torch.func.grad(lambda one: total(f)(one[None])))(x),
    forward_over_reverse=lambda f, x, dx: torch.func.jvp(torch.func.grad(total(f)), (x,), (dx,))[1], twice=twice, many=many,
    jacfwd=lambda f, x, dx: torch.func.jacfwd(along(f, x, dx))(ONES), jacrev=lambda f, x, dx: torch.func.jacrev(along(f, x, dx))(ONES),
    hessian=lambda f, x, dx: torch.func.hessian(along(f, x, dx))(ONES),
    vectorized=lambda f, x, dx: torch.autograd.functional.jacobian(along(f, x, dx), ONES, vectorize=True))


@pytest.mark.parametrize("side", [4, 48])   # the larger one is read in chunks
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("pool", POOLS)
def test_transforms_of_functions(pool, transform, side):
    x, dx = torch.randn(2, NI, side, side, dtype=torch.float64, requires_grad=True), torch.randn(2, NI, side, side, dtype=torch.float64)
    module = built(pool)
    assert in_chunks(x) == (side == 48)
    found = TRANSFORMS[transform](module, x, dx).detach()
    if pool == "mish": exact = TRANSFORMS[transform](F.mish, x, dx)
    else:
        with form("plain"): exact = TRANSFORMS[transform](module, x, dx)
    assert relative(found, exact.detach()) <= 1e-9


@pytest.mark.parametrize("pool", POOLS)
def test_derivatives_of_every_kind_against_differences(pool, monkeypatch):
    monkeypatch.setattr(chunks, "SMALL", 0)
    module, x = built(pool), torch.randn(2, NI, 1, 2, dtype=torch.float64, requires_grad=True)
    assert in_chunks(x)
    assert torch.autograd.gradcheck(module, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(module, x, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


class Seen:
    "The layers that a summary counts: those whose hooks are called."
    def __init__(self, model):
        self.called, self.handles = set(), []
        for name, m in model.named_modules():
            if list(m.parameters(recurse=False)): self.handles.append(m.register_forward_hook(partial(self.see, name)))
    def see(self, name, m, args, out): self.called.add(name)
    def remove(self):
        for handle in self.handles: handle.remove()


SLIM = dict(slim_heads=lambda: HEADS["slim"](NI, 3, num_heads=4), slim_rms=lambda: HEADS["slim"](NI, 3, norm=nn.RMSNorm))
MODULES = {n: make for n, make in POOLS.items() if n != "mish"} | SLIM


@pytest.mark.parametrize("pool", MODULES)
def test_hooks_see_every_layer_and_change_nothing(pool):
    module, x = MODULES[pool]().double(), torch.randn(2, NI, 5, 4, dtype=torch.float64)
    for m in module.modules(): m.train(not isinstance(m, nn.Dropout))   # all else as in training
    quick = module(x) if pool != "mix" else None
    seen = Seen(module)
    slow = module(x)
    layers = {n for n, m in module.named_modules() if list(m.parameters(recurse=False))}
    owners = {n for n, m in module.named_modules() if hasattr(m, "query")}   # called, whoever calls it
    assert seen.called == layers | (owners & layers)
    if quick is not None: assert relative(quick, slow) <= 1e-11
    seen.remove()
    with forms_used() as used: module(x)
    assert "plain" not in used   # quick again


@pytest.mark.parametrize("head", HEADS)
def test_a_summary_counts_every_layer(head):
    "fastai counts layers, and no parameter that a module owns beside its layers: queries and gammas."
    dls = DataLoaders.from_dsets([(torch.randn(3, 8, 8), i % 3) for i in range(8)], [(torch.randn(3, 8, 8), 0)] * 4, bs=4, device="cpu")
    learn = Learner(dls, nn.Sequential(nn.Conv2d(3, NI, 3), HEADS[head](NI, 3)), nn.CrossEntropyLoss())
    text = str(learn.summary())
    beside = sum(p.numel() for m in learn.model.modules() for n, p in m.named_parameters(recurse=False) if n.startswith(("query", "gamma")))
    whole = sum(p.numel() for p in learn.model.parameters())
    assert f"Total params: {whole - beside:,}" in text
    assert not any(m._forward_hooks for m in learn.model.modules())


@pytest.mark.parametrize("dtype, tol", [(torch.qint8, .06), (torch.float16, 2e-3)])
@pytest.mark.parametrize("pool", MODULES)
def test_dynamic_quantisation(pool, dtype, tol):
    module, x = built(pool).float() if pool in POOLS else MODULES[pool]().eval(), torch.randn(8, NI, 5, 4)
    quantised = quantize_dynamic(module, {nn.Linear}, dtype=dtype)
    assert any("quantized" in type(m).__module__ for m in quantised.modules()) or pool in ("mix", "avgstart")
    assert relative(quantised(x), module(x)) <= tol
    look, was = ((m[0] if isinstance(m, nn.Sequential) else m) for m in (quantised, module))
    if hasattr(was, "attention_map"): assert (look.attention_map(x) - was.attention_map(x)).abs().max() <= .03


def test_quantisation_aware_training():
    head, x = built("slim").float().train(), torch.randn(8, NI, 5, 4)
    head.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    aware = prepare_qat(head)
    aware(x).square().sum().backward()
    assert all(getattr(aware[0].attn, n).weight.grad is not None for n in "qkv") and aware[0].attn.k.weight_fake_quant.activation_post_process.min_val.numel()
    assert relative(aware.eval()(x), head.eval()(x)) <= .06


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_see_gradients(kind):
    head, x, seen = built("concat"), torch.randn(2, NI, 5, 4, dtype=torch.float64), {}
    def see(name): return lambda m, *grads: seen.update({name: grads[-1][0].shape})
    attn = head[0].attn
    for name in ("q", "k", "v", "proj", "norm"): getattr(getattr(attn, name), kind)(see(name))
    head(x.requires_grad_()).sum().backward()
    assert seen == dict(q=(1, NI), k=(2, 20, NI), v=(2, 20, NI), proj=(2, 1, NI), norm=(2, 20, NI))


def test_features_of_keys_and_values():
    head, x, seen = built("slim"), torch.randn(2, NI, 5, 4, dtype=torch.float64), {}
    for name in "kv": getattr(head[0].attn, name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    head(x)
    t = F.layer_norm(x.flatten(2).mT, (NI,), head[0].attn.norm.weight, head[0].attn.norm.bias)
    for name in "kv": torch.testing.assert_close(seen[name], F.linear(t, getattr(head[0].attn, name).weight, getattr(head[0].attn, name).bias))


def test_hooks_of_fastai():
    head, x = built("slim"), torch.randn(2, NI, 5, 4, dtype=torch.float64)
    attn, exact = head[0].attn, head(x)
    with hook_outputs([attn.q, attn.k, attn.proj, attn.norm]) as hooks:
        torch.testing.assert_close(head(x), exact)
        assert [tuple(h.shape) for h in hooks.stored] == [(1, NI), (2, 20, NI), (2, 1, NI), (2, 20, NI)]
    assert torch.equal(head(x), exact)


def test_layers_of_one_class_per_query_are_called_too():
    pool, x = ClassQueryPooling2d(NI, 3), torch.randn(2, NI, 5, 4)
    nn.init.normal_(pool.query)
    before = pool(x)
    pool.linear = Adapted(pool.linear)
    nn.init.zeros_(pool.linear.up.weight), nn.init.ones_(pool.linear.up.bias)
    torch.testing.assert_close(pool(x), before + 1)
    pool.linear = nn.Linear(NI, 3, bias=False)
    a = pool.attention_map(x).flatten(2)
    torch.testing.assert_close(pool(x), torch.einsum("bkn,bcn,kc->bk", a, x.flatten(2), pool.linear.weight))


def test_what_may_be_read():
    class Own(nn.Linear):
        pass
    linear = nn.Linear(4, 4)
    assert readable(linear, nn.Linear) and readable(Own(4, 4), nn.Linear) and not readable(linear, nn.LayerNorm) and not readable(None, nn.Linear)
    assert not readable(Doubling(4, 4), nn.Linear) and not readable(torch.compile(linear), nn.Linear) and not readable(own_forward(nn.Linear(4, 4)), nn.Linear)
    handle = linear.register_forward_hook(lambda *a: None)
    assert not readable(linear, nn.Linear) and not callable(affine(nn.Linear(4, 4))) and affine(linear) is linear
    handle.remove()
    assert readable(linear, nn.Linear)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)   # a profiler's
    try: assert readable(linear, nn.Linear)
    finally: handle.remove()
    norm = nn.LayerNorm(4)
    assert foldable(norm, 4) and not foldable(norm, 8)
    norm.register_forward_hook(lambda m, args, out: 2 * out)
    assert not foldable(norm, 4)


class Wrapped(torch.Tensor):
    "A tensor that stands for others, as those of quantised and distributed weights do."
    def __tensor_flatten__(self): return ["inner"], None
    @staticmethod
    def __tensor_unflatten__(tensors, *a): return tensors["inner"]


def test_weights_that_stand_for_others_are_not_read():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped))
    assert not readable(linear, nn.Linear)


def test_functions_take_layers_too():
    attn, x, query = AttentionPool2d(NI, num_heads=2).double(), torch.randn(2, NI, 3, 4, dtype=torch.float64), torch.randn(3, NI, dtype=torch.float64)
    pairs = [(l.weight, l.bias) for l in (attn.q, attn.k, attn.v, attn.proj)]
    assert torch.equal(attention_pool(x, query, attn.q, attn.k, attn.v, attn.proj, attn.norm, num_heads=2), attention_pool(x, query, *pairs, attn.norm, num_heads=2))
    attn.k, attn.q = nn.Linear(NI, 4).double(), nn.Linear(NI, 4).double()   # fewer channels to compare
    assert relative(attn(x, query), called(attn, x, query)) <= 1e-11
    with pytest.raises(BadInput, match=r"query: expected shape \(queries, 16\), got \(3, 9\)"): attn(x, query[:, :9])
    hooked(attn.q), hooked(attn.k)
    with pytest.raises(BadInput, match="x: expected 16 channels, got 7"): attn(x[:, :7], query)
    with pytest.raises(BadInput, match=r"query: expected shape \(queries, 16\), got \(16,\)"): attn(x, query[0])


@pytest.mark.slow
@pytest.mark.parametrize("change", ["hooked", "subclass", "weight_norm", "adapted"])
def test_compiles_into_one_graph_with_changed_layers(change):
    attn, x, query = changed(change, "k").eval(), torch.randn(3, NI, 3, 4, dtype=torch.float64), torch.randn(1, NI, dtype=torch.float64)
    assert relative(torch.compile(attn, backend="aot_eager", fullgraph=True)(x, query), attn(x, query)) <= 1e-11


@pytest.mark.parametrize("change", ["hooked", "subclass", "weight_norm", "adapted"])
def test_export_with_changed_layers(change):
    attn, x, query = changed(change, "k").eval(), torch.randn(3, NI, 3, 4, dtype=torch.float64), torch.randn(1, NI, dtype=torch.float64)
    assert relative(torch.export.export(attn, (x, query)).module()(x, query), attn(x, query)) <= 1e-11


def test_swap_pool_asks_before_it_reads_the_classifier():
    net = nn.Sequential(nn.Conv2d(3, NI, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), hooked(nn.Linear(NI, 3)))
    with pytest.raises(BadInput, match="head: the concat pool .* a plain one"): swap_pool(net, "concat")
    swap_pool(net, "avgstart")


@pytest.mark.parametrize("build, words", [
    (lambda: HEADS["avg"](0, 3), "ni: expected the number of channels of the map, got 0"), (lambda: HEADS["slim"]("8", 3), "ni: expected the number of channels of the map, got '8'"),
    (lambda: HEADS["slim"](8., 3), "ni: expected the number of channels of the map, got 8.0"), (lambda: ClassQueryPooling2d(8, 0), "n_out: expected at least 1 class, got 0")])
def test_bad_input(build, words):
    with pytest.raises(BadInput) as e: build()
    assert words in str(e.value)


def test_a_table_is_a_dict():
    table = Registry("fruit")
    table["fig"] = 3
    assert table.pop("apple", 5) == 5 and table.setdefault("pear", 2) == 2 and table.pop("fig") == 3 and list(table) == ["pear"]
    for f in (lambda: table.pop("pera"), lambda: table["pera"]):
        with pytest.raises(BadInput) as e: f()
        assert str(e.value) == "fruit: 'pera' is unknown. Did you mean 'pear'? Known: pear." and isinstance(e.value, KeyError)


def test_parametrizations_cached_removed_and_copied():
    head, x = built("slim"), torch.randn(2, NI, 5, 4, dtype=torch.float64)
    parametrizations.orthogonal(head[0].attn.k)
    exact = head(x)
    with parametrize.cached(): torch.testing.assert_close(head(x), exact)
    torch.testing.assert_close(copy.deepcopy(head)(x), exact)
    parametrize.remove_parametrizations(head[0].attn.k, "weight")
    assert type(head[0].attn.k) is nn.Linear and relative(head(x), exact) <= 1e-11
    head[0].attn.v.register_forward_hook(lambda m, args, out: 2 * out)
    assert torch.equal(copy.deepcopy(head)(x), head(x)) and relative(head(x), exact) > 1e-3


def test_attribution_to_the_layers_of_the_attention():
    attr = pytest.importorskip("captum.attr")
    head, x = built("slim"), torch.randn(2, NI, 5, 4, dtype=torch.float64)
    for name, shape in dict(k=(2, 20, NI), v=(2, 20, NI), norm=(2, 20, NI), proj=(2, 1, NI)).items():
        found = attr.LayerGradientXActivation(head, getattr(head[0].attn, name)).attribute(x, target=1)
        assert found.shape == shape and found.abs().max() > 0


@pytest.mark.parametrize("head", HEADS)
def test_ensembles_and_gradients_of_single_pictures(head):
    models, x = [HEADS[head](NI, 3).eval() for _ in range(2)], torch.randn(2, NI, 48, 48)
    def run(weights, x): return torch.func.functional_call(models[0], weights, (x,))
    stacked, _ = torch.func.stack_module_state(models)
    torch.testing.assert_close(torch.func.vmap(run, (0, None))(stacked, x), torch.stack([m(x) for m in models]), atol=1e-5, rtol=1e-4)
    weights = {n: p.detach() for n, p in models[0].named_parameters()}
    single = torch.func.vmap(torch.func.grad(lambda w, one: run(w, one[None]).square().sum()), (None, 0))(weights, x)
    models[0](x).square().sum().backward()
    largest = max(p.grad.abs().max() for p in models[0].parameters())
    for n, p in models[0].named_parameters(): assert (single[n].sum(0) - p.grad).abs().max() <= 1e-5 * largest
