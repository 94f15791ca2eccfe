"The same classifier behind every pool, and pools side by side."
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
    at_rest = (z - head[2].running_mean) / (head[2].running_var + 1e-5).sqrt() * head[2].weight + head[2].bias
    assert torch.allclose(head.eval()(x), at_rest @ weight.T + bias, atol=1e-12)
    by_batch = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() * head[2].weight + head[2].bias
    assert torch.allclose(head.train()(x), by_batch @ weight.T + bias, atol=1e-12)


def test_a_classifiers_own_is_left_as_it_was():
    for name in POOLS:
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
    for pool in (MaxStartPooling2d(C), MaxStartPooling2d(C, n_queries=1), SideBySide(max_pool(C), AvgAttnConcatPooling2d(C))): check_pool(moved(pool), C)
    for name in ABLATIONS: check_head(get_head(name), 64, 3, name)
    for head in HEADS:
        if head != "classquery": check_head(get_head(f"max+{head}-norm"), 64, 3)


# In use

def test_names_and_options_of_the_command():
    asked = "avg-fastai,avgstart-mix,max-fastai,max+avgstart-fastai,avg-norm"
    specs = read_specs("digits", asked, "1", "quick", arch="xeca_resnext_tiny")
    assert [s.head for s in specs] == asked.split(",") and len({s.id for s in specs}) == 5 and all(s.recipe.lr > 0 for s in specs)
    specs = read_specs("digits", "avg,slim,gem,classquery", "1", "quick", "classifier=norm", arch="xeca_resnext_tiny")
    assert {dict(s.options)["classifier"] for s in specs[:3]} == {"norm"} and not specs[3].options   # which has no classifier
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
    (lambda: MaxStartPoolHead(C, 5, n_queries=7), "n_queries: 7 does not divide the 48 channels"),
])
def test_bad_input_of_classifiers(make, words):
    with pytest.raises(BadInput) as e: make()
    assert words in str(e.value)
