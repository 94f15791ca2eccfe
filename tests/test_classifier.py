"The same classifier behind every pool, pools side by side, and the options of the pool that starts as the average."
import copy
import inspect
import re

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from attnpool.classifiers import CLASSIFIERS, make_classifier, PoolHead
from attnpool.cli import main
from attnpool.heads import ABLATIONS, AvgPoolHead, ClassQueryPoolHead, fold, get_head, HEADS, MaxStartPoolHead
from attnpool.maps.compute import attention_maps, find_pools
from attnpool.pooling import check_head, check_pool, max_pool, MaxStartPooling2d, SideBySide
from attnpool.pooling.attention import AvgAttnConcatPooling2d
from attnpool.pooling.peers import PEERS
from attnpool.pooling.start import AvgStartAttnPooling2d
from attnpool.registry import BadInput
from attnpool.runs.asked import read_specs
from attnpool.runs.store import load_run
from attnpool.runs.train import open_run

C = 48
SMALL = dict(mldecoder=dict(dim=32), query2label=dict(dim=32))
TABLE = {**HEADS, **PEERS}
POOLS = [n for n in TABLE if n != "classquery"]


def random_map(*shape, dtype=torch.float64): return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


def moved(module, seed=2):
    "Weights and statistics away from their start."
    g = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d): m.running_mean.normal_(generator=g), m.running_var.uniform_(.5, 2, generator=g)
    for p in module.parameters(): p.data += torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) * (p.shape[-1] if p.ndim else 1)**-.5
    return module


def theirs(concat_pool):
    "fastai's head as its vision_learner starts it."
    from fastai.torch_core import apply_init
    from fastai.vision.learner import create_head
    head = create_head(C, 5, concat_pool=concat_pool)
    apply_init(head, nn.init.kaiming_normal_)
    return head


# Classifiers

@pytest.mark.parametrize("name, concat", [("avg", False), ("avgmax", True)])
def test_classifier_fastai_is_fastais(name, concat):
    torch.manual_seed(0)
    x, head, expected = random_map(6, C, 3, 5, dtype=torch.float32), TABLE[name](C, 5, classifier="fastai"), theirs(concat)
    ours = list(head)[-7:]
    assert [str(m) for m in ours] == [str(m) for m in list(expected)[-7:]]
    for m, n in zip(ours, list(expected)[-7:]):
        for p, q in zip(m.parameters(), n.parameters()):
            assert p.shape == q.shape and (torch.equal(p, q) if p.ndim == 1 else p.std().item() == pytest.approx(q.std().item(), rel=.1))
    nn.Sequential(*ours).load_state_dict(nn.Sequential(*list(expected)[-7:]).state_dict())
    assert torch.equal(head.eval()(x), expected.eval()(x))
    outs = []
    for h in (head, expected):
        torch.manual_seed(1)
        outs.append(h.train()(x))
    assert torch.equal(*outs)   # dropout in the same places


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("name", POOLS)
def test_classifier_is_the_same_behind_every_pool(name, classifier):
    head = TABLE[name](C, 5, classifier=classifier, **SMALL.get(name, {}))
    pool = getattr(head[0], "c_out", C)
    behind = list(head)[2 if name == "avg" else 1:]
    assert [str(m) for m in behind] == [str(m) for m in make_classifier(classifier, type("Pool", (), dict(c_out=pool))(), 5)]
    linear = behind[-1]
    assert linear.weight.std().item() == pytest.approx((2 / linear.in_features)**.5, rel=.3) and (linear.bias is None or not linear.bias.any())
    x = random_map(3, C, 4, 7, dtype=torch.float32)
    assert head(x).shape == (3, 5) and head.eval()(x[:1]).shape == (1, 5)
    head.train()(x).square().sum().backward()
    assert [n for n, p in head.named_parameters() if p.requires_grad and p.grad is None] == []


def test_classifier_norm_in_numbers():
    head, x = moved(AvgPoolHead(C, 5, classifier="norm").double()), random_map(7, C, 3, 4)
    z, (weight, bias) = x.mean((2, 3)), head[-1].parameters()
    assert [type(m).__name__ for m in head] == ["AdaptiveAvgPool2d", "Flatten", "BatchNorm1d", "Linear"]
    at_rest = (z - head[2].running_mean) / (head[2].running_var + 1e-6).sqrt()
    assert torch.allclose(head.eval()(x), at_rest @ weight.T + bias, atol=1e-12)
    by_batch = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-6).sqrt()
    assert torch.allclose(head.train()(x), by_batch @ weight.T + bias, atol=1e-12)


