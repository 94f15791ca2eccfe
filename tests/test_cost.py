"The measuring itself: what is counted, in which order, what is written. No test decides by a time."
import warnings

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch import nn

from attnpool.cli import main
from attnpool.cost import goals, pools, steps, timing
from attnpool.cost.networks import complexity, count, network_of, NETWORKS, PeakMemory, published, throughput
from attnpool.fold import form
from attnpool.heads import HEADS
from attnpool.pooling.attention import LearnedAggregation
from attnpool.pooling.peers import PEERS
from attnpool.registry import BadInput


OTHERS = [name for name in PEERS if name not in ("avg-norm", "fastai")]   # which share the pools of "average" and "avgmax"
ADD_UP = {"average", "max", "avgmax", "gem", "lse"}   # without a matrix product


def test_everybody_takes_part():
    layers = pools.competitors((64, 5, 7))
    assert next(iter(layers)) == pools.BASELINE
    assert set(layers) == {"average", "average+linear", "fold"} | {f"head {name}" for name in HEADS} | set(OTHERS)
    x = torch.randn(2, 64, 5, 7)
    for name, layer in layers.items():
        assert layer(x).shape == (2, 10 if name.startswith("head") else layer.c_out if name in PEERS else 64), name
    assert layers["timm-attn"].layer.feat_size == layers["clip"].layer.size == (5, 7)   # no embedding is resampled
    assert list(pools.competitors((64, 5, 7), ["blog"])) == ["average", "blog"]


def test_every_round_times_every_call():
    calls = []
    seconds = timing.time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, least=0)
    assert calls[4:].count("a") == calls[4:].count("b") == 4   # two calls each to warm up
    assert all(set(calls[i:i + 2]) == {"a", "b"} for i in range(4, 12, 2))
    assert {k: v.shape for k, v in seconds.items()} == {"a": (4,), "b": (4,)}


def test_ratios_of_medians_and_quartiles_of_rounds():
    table = timing.ratios({"a": np.array([1., 2., 4.]), "b": np.array([3., 4., 4.])})
    assert table.loc["b"].tolist() == [4000., 2., 1.5, 2.5]
    assert timing.ratios({"a": np.array([1.]), "b": np.array([4.])}, "b").loc["a", "ratio"] == .25


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
    for name, layer in pools.competitors((c, 7, 7)).items(): assert (pools.multiply_adds(layer, (c, 7, 7)) > 0) == (name not in ADD_UP), name
    assert pools.multiply_adds(nn.Conv2d(c, 8, 1, bias=False), (c, 7, 7)) == c * 8 * n
    c, n = 512, 196
    fold, blog = (pools.multiply_adds(pools.competitors((c, 14, 14), [name])[name], (c, 14, 14)) for name in ("fold", "blog"))
    assert blog == 2 * n * c**2 + 2 * c**2 + 2 * n * c   # keys and values; query and projection; scores and sum
    assert fold == 4 * c**2 + 2 * n * c                  # query, fold, value, projection; scores and sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_and_its_files(tmp_path, dtype):
    lines = []
    table = pools.measure_pools([(64, 4, 4)], [1, 2], [dtype], ["contiguous", "channels_last"], ["fold", "head concat"], rounds=2,
                                progress=lines.append)
    assert len(table) == 2 * 2 * 3 and len(lines) == 4 and lines[-1] == f"4/4  64x4x4 2 {str(dtype)[6:]} channels_last"
    assert (table[table.layer == "average"].forward_ratio == 1).all() and (table.filter(like="_ms") > 0).all(axis=None)
    assert table[table.layer == "fold"].parameters.unique() == 4 * 64 * 65 + 3 * 64
    csv, png = timing.write_costs(table, tmp_path / "out", "speed", plot=pools.plot_pool_costs)
    again = pd.read_csv(csv, comment="#")
    assert csv.read_text().startswith(f"# {timing.machine()}\n") and list(again.columns) == list(table.columns) and len(again) == len(table)
    assert png.stat().st_size > 1000
    assert len(pools.pool_tables(table)) == 4


def test_the_form_that_ran_stands_in_the_table():
    table = pools.measure_pools([(256, 14, 14)], [2], [torch.float32], ["contiguous"], rounds=1).set_index("layer").form
    assert set(table[["average", "average+linear", "head avg", *OTHERS]]) == {""}
    assert set(table.drop(["average", "average+linear", "head avg", *OTHERS])) == {"folded"}
    layer = pools.competitors((64, 14, 14), ["fold"])["fold"]
    with form("plain"): assert timing.forms_of(lambda: layer(torch.randn(2, 64, 14, 14))) == "plain"


def test_the_profiler_sees_the_call():
    events = timing.profiled(lambda: torch.ones(3, 4) @ torch.ones(4, 5), record_shapes=True).events()
    assert [e.input_shapes for e in events if e.name == "aten::mm"] == [[[3, 4], [4, 5]]]


