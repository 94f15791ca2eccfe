"What people and other projects' tests ask of the PatchConvNets: fold, export, FX, TorchScript, function transforms, checkpoints as they come."
import copy
import pickle
import warnings
from argparse import Namespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules
from timm.models import FeatureInfo
from torch import nn

from attnpool.heads import ABLATIONS, fold, FoldedAttention, HEADS
from attnpool.layers import Mish, TokenBatchNorm
from attnpool.learner import vision_learner
from attnpool.models.deit import load_deit, to_deit, variant_of, VARIANTS
from attnpool.models.patchconvnet import PatchConvNet
from attnpool.models.body import TimmMap
from attnpool.models.surgery import body_of, build_network, swap_pool, with_head
from attnpool.pooling.paper import PaperAggregation
from attnpool.registry import BadInput
from attnpool.weights import mismatches, read_weights, weights_in

SMALL = dict(embed_dim=32, depth=2, gamma_init=.3)
NAMES = "patchconvnet_s20", "patchconvnet_s20_multi"
SIZES = (1, 64, 64), (5, 32, 96), (3, 160, 48)   # batch, height, width: none of them that of the example


def stirred(net, seed=0):
    "The network with weights that are not those it starts with, in eval mode."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm1d): m.running_mean.normal_(generator=g), m.running_var.uniform_(.5, 2, generator=g)
        for p in net.parameters(): p += torch.randn(p.shape, generator=g) * (.3 if p.ndim == 1 else p[0].numel()**-.5)
    return net.eval()


def small(name="patchconvnet_s20", **options): return timm.create_model(name, **SMALL | dict(num_classes=7) | options)


def relative(a, b): return ((a - b).abs().max() / b.abs().max()).item()


def pictures(b, h, w, dtype=torch.float32, seed=1): return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Fold

def check_fold(net, x, at=lambda net: net.pool, fmap=None):
    folded, fmap = fold(net), net.forward_features(x) if fmap is None else fmap
    assert isinstance(at(folded).attn, FoldedAttention) and not any(p.requires_grad for p in folded.parameters())
    assert relative(folded(x), net(x)) <= 1e-9
    torch.testing.assert_close(at(folded).attention_map(fmap), at(net).attention_map(fmap), rtol=1e-9, atol=1e-12)
    return folded


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_folds(name):
    check_fold(stirred(small(name, depth=1).double()), pictures(2, 64, 48, torch.float64))


@pytest.mark.parametrize("options", [dict(norm=nn.RMSNorm), dict(norm=TokenBatchNorm), dict(num_heads=4), dict(num_heads=4, norm=TokenBatchNorm),
                                     dict(num_classes=40), dict(num_classes=1), dict(num_classes=0)], ids=str)   # 40 classes are more than 12 positions
@pytest.mark.parametrize("name", NAMES)
def test_every_option_folds(name, options):
    net = stirred(small(name, **options).double())
    folded = check_fold(net, pictures(2, 64, 48, torch.float64))
    x = pictures(3, 16, 16, torch.float64)
    assert relative(folded(x), net(x)) <= 1e-9


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-6), (torch.bfloat16, .05)])
@pytest.mark.parametrize("name", NAMES)
def test_folded_in_other_precisions_and_under_autocast(name, dtype, tol):
    net, x = stirred(small(name)), pictures(2, 64, 48)
    assert relative(fold(copy.deepcopy(net).to(dtype))(x.to(dtype)).float(), net(x)) <= tol
    with torch.autocast("cpu", torch.bfloat16): assert relative(fold(net)(x).float(), net(x).float()) <= .05   # folded within autocast as well


def test_what_cannot_be_folded_is_named():
    with pytest.raises(BadInput, match="pool.attn is a Positions that cannot be folded"): fold(small(norm=Positions).eval())
    net = small().eval()
    net.pool.attn.v.register_forward_hook(lambda *_: None)
    with pytest.raises(BadInput, match=r"pool.attn.v is a Linear with a hook"): fold(net)


class Positions(nn.GroupNorm):
    def __init__(self, ni): super().__init__(1, ni)
    def forward(self, x): return super().forward(x.flatten(0, -2)).view_as(x)