def test_a_classifiers_own_is_left_as_it_was():
    for name in TABLE:
        made = []
        for options in ({}, dict(classifier=None)):
            torch.manual_seed(5)
            made.append(TABLE[name](C, 5, **options, **SMALL.get(name, {})))
        assert str(made[0]) == str(made[1]) and all(map(torch.equal, made[0].state_dict().values(), made[1].state_dict().values()))
        assert inspect.signature(TABLE[name]).parameters["classifier"].default is None
    torch.manual_seed(5)
    linear, own = HEADS["learned"](C, 5, classifier="linear"), HEADS["learned"](C, 5)
    assert [type(m).__name__ for m in linear][1:] == ["Linear"] and [type(m).__name__ for m in own][1:] == ["LayerNorm", "Linear"]
    assert [type(m).__name__ for m in HEADS["avgattn"](C, 5, final_act=nn.GELU, classifier="norm")][1:] == ["GELU", "BatchNorm1d", "Linear"]


def test_a_classifier_of_ones_own():
    head = HEADS["slim"](C, 5, classifier=lambda width, n_out: nn.Linear(width, n_out, bias=False))
    assert len(head) == 2 and head[1].bias is None
    narrow = PEERS["fastai"](C, 5, lin_ftrs=8, ps=0)
    assert narrow[3].out_features == 8 and len(MaxStartPoolHead(C, 5, classifier="linear")) == 2


def test_one_picture_at_a_time():
    "A BatchNorm cannot be trained on it, and says so; nothing else minds."
    x = random_map(1, C, 3, 4, dtype=torch.float32)
    for name in CLASSIFIERS:
        head = AvgPoolHead(C, 5, classifier=name)
        assert head.eval()(x).shape == (1, 5) and head(x[:0]).shape == (0, 5)
        if name == "linear": assert head.train()(x).shape == (1, 5)
        else:
            with pytest.raises(ValueError, match="more than 1 value per channel when training"): head.train()(x)


# Side by side

@pytest.mark.parametrize("b, size", [(4, (7, 7)), (40, (5, 9)), (2, (1, 1))])   # 40 pictures are read in chunks
def test_maxstart_begins_as_fastais_head_with_its_gradients(b, size):
    torch.manual_seed(0)
    expected = moved(PEERS["fastai"](C, 5).double())
    ours = MaxStartPoolHead(C, 5).double()
    missing = ours.load_state_dict(expected.state_dict(), strict=False)
    assert missing.missing_keys == ["0.pools.1.query"] and not missing.unexpected_keys
    outs, grads = [], []
    for head in (ours, expected):
        x = random_map(b, C, *size).requires_grad_()
        torch.manual_seed(1)   # the same dropout
        outs.append(head.train()(x))
        F.cross_entropy(outs[-1], torch.arange(b) % 5).backward()
        grads.append({"x": x.grad} | {n: p.grad for n, p in head.named_parameters()})
    assert torch.allclose(*outs, rtol=0, atol=1e-12)
    for name, grad in grads[1].items(): assert torch.allclose(grads[0][name], grad, rtol=0, atol=1e-12), name
    assert grads[0]["0.pools.1.query"].any() == (size != (1, 1))


def test_pools_by_name_in_their_order():
    x = random_map(3, C, 4, 6)
    mean, most = x.mean((2, 3)), x.amax((2, 3))
    for name, parts in {"max+avg": [most, mean], "avg+max": [mean, most], "avg+max+avgstart": [mean, most, mean]}.items():
        head = get_head(name)(C, 5).double()
        assert torch.allclose(head[0](x), torch.cat(parts, 1), atol=1e-14) and head[0].c_out == C * len(parts)
        assert [type(m).__name__ for m in head] == ["SideBySide", "Linear"] and head(x).shape == (3, 5)
    behind = [type(m).__name__ for m in get_head("max+avgstart-1-fastai")(C, 5)][1:]
    assert behind == [type(m).__name__ for m in make_classifier("fastai", max_pool(C), 5)]
    assert len(get_head("max+avgstart-1-fastai")(C, 5)[0].pools[1].query) == 1
    assert str(get_head("max+avgstart-fastai")(C, 5)[0].pools) == str(MaxStartPoolHead(C, 5)[0].pools)