def test_growth(tmp_path):
    table = pools.measure_growth(sides=(4, 6), queries=(1, 8), channels=64, batch=1, rounds=1)
    assert set(zip(table.axis, table["size"])) == {("positions", 16), ("positions", 36), ("queries", 1), ("queries", 8)}
    assert [f.name for f in timing.write_costs(table, tmp_path, "growth", plot=pools.plot_growth)] == ["growth.csv", "growth.png"]
    short = pools.measure_growth(sides=(4, 6), queries=(), channels=64, batch=1, rounds=1, limit=0.)
    assert set(short["size"]) == {16}   # everything was too slow for a second size


def test_goals(tmp_path):
    lines = []
    table = goals.goals(only="error", progress=lines.append)
    assert len(table) == len(lines) == 3 and table.met.all() and set(table.form) == {"folded"}
    assert lines[0].startswith("yes  error ÷ plain form, map + 0: ") and lines[0].endswith(", goal ≤5, folded")
    assert goals.goals(only="multiply-adds").measured.item() <= .05
    assert [f.name for f in timing.write_costs(table, tmp_path, "figures")] == ["figures.csv"]


def test_rows_of_goals():
    rows = goals.read_goals()
    assert len({g.what for g in rows}) == len(rows)
    for g in rows:
        assert g.kind in goals.MEASURES and g.device in ("", "cpu", "cuda") and g.format in pools.FORMATS and len(g.shape) == 3, g
        bound = float(g.goal[1:])
        assert g.met(bound) and g.met(bound * 1.1) == (g.goal[0] == "≥") and g.met(bound * .9) == (g.goal[0] == "≤"), g
    assert {g.kind for g in rows} == set(goals.MEASURES)


SMALL = dict(forward="512x7x7", training="512x7x7", folded="512x7x7", core="512x7x7", memory="512x7x7", copy="64x20x20", mish="16x40x40",
             step="3x32x32", linear="512x7x7", dispatch="64x4x4")


@pytest.mark.parametrize("kind", SMALL)
def test_every_kind_of_goal_is_measured(kind, monkeypatch):
    "On maps of a size that takes no time; GPU figures in PyTorch's operations, without the minutes of a compiler."
    row = next(g for g in goals.read_goals() if g.kind == kind)
    small = goals.replace(row, shape=tuple(map(int, SMALL[kind].split("x"))), batch=2, device="")
    monkeypatch.setattr(goals, "read_goals", lambda: [small])
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    table = goals.goals(rounds=2)
    assert len(table) == dict(copy=6, dispatch=2).get(kind, 1) and (table.measured > 0).all()
    assert ((table.low > 0) & (table.low <= table.high)).all() or kind in ("memory", "dispatch")
    assert table.form.iloc[0] == dict(mish="", dispatch="plain").get(kind, "folded")


def test_goals_of_another_device_are_left_out():
    assert {g.kind for g in goals.read_goals() if g.device == "cuda"} == {"copy"}
    assert len(goals.goals(only="GPU")) == 0


@pytest.mark.parametrize("fmt", pools.FORMATS)
def test_copy_ratio(monkeypatch, fmt):
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)   # minutes of a compiler, for the same numbers
    table = goals.copy_ratio((64, 20, 20), batch=4, fmt=fmt, rounds=2, device="cpu")
    assert list(table.index) == [f"{what}, {way}" for what in ("forward", "training") for way in ("ours", "operations", "compiled")]
    assert (table.ms > 0).all() and (table.low <= table.high).all()
    assert list(goals.copy_ratio((64, 20, 20), 4, rounds=1, device="cpu", ways=("ours",)).index) == ["forward, ours", "training, ours"]


def test_steps():
    variants = steps.step_variants(["fastxtend", "ours, bf16"], batch=2, size=32)
    assert list(variants) == ["fastxtend", "ours, bf16"]
    shares = steps.step_profile(variants["fastxtend"], 1)
    assert shares.sum() == pytest.approx(1) and {"convolution", "BlurPool", "Mish", "head", "batch norm"} < set(shares.index)


def test_steps_of_two_sizes():
    lines = []
    table, shares = steps.measure_steps(sizes=[(1, 32), (2, 32)], rounds=1, progress=lines.append)
    assert list(table.columns) == ["step", "ms", "ratio", "low", "high", "batch", "size"] and lines == ["1 pictures of 32 px", "2 pictures of 32 px"]
    assert list(table.step) == 2 * [name for name, options in steps.VARIANTS.items() if "compiled" not in options] and list(table.batch) == [1] * 5 + [2] * 5
    assert {options["compiled"] for options in steps.VARIANTS.values() if "compiled" in options} == {"default", "reduce-overhead"}   # minutes; on a GPU
    assert list(shares) == ["fastxtend", "ours, channels last"] and shares.sum().to_numpy() == pytest.approx([1, 1])