def test_folded_in_the_place_of_average_pooling():
    net = timm.create_model("resnet10t", num_classes=4).double().eval()
    class Head(nn.Sequential):
        def __init__(self, ni, n_out): super().__init__(PaperAggregation(ni), nn.Linear(ni, n_out))
    swap_pool(net, Head)
    nn.init.normal_(net.global_pool.pool.gamma if hasattr(net.global_pool.pool, "gamma") else net.global_pool.gamma)
    stirred(net.global_pool.pool)
    x = pictures(2, 64, 64, torch.float64)
    check_fold(net, x, at=lambda net: net.global_pool.pool, fmap=net.forward_features(x))


def test_a_traced_graph_folds():
    for name in NAMES:
        net, x = stirred(small(name).double()), pictures(2, 64, 48, torch.float64)
        folded = fold(graph_of(net))
        assert isinstance(folded.pool.attn, FoldedAttention) and relative(*(next(iter(f(x).values())) for f in (folded, graph_of(net)))) <= 1e-9


def test_reparametrised_layers_count_as_they_are():
    from torch.nn.utils.parametrizations import weight_norm
    net, x = stirred(small().double()), pictures(2, 64, 48, torch.float64)
    before = net(x)
    for layer in (net.pool.attn.v, net.blocks[0].pw2): weight_norm(layer).parametrizations.weight.original0.data.mul_(2)
    assert relative(net(x), before) > .01
    check_fold(net.eval(), x)
    net.train()(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_every_layer_is_called_where_somebody_listens():
    for name in NAMES:
        net, heard = small(name).eval(), []
        for n, m in net.named_modules(): m.register_forward_hook(lambda *_, n=n: heard.append(n))
        net(pictures(1, 32, 32))
        assert {*heard} == {n for n, _ in net.named_modules()}
        net, x = stirred(small(name)), pictures(2, 32, 32)
        assert 0 < relative(torch.ao.quantization.quantize_dynamic(net)(x), net(x)) < .2


# Exports: a batch size or a size of pictures that became a constant

def any_size(least=32):
    dim = torch.export.Dim
    return ({0: dim("batch"), 2: dim("height", min=least), 3: dim("width", min=least)},)


EXPORTED = {"one query": lambda: stirred(small()), "per class": lambda: stirred(small(NAMES[1])), "heads": lambda: stirred(small(NAMES[1], num_heads=4)),
            "average": lambda: stirred(small(global_pool="avg")), "batch norm": lambda: stirred(small(norm=TokenBatchNorm)),
            "folded": lambda: fold(stirred(small())), "folded per class": lambda: fold(stirred(small(NAMES[1])))}


def agrees(f, net, sizes=SIZES, tol=3e-6):
    for size in sizes:
        x = pictures(*size)
        with torch.no_grad(): assert relative(f(x), net(x)) <= tol, size


def onnx_session(net, x, file, dynamo):
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    ort = pytest.importorskip("onnxruntime")
    how = dict(dynamic_shapes=any_size(), verbose=False, external_data=False) if dynamo else dict(dynamic_axes=dict(x={0: "b", 2: "h", 3: "w"}, y={0: "b"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), str(file), input_names=["x"], output_names=["y"], dynamo=dynamo, **how)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, dict(x=x.numpy()))[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPORTED)
def test_exports_run_at_any_batch_and_size(name, tmp_path):
    net, x = EXPORTED[name](), pictures(2, 64, 48)
    agrees(torch.export.export(net, (x,), dynamic_shapes=any_size()).module(), net)
    agrees(torch.jit.trace(net, (x,)), net)
    agrees(onnx_session(net, x, tmp_path / "old.onnx", False), net)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one query", "heads", "folded per class"])
def test_the_newer_onnx_exporter(name, tmp_path):
    net = EXPORTED[name]()
    agrees(onnx_session(net, pictures(2, 64, 48), tmp_path / "new.onnx", True), net)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*HEADS, *(n for n in ABLATIONS if not n.endswith("-rms"))])   # the older exporter knows no RMSNorm
def test_heads_on_a_body_trace_and_export_the_older_way(name, tmp_path):
    head = (HEADS[name] if name in HEADS else ABLATIONS[name])(32, 5)
    net, x = stirred(nn.Sequential(nn.Conv2d(3, 32, 3, 2), Mish(), head)), pictures(2, 20, 18)
    sizes = (1, 9, 9), (5, 20, 33), (3, 40, 21)
    agrees(torch.jit.trace(net, (x,)), net, sizes)
    agrees(onnx_session(net, x, tmp_path / "h.onnx", False), net, sizes)