def test_maps_are_those_of_the_pools_that_look():
    x = random_map(2, 3, 40, 56, dtype=torch.float32)
    body = nn.Conv2d(3, C, 8, 8)
    one = nn.Sequential(body, moved(MaxStartPoolHead(C, 5))).eval()
    assert list(find_pools(one)) == ["1.0.pools.1"] and attention_maps(one, x).shape == (2, 8, 5, 7)
    two = nn.Sequential(body, moved(get_head("avgstart+concat+ep")(C, 5))).eval()
    maps = attention_maps(two, x)
    assert {n: tuple(m.shape) for n, m in maps.items()} == {f"1.0.pools.{i}": (2, k, 5, 7) for i, k in ((0, 8), (1, 1), (2, 24))}
    assert all(torch.allclose(m.sum((2, 3)), torch.ones(2, m.shape[1])) for m in maps.values())
    assert not find_pools(nn.Sequential(body, get_head("max+avg")(C, 5)))


@pytest.mark.parametrize("name", ["maxstart", "avg+concat", "max+slim+avgstart-fastai", "slim-fastai", "learned-fastai"])
def test_folded_saved_and_in_other_precisions(name, tmp_path):
    head, x = moved(get_head(name)(C, 5)).eval(), random_map(3, C, 5, 9, dtype=torch.float32)
    exact = copy.deepcopy(head).double()(x.double())
    assert (fold(head)(x) - exact).abs().max() <= 1e-5 * exact.abs().max()
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = get_head(name)(C, 5).eval()
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert torch.equal(other(x), head(x))
    assert (other(x.to(memory_format=torch.channels_last)[:1]) - exact[:1]).abs().max() <= 1e-5 * exact.abs().max()
    half = head.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - exact).abs().max() <= .2 * exact.abs().max()


def test_pools_keep_the_contract():
    for pool in (MaxStartPooling2d(C), MaxStartPooling2d(C, n_queries=1, gate=.3), SideBySide(max_pool(C), AvgAttnConcatPooling2d(C)),
                 AvgStartAttnPooling2d(C, gate=.2, learn_temperature=True, temperature=.5)): check_pool(moved(pool), C)
    for name in ABLATIONS: check_head(get_head(name), 64, 3, name)
    for head in HEADS:
        if head != "classquery": check_head(get_head(f"max+{head}-norm"), 64, 3)


# Options of avgstart

def weights(pool, x, gate=None, factor=1.):
    t = F.layer_norm(x.flatten(2).mT, (x.shape[1],))
    a = (t @ (pool.query * factor).mT).softmax(1).mT   # (b, k, n)
    return a if gate is None else (1 - gate) * a + gate / a.shape[2]


def pooled(a, x): return torch.einsum("bkn,bkdn->bkd", a, x.flatten(2).unflatten(1, (a.shape[1], -1))).flatten(1)


@pytest.mark.parametrize("mix", [0., .25])
@pytest.mark.parametrize("b", [3, 40])
def test_gate_in_numbers(b, mix):
    pool = AvgStartAttnPooling2d(C, 4, gate=.3, mix=mix).double().eval()
    nn.init.normal_(pool.query), nn.init.normal_(pool.gate)
    x, gate = random_map(b, C, 5, 7).requires_grad_(), pool.gate.sigmoid()
    a = (1 - gate) * ((1 - mix) * weights(pool, x) + mix / 35) + gate / 35
    expected, out, target = pooled(a, x), pool(x), random_map(b, C)
    assert torch.allclose(out, expected, atol=1e-12) and torch.allclose(pool.attention_map(x).flatten(2), a, atol=1e-12)
    inputs = (x, pool.query, pool.gate)
    for ours, literal in zip(*(torch.autograd.grad((y * target).sum(), inputs, retain_graph=True) for y in (out, expected))):
        assert torch.allclose(ours, literal, atol=1e-11)


@pytest.mark.parametrize("options", [dict(gate=.5), dict(gate=.01, n_queries=1), dict(learn_temperature=True), dict(temperature=.1), dict(gate=.9, mix=.5)])
def test_gate_and_temperature_start_as_the_average(options):
    x, means = random_map(4, C, 5, 3).requires_grad_(), []
    pool = AvgStartAttnPooling2d(C, **options).double()
    for y in (pool(x), x.mean((2, 3))): means.append((y, torch.autograd.grad((y**3).sum(), x, retain_graph=True)[0]))
    for ours, theirs in zip(*means): assert torch.allclose(ours, theirs, atol=1e-13)
    (pool(x)**3).sum().backward()
    assert pool.query.grad.abs().max() > 0   # it is no saddle: the queries move first, gate and temperature then
    if pool.gate is not None: assert pool.gate.grad.abs().max() < 1e-12 and pool.gate.sigmoid().mean().item() == pytest.approx(options["gate"])
    torch.optim.SGD(pool.parameters(), 1.).step()
    pool.zero_grad()
    (pool(x)**3).sum().backward()
    assert all(p.grad.abs().max() > 1e-9 for p in pool.parameters())


