"The measuring itself: what is counted, in which order, what is written. No test looks at a time."
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from attnpool.cost import goals, pools, timing
from attnpool.pooling.peers import BlogAttention
from attnpool.functional import attention_pool_plain
from attnpool.heads import HEADS


def test_everybody_takes_part():
    layers = pools.competitors((64, 5, 7))
    assert next(iter(layers)) == pools.BASELINE
    assert {f"head {name}" for name in HEADS} < set(layers)
    x = torch.randn(2, 64, 5, 7)
    for name, layer in layers.items(): assert layer(x).shape == (2, 10 if name.startswith("head") else 64), name
    assert list(pools.competitors((64, 5, 7), ["blog"])) == ["average", "blog"]


def test_the_blog_layer_is_the_plain_form():
    layer, x = BlogAttention(16).double(), torch.randn(3, 16, 4, 5, dtype=torch.float64)
    (wk, wv), (bk, bv) = layer.kv.weight.chunk(2), layer.kv.bias.chunk(2)
    expected = attention_pool_plain(x, layer.query, (layer.q.weight, layer.q.bias), (wk, bk), (wv, bv), (layer.proj.weight, layer.proj.bias), layer.norm)
    assert (layer(x) - expected.squeeze(1)).abs().max() <= 1e-14


def test_rounds_are_interleaved():
    calls = []
    seconds = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, least=0)
    assert calls[4:].count("a") == calls[4:].count("b") == 4   # two calls each to warm up
    assert all(set(calls[i:i + 2]) == {"a", "b"} for i in range(4, 12, 2))
    assert {k: v.shape for k, v in seconds.items()} == {"a": (4,), "b": (4,)}


def test_ratios_of_medians_and_quartiles_of_rounds():
    table = timing.versus({"a": np.array([1., 2., 4.]), "b": np.array([3., 4., 4.])})
    assert table.loc["b"].tolist() == [4000., 2., 1.5, 2.5]
    assert timing.versus({"a": np.array([1.]), "b": np.array([4.])}, "b").loc["a", "ratio"] == .25


def test_peak_memory_counts_what_is_allocated():
    x = torch.randn(1000, 100)
    def two_at_once():
        y = x * 2
        y = y + 1
        return y * 3
    assert 2 * x.nbytes <= timing.peak_memory(two_at_once) < 2.1 * x.nbytes
    assert timing.peak_memory(lambda: None) == 0


def test_our_training_step_takes_one_map():
    x = torch.randn(32, 512, 14, 14)
    layers = pools.competitors((512, 14, 14), ["fold", "blog"])
    memory = {name: timing.peak_memory(timing.training_step(layer, x, matrices=False)) / x.nbytes for name, layer in layers.items()}
    assert 1 <= memory["average"] <= 1.05 and memory["fold"] <= 1.2 and memory["blog"] > 3


def test_multiply_adds():
    c, n = 64, 49
    for name, layer in pools.competitors((c, 7, 7)).items(): assert (pools.multiply_adds(layer, (c, 7, 7)) > 0) == (name != "average"), name
    assert pools.multiply_adds(nn.Conv2d(c, 8, 1, bias=False), (c, 7, 7)) == c * 8 * n
    c, n = 512, 196
    fold, blog = (pools.multiply_adds(pools.competitors((c, 14, 14), [name])[name], (c, 14, 14)) for name in ("fold", "blog"))
    assert blog == 2 * n * c**2 + 2 * c**2 + 2 * n * c   # keys and values; query and projection; scores and sum
    assert fold == 4 * c**2 + 3 * n * c                  # query, fold, value, projection; mean, scores and sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_and_its_files(tmp_path, dtype):
    lines = []
    table = pools.measure([(64, 4, 4)], [1, 2], [dtype], ["contiguous", "channels_last"], ["fold", "head concat"], rounds=2, progress=lines.append)
    assert len(table) == 2 * 2 * 3 and len(lines) == 4 and lines[-1] == f"4/4  64x4x4 2 {str(dtype)[6:]} channels_last"
    assert (table[table.layer == "average"].forward_ratio == 1).all() and (table.filter(like="_ms") > 0).all(axis=None)
    assert table[table.layer == "fold"].parameters.unique() == 4 * 64 * 65 + 3 * 64
    csv, png = goals.write_speed(table, tmp_path / "out")
    again = pd.read_csv(csv, comment="#")
    assert csv.read_text().startswith("# ") and list(again.columns) == list(table.columns) and len(again) == len(table)
    assert png.stat().st_size > 1000
    assert len(pools.format_speed(table)) == 4


def test_growth(tmp_path):
    table = pools.growth(sides=(4, 6), queries=(1, 8), channels=64, batch=1, rounds=1)
    assert set(zip(table.axis, table["size"])) == {("positions", 16), ("positions", 36), ("queries", 1), ("queries", 8)}
    assert [f.name for f in goals.write_speed(table, tmp_path)] == ["growth.csv", "growth.png"]
    short = pools.growth(sides=(4, 6), queries=(), channels=64, batch=1, rounds=1, limit=0.)
    assert set(short["size"]) == {16}   # everything was too slow for a second size


def test_figures(tmp_path):
    lines = []
    table = goals.figures(only="error", progress=lines.append)
    assert len(table) == len(lines) == 3 and table.met.all()
    assert goals.figures(only="multiply-adds").measured.item() <= .05
    assert [f.name for f in goals.write_speed(table, tmp_path)] == ["figures.csv"]


@pytest.mark.parametrize("fmt", pools.FORMATS)
def test_traffic(monkeypatch, fmt):
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)   # minutes of a compiler, for the same numbers
    table = goals.traffic((64, 20, 20), batch=4, fmt=fmt, rounds=2, device="cpu")
    assert list(table.index) == [f"{what}, {way}" for what in ("forward", "training") for way in ("ours", "operations", "compiled")]
    assert (table.ms > 0).all() and (table.low <= table.high).all()


@pytest.mark.parametrize("call, words", [
    (lambda: pools.competitors((64, 4, 4), ["blgo"]), "only: blgo is not among them"),
    (lambda: pools.measure(formats=["nhwc"]), "formats: nhwc is none. Choose from contiguous, channels_last"),
])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words): call()