def test_many_queries_trace_and_differentiate_whole():
    pool, x = stirred(PaperAggregation(8, queries=3000, sees_itself=False)), torch.randn(1, 8, 3, 3)   # two pictures are above what is sliced
    traced, two = torch.jit.trace(pool, (x,)), torch.randn(2, 8, 3, 4)
    torch.testing.assert_close(traced(two), pool(two))
    program = torch.export.export(pool, (two,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)).module()
    torch.testing.assert_close(program(torch.randn(5, 8, 3, 4).copy_(two[:1])), pool(two[:1].expand(5, -1, -1, -1)))
    params = {n: p.detach() for n, p in pool.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(pool, p, (two,)).square().mean())(params)
    pool(two).square().mean().backward()
    torch.testing.assert_close(found["ffn.0.weight"], pool.ffn[0].weight.grad)


def test_a_swapped_pool_traces_at_any_batch():
    net = stirred(swap_pool(timm.create_model("resnet10t", num_classes=4), "learned"))
    agrees(torch.jit.trace(net, (pictures(2, 64, 64),), check_trace=False), net, [(1, 64, 64), (5, 96, 32)], 1e-5)


# What timm's own tests ask of its convolutional networks

def graph_of(net, train=False):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    how = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
    train_nodes, eval_nodes = get_graph_node_names(net, tracer_kwargs=how)
    return create_feature_extractor(net, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=how)


@pytest.mark.parametrize("options", [{}, dict(drop_path_rate=.3, drop_rate=.1, proj_drop_rate=.1, attn_drop_rate=.1), dict(norm=TokenBatchNorm), dict(global_pool="avg")], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_graphs_compute_the_same(name, options):
    if name.endswith("multi") and options.get("global_pool") == "avg": pytest.skip("an average has no queries")
    net, x = stirred(small(name, **options)), pictures(2, 64, 48)
    out, = graph_of(net)(x).values()
    assert torch.equal(out, net(x))
    net.train()
    graph = graph_of(net, train=True).train()
    torch.manual_seed(5)
    out, = graph(x).values()
    out.mean().backward()
    grads = {n: p.grad.clone() for n, p in graph.named_parameters()}
    assert len(grads) == len(list(net.parameters())) and all(g.isfinite().all() for g in grads.values())
    net.zero_grad()
    torch.manual_seed(5)
    net(x).mean().backward()
    for n, p in net.named_parameters(): torch.testing.assert_close(grads[n], p.grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, dict(num_heads=4), dict(global_pool="avg"), dict(num_classes=0), dict(drop_path_rate=.2, attn_drop_rate=.1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_torchscript(name, options, tmp_path):
    if name.endswith("multi") and options.get("global_pool") == "avg": pytest.skip("an average has no queries")
    net = stirred(small(name, **options))
    script = torch.jit.script(net)
    agrees(script, net)
    script.save(str(tmp_path / "net.pt"))
    agrees(torch.jit.load(str(tmp_path / "net.pt")), net)
    graph = torch.jit.script(graph_of(net))
    agrees(lambda x: next(iter(graph(x).values())), net)
    script.train()
    script(pictures(2, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in script.parameters())


def test_default_configuration():
    for name in NAMES:
        net = small(name, num_classes=1000).eval()
        cfg, x = net.default_cfg, pictures(1, 224, 224)
        fmap = net.forward_features(x)
        assert fmap.shape[2:] == cfg["pool_size"] == (14, 14) and fmap.shape[1] == net.num_features
        before = net.forward_head(fmap, pre_logits=True)
        assert before.shape == ((1, 32) if name == NAMES[0] else (1, 1000, 32))   # per class: a vector for each class
        assert {cfg["classifier"] + ".weight", cfg["first_conv"] + ".weight"} <= net.state_dict().keys()
        net.reset_classifier(0)
        assert net.num_classes == 0 and net(x).shape == (1, net.head_hidden_size)
        net.reset_classifier(0, "")
        assert net(x).shape == fmap.shape
        assert small(name, num_classes=0, global_pool="").eval()(x).shape == fmap.shape
    assert timm.create_model("patchconvnet_s60.in21k_ft_in1k_384", **SMALL).default_cfg["pool_size"] == (24, 24)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_features(name):
    x = pictures(2, 96, 64)
    for how in (dict(), dict(feature_cls="getter"), dict(feature_cfg=dict(feature_cls="fx")), dict(feature_cfg=dict(feature_cls="hook"))):
        net = small(name, depth=3, num_classes=1000, features_only=True, **how).eval()
        maps = net(x)
        assert len(maps) == len(net.feature_info.channels()) == 3 and [tuple(m.shape) for m in maps] == [(2, 32, 6, 4)] * 3
    torch.jit.script(small(name, depth=3, features_only=True, feature_cfg=dict(feature_cls="fx")).eval())(x)
    net = small(name, depth=4).eval()
    out, maps = net.forward_intermediates(x, output_fmt="NCHW")
    assert [m.shape[1] for m in maps] == FeatureInfo(net.feature_info, len(net.feature_info)).channels() and torch.equal(out, net.forward_features(x))
    net.set_grad_checkpointing()
    torch.testing.assert_close(net.forward_intermediates(x)[0], out)
    saving = small(name, depth=3, features_only=True).train()
    saving.model.set_grad_checkpointing()   # timm's wrapper has no switch of its own
    sum(m.sum() for m in saving(x)).backward()
    assert all(p.grad is not None for n, p in saving.named_parameters() if "blocks" in n or "stem" in n)


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_memory_formats(name):
    net, x = stirred(small(name, in_chans=1)), pictures(2, 48, 64)[:, :1]
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x), net(x))
        other.load_state_dict(to_deit(net.state_dict()))   # what loads the authors' names came along
    torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), net(x))
    assert net.forward_features(x.expand(-1, 1, -1, -1)).is_contiguous(memory_format=torch.channels_last)