def test_temperature_is_a_rate_of_the_queries():
    "With Adam, queries at temperature 1/10 move as those at a rate ten times as high."
    x, target, asked = random_map(8, C, 4, 4), random_map(8, C), []
    for temperature, rate in ((.1, 1e-3), (1., 1e-2)):
        pool = AvgStartAttnPooling2d(C, temperature=temperature).double()
        opt = torch.optim.Adam(pool.parameters(), rate, eps=0)
        for _ in range(5):
            opt.zero_grad()
            (pool(x) - target).square().sum().backward()
            opt.step()
        asked.append(pool.queries().detach())
        assert torch.allclose(pool(x), pooled(weights(pool, x, factor=1 / temperature), x), atol=1e-12)
    assert torch.allclose(*asked, rtol=1e-6) and asked[0].abs().max() > 1e-3
    pool = AvgStartAttnPooling2d(C, temperature=2., learn_temperature=True).double()
    nn.init.normal_(pool.query), nn.init.normal_(pool.sharpness)
    assert torch.allclose(pool(x), pooled(weights(pool, x, factor=pool.sharpness.exp() / 2), x), atol=1e-12)


def seen(pool, b=2000):
    "The weights of the only query, for `b` pictures: position `i` of the map holds 1 in channel `i`."
    torch.manual_seed(0)
    return pool(torch.eye(12, dtype=torch.float64).view(1, 12, 3, 4).expand(b, -1, -1, -1)).detach()


@pytest.mark.parametrize("at_random", [False, True])
def test_hidden_positions(at_random):
    pool = AvgStartAttnPooling2d(12, 1, drop=.25, drop_random=at_random).double()
    nn.init.normal_(pool.query, generator=torch.Generator().manual_seed(1))
    plain, a = seen(pool.eval(), 1), seen(pool.train())
    hidden = a == 0
    some = hidden.any(1)
    assert some.double().mean().item() == pytest.approx(.5, abs=.05) and (hidden[some].sum(1) == 3).all()
    assert torch.allclose(a[~some], plain.expand(int((~some).sum()), -1), atol=1e-14)
    left = plain * ~hidden
    assert torch.allclose(a, left / left.sum(1, keepdim=True), atol=1e-14)   # the others share the weight
    often = hidden[some].double().mean(0)
    if at_random: assert (often - .25).abs().max() < .06
    else: assert set(often.topk(3).indices.tolist()) == set(plain[0].topk(3).indices.tolist()) and often.topk(3).values.min() == 1
    assert (pool.attention_map(torch.eye(12).double().view(1, 12, 3, 4)).flatten(1) - plain).abs().max() < 1e-14


def test_at_the_start_any_position_is_hidden_and_controls_are_averages_of_the_others():
    for options in (dict(), dict(drop_random=True), dict(gate=.5), dict(mix=1., drop_random=True)):
        pool = AvgStartAttnPooling2d(12, 1, drop=.5, **options).double()
        for start in (True, False):
            a = seen(pool)
            often = (a == 0).double().mean(0)
            assert (often - .25).abs().max() < .05, options   # half of them in half of the pictures
            assert torch.allclose(a[a > 0], torch.where((a == 0).any(1, keepdim=True), 1 / 6, 1 / 12).double().expand_as(a)[a > 0])
            if "mix" not in options: break
            nn.init.normal_(pool.query)   # the control stays an average
    assert AvgStartAttnPooling2d(12, 1, drop=.5)(torch.randn(2, 12, 1, 1)).isfinite().all()   # nothing to hide in one position


def test_hidden_positions_have_the_gradients_of_autograd():
    pool, x = moved(AvgStartAttnPooling2d(12, 3, drop=.4, gate=.3, mix=.5, learn_temperature=True).double()), random_map(3, 12, 2, 3).requires_grad_()
    def f(x, *params):
        torch.manual_seed(7)
        return torch.func.functional_call(pool, dict(zip(dict(pool.named_parameters()), params)), (x,))
    assert torch.autograd.gradcheck(f, (x, *pool.parameters()))


def test_efficient_probing_from_zero():
    head, x = get_head("ep-zero")(64, 5).double(), random_map(2, 64, 3, 5)
    assert not head[0].layer.query.any() and head[0].layer.query.requires_grad
    assert torch.allclose(head[0](x), head[0].layer.v(x.mean((2, 3))), atol=1e-13)
    assert torch.allclose(head[0].attention_map(x), torch.full((2, 32, 3, 5), 1 / 15).double())
    (head(x)**2).sum().backward()
    assert head[0].layer.query.grad.any()