# Networks

@pytest.mark.parametrize("name, px", [i for i in published().index if i[0].startswith("patchconvnet")])
def test_parameters_and_flops_are_the_printed_ones(name, px):
    row, printed = count(lambda: network_of(name, px), px, bs=1), published().loc[(name, px)]
    if printed["paper Mparams"] == printed["paper Mparams"]: assert round(row["Mparams"], 1) == printed["paper Mparams"]
    assert row["GMACs"] == pytest.approx(printed["paper GMACs"], rel=.015)


def test_both_forms_are_counted():
    class Pooled(nn.Sequential):
        def __init__(self): super().__init__(nn.Conv2d(3, 64, 16, stride=16), LearnedAggregation(64, ffn_expand=None))
    counted, n, c = count(Pooled, size=112, bs=2), 49, 64
    plain = 3 * 16**2 * c * n + 2 * n * c**2 + 2 * c**2 + 2 * n * c   # stem; keys and values; query and projection; scores and sum
    assert counted["GMACs"] * 1e9 == pytest.approx(plain)
    assert counted["GMACs folded"] < counted["GMACs"]


def test_peak_memory_is_what_is_alive():
    with PeakMemory() as memory:
        a = torch.empty(1000)
        view = a[10:]
        del a
        b = view * 2
        del view
        c = b[:10] * 2
    assert (memory.peak, memory.now) == (4000 + 3960, 3960 + 40)


def test_complexity_table():
    table = complexity(["resnet18", "resnet18+learned"], [64], speed=False)
    assert table.loc[("resnet18", 64), "Mparams"] == pytest.approx(11.69, abs=.01)
    assert table.loc[("resnet18", 64), "GMACs"] == table.loc[("resnet18", 64), "GMACs folded"]
    assert table.loc[("resnet18+learned", 64), "GMACs"] > table.loc[("resnet18+learned", 64), "GMACs folded"]
    assert set(NETWORKS) >= {"resnet50", "convnext_tiny", "deit_small_patch16_224", "cait_s24_224", "patchconvnet_s60"}
    assert throughput(timm.create_model("resnet18"), 32, seconds=.01)["im/s"] > 0


@pytest.mark.parametrize("call, words", [
    (lambda: pools.competitors((64, 4, 4), ["blgo"]), "only: 'blgo' is unknown. Did you mean 'blog'"),
    (lambda: pools.measure_pools(formats=["nhwc"]), "formats: 'nhwc' is unknown. Known: contiguous, channels_last"),
    (lambda: steps.step_variants(["ours"]), "only: 'ours' is unknown.*ours, bf16"),
    (lambda: complexity(["resnet18"], [100]), "sizes: expected multiples of 32 pixels, got 100"),
    (lambda: pools.competitors((64, 4, 4), ["simpol"]), "only: 'simpol' is unknown. Did you mean 'simpool'"),
])
def test_bad_input(call, words):
    with pytest.raises(BadInput, match=words): call()


# Commands

@pytest.mark.parametrize("words, where, name, files", [
    (["speed", "--figures"], goals, "goals", ["figures.csv"]),
    (["speed", "--growth"], pools, "measure_growth", ["growth.csv", "growth.png"]),
    (["speed", "--quick"], pools, "measure_pools", ["speed.csv", "speed.png"]),
    (["speed", "--steps"], steps, "step_variants", ["steps.csv"]),
])
def test_speed_prints_writes_and_hides_no_warning(words, where, name, files, monkeypatch, tmp_path, capsys):
    tables = dict(goals=pd.DataFrame([dict(what="a", goal="≥1", measured=2., met=True, form="folded")]),
                  measure_growth=pools.measure_growth((4,), (1,), 64, 1, 1),
                  measure_pools=pools.measure_pools([(64, 4, 4)], [1], [torch.float32], ["contiguous"], ["fold"], 1),
                  step_variants=dict.fromkeys(("fastxtend", "ours, channels last"), torch.randn(8, 8).square))
    def measured(*args, **kwargs):
        warnings.warn("the GPU kernels are left out")
        return tables[name]
    monkeypatch.setattr(where, name, measured)
    with pytest.warns(UserWarning, match="kernels are left out"), pytest.raises(SystemExit) as e: main([*words, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith(timing.machine()) and sorted(f.name for f in tmp_path.iterdir()) == files
    assert len(pd.read_csv(tmp_path / files[0], comment="#")) == len(tables[name])


def test_complexity_writes_its_table(tmp_path, capsys):
    with pytest.raises(SystemExit) as e: main(["complexity", "--networks", "resnet18", "--sizes", "64", "--out", str(tmp_path / "c.csv")])
    assert e.value.code == 0 and "resnet18" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "c.csv").loc[0, "Mparams"] == pytest.approx(11.69, abs=.01)