def test_compiled_with_a_size_that_changes():
    net = stirred(small(depth=1))
    with torch.no_grad(): agrees(torch.compile(net, backend="eager", dynamic=True), net)
    with pytest.raises(BadInput, match="48x64"): torch.compile(net, backend="eager")(pictures(1, 40, 64))


# Transforms of functions

@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_functions(name, train):
    net, x, y = stirred(small(name).double()).train(train), pictures(3, 64, 48, torch.float64), torch.tensor([1, 0, 6])
    params = {n: p.detach() for n, p in net.named_parameters()}
    def loss(params, x, y): return F.cross_entropy(torch.func.functional_call(net, params, (x[None],)), y[None])
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    for i in range(3):
        net.zero_grad()
        F.cross_entropy(net(x[i:i + 1]), y[i:i + 1]).backward()
        for n, p in net.named_parameters(): torch.testing.assert_close(each[n][i], p.grad, rtol=1e-9, atol=1e-11)
    step = torch.randn_like(x)
    value, along = torch.func.jvp(net, (x,), (step,))
    rows = torch.func.jacrev(lambda x: net(x[None])[0])(x[0])
    torch.testing.assert_close(along[0], (rows * step[0]).flatten(1).sum(1), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.func.jacfwd(lambda t: net((x + t * step)[:1])[0])(torch.zeros((), dtype=torch.float64)), along[0])
    with torch.autograd.forward_ad.dual_level():
        dual = net(torch.autograd.forward_ad.make_dual(x, step))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, along)


# No parameter that nobody trains

@pytest.fixture(scope="module")
def dls():
    from attnpool.data.digits import digits_dls
    return digits_dls(size=64, bs=8, n_train=16, n_valid=8)


def untrained(model, x):
    model.train()
    model(x).float().square().sum().backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_aggregation_is_gone(dls, name):
    options = dict(embed_dim=32, depth=2)
    x = dls.one_batch()[0]
    from fastai.vision.learner import vision_learner as fastais
    def head(n): return nn.Sequential(nn.Linear(32, n))
    made = dict(ours=vision_learner(dls, name, pretrained=False, custom_head=HEADS["learned"], **options).model,
                whole=vision_learner(dls, name, pretrained=False, **options).model, fastais=fastais(dls, name, pretrained=False, **options).model,
                fastais_head=fastais(dls, name, pretrained=False, custom_head=head(10), **options).model, with_head=with_head(name, "slim", 10, **options),
                body=nn.Sequential(body_of(name, **options).model, HEADS["avg"](32, 10)), network=build_network(name, 10, "classquery", **options).model)
    for how, model in made.items():
        assert not untrained(model, x), how
        aggregated = any(isinstance(m, PaperAggregation) for m in model.modules())
        assert aggregated == (how in ("whole", "fastais", "fastais_head")), how
        assert model(x).shape == (8, 10)