# In use

def test_names_and_options_of_the_command():
    asked = "avg-fastai,avgstart-gate,max-fastai,max+avgstart-fastai,avg-norm"
    specs = read_specs("digits", asked, "1", "quick", arch="xeca_resnext_tiny")
    assert [s.head for s in specs] == asked.split(",") and len({s.id for s in specs}) == 5 and all(s.recipe.lr > 0 for s in specs)
    specs = read_specs("digits", "avg,slim,gem,classquery", "1", "quick", "classifier=norm", arch="xeca_resnext_tiny")
    assert {dict(s.options)["classifier"] for s in specs[:3]} == {"norm"}
    for wrong, words in {"max+avgstrat": "'avgstrat' is unknown. Did you mean 'avgstart'", "avg-fastia": "Did you mean 'avg-fastai'"}.items():
        with pytest.raises(BadInput, match=words): read_specs("digits", wrong, "1", "quick", arch="xeca_resnext_tiny")


def test_from_the_command_to_a_run(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(12): Image.fromarray(rng.integers(0, 120 + 130 * (label == "light"), (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"photos/{label}/{i}.png")
    words = ["bench", str(tmp_path / "photos"), "--heads", "maxstart,max+avgstart-fastai", "--seeds", "1", "--epochs", "1", "--size", "32", "--bs", "8"]
    with pytest.raises(SystemExit) as e: main([*words, "--device", "cpu", "--out", str(tmp_path / "runs")])
    told = capsys.readouterr().out
    assert e.value.code == 0 and all(re.search(rf"^ {re.escape(row)} +1 ", told, re.M) for row in ("maxstart", "max+avgstart-fastai")), told
    assert list(pd.read_csv(tmp_path / "runs/report.csv")["head"]) == ["maxstart", "max+avgstart-fastai"]
    runs = {load_run(run).spec.head: open_run(run).model[-1] for run in (tmp_path / "runs").glob("photos-max*")}
    assert [type(m) for m in runs["maxstart"]][1:] == [type(m) for m in runs["max+avgstart-fastai"]][1:] and runs["maxstart"][0].pools[1].query.any()


class NoWidth(PoolHead): pool = nn.AdaptiveAvgPool2d


@pytest.mark.parametrize("make, words", [
    (lambda: AvgPoolHead(C, 5, classifier="fastia"), "classifier: 'fastia' is unknown. Did you mean 'fastai'? Known: linear, norm, fastai"),
    (lambda: PEERS["gem"](C, 5, classifier="nrom"), "classifier: 'nrom' is unknown. Did you mean 'norm'"),
    (lambda: HEADS["slim"](C, 5, classifier=3), "classifier: expected a name (linear, norm, fastai) or a callable (width, n_out), got 3"),
    (lambda: HEADS["slim"](C, 5, classifier=nn.Linear(C, 5)), "classifier: expected a name"),
    (lambda: HEADS["slim"](C, 0, classifier="fastai"), "n_out: expected at least 1 output, got 0"),
    (lambda: AvgPoolHead(C, 0), "n_out: expected at least 1 output, got 0"),
    (lambda: ClassQueryPoolHead(C, 5, classifier="fastai"), "classifier: the pool of classquery is its classifier too, got 'fastai'. Leave it out, or take avgstart"),
    (lambda: NoWidth(1, 5, classifier="norm"), "classifier: it needs the number of channels that come out of the pool, and the c_out of AdaptiveAvgPool2d is None"),
    (lambda: get_head("max+classquery")(C, 5), "head: 'classquery' has no pool of its own"),
    (lambda: get_head("max+"), "head: '' is unknown"),
    (lambda: AvgStartAttnPooling2d(C, gate=0.), "gate: expected a share between 0 and 1, got 0.0. Use .5"),
    (lambda: AvgStartAttnPooling2d(C, temperature=0), "temperature: expected a number above 0, got 0"),
    (lambda: AvgStartAttnPooling2d(C, drop=1.), "drop: expected a rate in [0, 1), got 1.0"),
    (lambda: MaxStartPoolHead(C, 5, n_queries=7), "n_queries: 7 does not divide the 48 channels"),
])
def test_bad_input_of_classifiers_and_gates(make, words):
    with pytest.raises(BadInput) as e: make()
    assert words in str(e.value)