@pytest.mark.parametrize("head", [*HEADS, *ABLATIONS])
def test_every_parameter_of_a_head_is_trained(head):
    body = build_network("xeca_resnext_tiny", 10, head).model if head in HEADS else nn.Sequential(nn.Conv2d(3, 32, 3, 2), ABLATIONS[head](32, 10))
    assert not untrained(body, pictures(4, 32, 32))


@pytest.mark.parametrize("arch", ["convnext_atto", "mobilenetv3_small_050", "hgnetv2_b0", "mambaout_femto"])
def test_what_stands_behind_the_map_of_a_timm_network_is_gone(arch):
    whole, x = timm.create_model(arch, num_classes=0).eval(), pictures(2, 64, 64)
    body = body_of(arch)
    assert sum(p.numel() for p in body.model.parameters()) < sum(p.numel() for p in whole.parameters())
    body.model.model.load_state_dict(whole.state_dict())   # files of whole networks still load
    torch.testing.assert_close(body.model.eval()(x), TimmMap(whole)(x))
    assert not untrained(nn.Sequential(body.model, HEADS["avg"](body.ni, 3)), x)
    classifier = timm.create_model(arch, num_classes=5)
    copy.deepcopy(body.model).load_state_dict({"model." + key: value for key, value in classifier.state_dict().items()})


def test_files_of_learners_whose_aggregation_was_kept_still_load(dls, tmp_path):
    learn = vision_learner(dls, NAMES[0], pretrained=False, custom_head=HEADS["learned"], path=tmp_path, embed_dim=32, depth=2)
    whole = {"0.model." + key: value for key, value in stirred(small(num_classes=0)).state_dict().items()}
    head = {key: value for key, value in learn.model.state_dict().items() if key.startswith("1.")}
    state = whole | head
    assert "0.model.pool.query" in state and "0.model.pool.query" not in learn.model.state_dict()
    learn.model.load_state_dict(state)
    assert torch.equal(learn.model[0].model.blocks[1].pw1.weight, whole["0.model.blocks.1.pw1.weight"])
    (tmp_path / "models").mkdir()
    torch.save(state, tmp_path / "models" / "earlier.pth")
    learn.load("earlier", with_opt=False)
    with pytest.raises(RuntimeError, match="0.model.extra"): learn.model.load_state_dict(state | {"0.model.extra": torch.zeros(1)})


# Checkpoints as people have them

def prefixed(state, prefix): return {prefix + key: value for key, value in state.items()}


def wrappers(state):
    other = {key: value + 1 for key, value in state.items()}
    average = torch.optim.swa_utils.AveragedModel(PatchConvNet(**SMALL, num_classes=7)).state_dict()
    return {"bare": state, "model": dict(model=state, epoch=3, args=Namespace(lr=.1)), "state_dict": dict(state_dict=state, optimizer=dict(state={}, param_groups=[])),
            "parallel": dict(state_dict=prefixed(state, "module.")), "compiled": prefixed(state, "_orig_mod."), "both": prefixed(state, "module._orig_mod."),
            "lightning": dict(state_dict=prefixed(state, "model.")), "ema prefix": prefixed(state, "ema.") | prefixed(other, "model."),
            "average": dict(state_dict=other, state_dict_ema=prefixed(state, "module.")), "model_ema": dict(model=other, model_ema=state),
            "no average": dict(model=state, model_ema=None), "deep": dict(model=dict(state_dict=dict(net=state))), "ema": dict(ema=dict(module=state, decay=.9)),
            "a part of a detector": dict(state_dict=prefixed(state, "backbone.net.") | {"neck.weight": torch.zeros(3), "step": 5}),
            "beside a loss": dict(state_dict=prefixed(other, "model.") | prefixed(state, "ema.") | {"criterion.weight": torch.ones(2)}),
            "swa": dict(state_dict={"n_averaged": average["n_averaged"]} | prefixed(state, "module."))}


WRAPPED = [*wrappers({"a.b": torch.zeros(1)})]


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_in_every_wrapper(name, how, tmp_path):
    source = stirred(small(name))
    theirs = wrappers(to_deit(source.state_dict()))[how]
    torch.save(theirs, tmp_path / "them.pth")
    x = pictures(2, 32, 32)
    def check(net): torch.testing.assert_close(net.eval()(x), source(x))
    check(load_deit(small(name), theirs))
    check(load_deit(small(name), tmp_path / "them.pth"))
    check(load_deit(small(name), str(tmp_path / "them.pth")))
    check(load_deit(small(name), wrappers(source.state_dict())[how]))   # our names, wrapped in the same way
    check(small(name, checkpoint_path=str(tmp_path / "them.pth")))
    file = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "them.pth"), num_classes=7), pretrained=True)
    check(small(name, **file))
    other = small(name, **file | dict(num_classes=3, in_chans=1))
    assert torch.equal(other.blocks[1].pw2.weight, source.blocks[1].pw2.weight) and other(x[:, :1]).shape == (2, 3)
    check(small(name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=theirs, num_classes=7)))


def test_a_moving_average_is_taken_or_left():
    a, b = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
    for found in (dict(model=a, model_ema=b), dict(state_dict=a, state_dict_ema=b), prefixed(a, "model.") | prefixed(b, "ema.")):
        assert weights_in(found)["x"].all() and not weights_in(found, averages=False)["x"].any()


def test_names_that_only_look_like_prefixes_stay():
    net = nn.ModuleDict(dict(model=nn.Linear(2, 2)))
    assert weights_in(net.state_dict(), net.state_dict()).keys() == net.state_dict().keys()
    assert [*weights_in(net.state_dict())] == ["weight", "bias"]
    several = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    assert weights_in(several, ["weight", "bias"]).keys() == several.keys()   # which of the two is meant?
    assert [*weights_in(prefixed(net.state_dict(), "encoder."), net.state_dict())] == [*net.state_dict()]


def test_whole_networks_and_half_precision(tmp_path):
    source, x = stirred(small()), pictures(2, 32, 32)
    for found in (dict(model=source), source, dict(ema=source, model=None), dict(model=nn.DataParallel(source))):
        torch.testing.assert_close(load_deit(small(), found).eval()(x), source(x))
    torch.save(dict(model=source), tmp_path / "whole.pt")
    with pytest.raises(BadInput, match=r"holds more than weights \(attnpool.models.patchconvnet.PatchConvNet\).*weights_only=False"):
        load_deit(small(), tmp_path / "whole.pt")
    torch.save({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "half.pth")
    half = load_deit(small(), tmp_path / "half.pth").eval()
    assert {p.dtype for p in half.parameters()} == {torch.float32} and relative(half(x), source(x)) < .01
    from safetensors.torch import save_file
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    torch.testing.assert_close(load_deit(small(), tmp_path / "net.safetensors").eval()(x), source(x))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4 and no more", b"<html>404</html>"])
def test_what_is_no_checkpoint(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(BadInput, match="^file: .*(cannot be read as weights|has zero bytes)"): read_weights(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="^file: there is no"): read_weights(tmp_path / "y.pth")
    for nothing in ({}, dict(epoch=3), dict(model={})):
        with pytest.raises(BadInput, match="no weights in it"): weights_in(nothing)
    with pytest.raises(BadInput, match="checkpoint: expected a dict of weights or a network, got list"): weights_in([1])


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path / "ran"), "w"))
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(dict(model=Evil())))
    with pytest.raises(BadInput): read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def meta(name, **options):
    with torch.device("meta"): return timm.create_model(name, **options)


@pytest.mark.parametrize("name", ["patchconvnet_s60", "patchconvnet_b60_multi", "patchconvnet_l20"])
def test_a_file_of_another_variant_is_named(name):
    state = meta(name).state_dict()
    assert variant_of(state) == f"timm.create_model({name!r})"
    with pytest.raises(BadInput) as e: load_deit(meta("patchconvnet_s20"), state)
    assert str(e.value).startswith("state: not the weights of this network: ") and str(e.value).endswith(f"They look like those of timm.create_model({name!r}).")
    assert str(e.value).count("; ") == 3 and "and" in str(e.value)
    with pytest.raises(BadInput, match="^pretrained: not the weights of this network: .*" + name): small(pretrained=True, pretrained_cfg_overlay=dict(state_dict=to_deit(state)))


def test_a_file_of_something_else_is_named(tmp_path):
    with pytest.raises(BadInput, match="of another kind than PatchConvNet"): small(pretrained=True, pretrained_cfg_overlay=dict(state_dict=timm.create_model("resnet10t").state_dict()))
    assert variant_of(small(in_chans=1, num_classes=9).state_dict()) == "timm.create_model('patchconvnet_s20', embed_dim=32, depth=2, num_classes=9, in_chans=1)"
    # one query for a network with one per class, and the other way round
    one, many = (small(name, num_classes=1000).state_dict() for name in NAMES)
    for classes in (1000, 7):
        with pytest.raises(BadInput, match="pool.query is"): small(NAMES[0], num_classes=classes, pretrained=True, pretrained_cfg_overlay=dict(state_dict=many))
        each = small(NAMES[1], num_classes=classes, pretrained=True, pretrained_cfg_overlay=dict(state_dict=one)).pool.query
        assert torch.equal(each, one["pool.query"].expand(classes, -1))   # the single query for each class
    assert mismatches(one, one) == []


# Options

def test_one_picture_without_a_batch_is_named():
    with pytest.raises(BadInput, match=r"^x: expected pictures \(b, in_chans, H, W\), got \(3, 64, 64\). For one picture use x\[None\]"): small()(torch.zeros(3, 64, 64))


def test_a_feed_forward_part_without_width_is_refused():
    for width in (0, -1, .01, None):
        with pytest.raises(BadInput, match="^ffn_expand: expected a factor above 0 that leaves a channel"): PaperAggregation(16, ffn_expand=width)
    with pytest.raises(BadInput, match="^ffn_expand"): small(ffn_expand=0)


def hooked(head): head[0].attn.register_forward_hook(lambda m, args, out: 3 * out)
def other_drop(head): head[0].attn.proj_drop = torch.nn.Tanh()
def other_query(head): head[0].__class__ = type("Own", (type(head[0]),), dict(forward=lambda self, x: self.attn(x, 2 * self.query), __module__="own"))
def normed(head): torch.nn.utils.weight_norm(head[-1])


@pytest.mark.parametrize("change, words", [
    (hooked, "0.attn is a AttentionPool2d with a hook"), (other_drop, "0.attn.proj_drop is a Tanh"),
    (other_query, "0 is a Own with a forward of its own"), (normed, "cannot be copied")])
def test_what_fold_would_lose_is_refused(change, words):
    head = HEADS["learned"](16, 4).eval()
    change(head)
    with pytest.raises(BadInput, match=words): fold(head.eval())


def test_fold_without_a_bias_after_the_attention():
    head = HEADS["learned"](16, 4).double().eval()
    head[0].attn.proj = torch.nn.Linear(16, 16, bias=False).double()
    x = torch.randn(2, 16, 5, 5).double()
    torch.testing.assert_close(fold(head.eval())(x), head(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "ema": {"decay": .9}}, lambda s: {"model": s, "model_ema": {}}, lambda s: {"model": s, "ema": {"decay": torch.tensor(.9)}},
    lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()}])
def test_averages_without_weights_and_compiled_blocks(wrap):
    one, two = (timm.create_model("patchconvnet_s20", embed_dim=16, depth=2, num_classes=3) for _ in range(2))
    load_deit(two, wrap(one.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_a_quantised_network_and_one_with_other_layers_load_and_run():
    net = timm.create_model("patchconvnet_s20", embed_dim=16, depth=2, num_classes=3).eval()
    small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {torch.nn.Linear})
    small.load_state_dict(small.state_dict())
    x = torch.randn(2, 3, 32, 32)
    net.pool.attn.scale *= 30   # the aggregation counts
    with torch.no_grad(): net.pool.gamma_1.fill_(1)
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
    for layer in (torch.nn.Conv2d(16, 16, 1, bias=False), torch.nn.Conv2d(16, 16, 1, groups=4)):
        net.blocks[0].pw2 = layer
        block = net.blocks[0]
        y = block.norm(net.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        expected = net.stem(x) + block.gamma_1[:, None, None] * layer(block.se(block.act(block.dw(block.act(block.pw1(y))))))
        torch.testing.assert_close(block(net.stem(x)), expected)
    with pytest.raises(BadInput, match="global_pool: expected"): net.reset_classifier(5, "max")
