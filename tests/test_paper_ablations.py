"The paper's ablations: its tables as data, its networks by name, its rows as runs, and the report beside its numbers."
import csv
import io
import math
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import stats

from attnpool.cli import main
from attnpool.cost.networks import complexity
from attnpool.layers import make_norm, NORMS, TokenBatchNorm
from attnpool.models.deit import variant_of, VARIANTS
from attnpool.models.patchconvnet import PatchConvNet
from attnpool.models.surgery import build_network
from attnpool.pooling.paper import PAPER_HEADS
from attnpool.recipe import network_for, RECIPES
from attnpool.registry import BadInput
from attnpool.report.ablations import ablation_plot, ablation_remarks, ablation_table, format_ablation, write_ablation
from attnpool.report.collect import collect
from attnpool.runs.ablations import ablation_specs, find_rows, plan, row_options, row_settings, SWEEPS
from attnpool.runs.spec import make_spec
from attnpool.runs.store import Result
from attnpool.tasks import head_of, split_options


# ----------------------------------------------------------------------------------------------------------------
# the tables

def printed(sweep): return {row.name: row.top1 for row in SWEEPS[sweep]}


def test_paper_tables_are_whole_and_agree_with_each_other():
    assert {name: len(rows) for name, rows in SWEEPS.items()} == dict(table5=6, B1=14, B2=20, B3=14)
    assert printed("table5") == {"none": 82.1, "average pooling": 81.9, "linear projection": 80.0, "batch norm": 82.4, "multi-head": 81.9, "query per class": 81.1}
    failed = {row.name: row.failed_epoch for rows in SWEEPS.values() for row in rows if row.top1 is None}
    assert failed == {"lr=0.007": 34, "wd=0.001": 92, "wd=0.002": 105}
    assert all(row.failed_epoch is None for rows in SWEEPS.values() for row in rows if row.top1 is not None)
    by_lr = {dict(row.settings)["lr"]: row.top1 for row in SWEEPS["B1"] if dict(row.settings)["wd"] == .01}
    again = {dict(row.settings)["lr"]: row.top1 for row in SWEEPS["B2"] if dict(row.settings)["drop_path"] == .15}
    assert len(by_lr) == 8 and len(again) == 4 and all(by_lr[lr] == top1 for lr, top1 in again.items())   # the same runs, printed twice
    assert sum(dict(row.settings)["lr"] == .003 for row in SWEEPS["B1"]) == 7
    b3 = printed("B3")
    assert (b3["S60 layer"], b3["S60 batch"]) == (82.1, 82.4) and all(b3[f"{m} batch"] > b3[f"{m} layer"] for m in ("S20", "S36", "S60", "S120", "B36", "B60", "B120"))
    for rows in SWEEPS.values():
        names = {row.name for row in rows}
        assert len(names) == len(rows) and all(row.versus in names and "2112.13692" in row.source and row.head in PAPER_HEADS for row in rows)
        assert not any("," in name for name in names)   # --rows separates by commas


def test_paper_rates_keep_their_proportion_to_the_recipe_s():
    row, = (r for r in SWEEPS["B1"] if r.name == r.versus)
    assert row_settings(row, 3e-3) == dict(lr=3e-3, wd=.01, drop_path=.15)
    assert row_settings(row, 1.5e-3)["lr"] == pytest.approx(1.5e-3)
    b1 = ablation_specs("B1", **SMALL | dict(recipe="paper-small"), rows=["lr=0.004"])
    assert b1["lr=0.004"][0].recipe.lr == pytest.approx(4e-3) and b1["lr=0.003 wd=0.01"][0].recipe.lr == RECIPES["paper-small"].lr


def test_paper_models_are_the_paper_s_with_s60_and_in_proportion_with_another():
    for row in SWEEPS["B3"]:
        own = VARIANTS["patchconvnet_s60"] | row_options(row, "patchconvnet_s60")
        assert own.pop("norm", "layer") == row.name.split()[1]
        assert own == VARIANTS[f"patchconvnet_{row.model.lower()}"], row.name
    sizes = {row.model: tuple((VARIANTS["patchconvnet_tiny"] | row_options(row, "patchconvnet_tiny"))[k] for k in ("embed_dim", "depth")) for row in SWEEPS["B3"]}
    assert sizes == dict(S20=(96, 2), S36=(96, 4), S60=(96, 6), S120=(96, 12), B36=(192, 4), B60=(192, 6), B120=(192, 12))
    heads, = (r for r in SWEEPS["table5"] if r.name == "multi-head")
    assert row_options(heads, "patchconvnet_s60") == dict(num_heads=8) and row_options(heads, "patchconvnet_tiny") == dict(num_heads=2)
    assert row_options(heads, "patchconvnet_b60") == dict(num_heads=16) and row_options(heads, "patchconvnet_tiny", dict(embed_dim=48)) == dict(num_heads=2)


# ----------------------------------------------------------------------------------------------------------------
# networks

NETWORKS = [("paper", {}), ("paper-avg", dict(global_pool="avg")), ("paper-classes", dict(class_queries=True))]

def whole_and_parts(arch, head, extra, options, n_out=7):
    "The paper's network in one piece, and body + head by name with the same weights."
    spec = make_spec("digits", head, arch=arch, options=options, size=32)
    _, of_arch = split_options(head, arch, dict(spec.options))
    parts = build_network(arch, n_out, head_of(spec), **of_arch).model
    whole = PatchConvNet(**VARIANTS[arch] | extra | options, num_classes=n_out)
    at = {"pool.": "1.0.", "norm.": "1.2." if head == "paper-avg" else "1.1.", "head.": "1.3." if head == "paper-avg" else "1.2."}
    def name(k): return next((new + k.removeprefix(old) for old, new in at.items() if k.startswith(old)), f"0.model.{k}")
    assert sum(p.numel() for p in parts.parameters()) == sum(p.numel() for p in whole.parameters())
    begin = {k: (v.std(), v.mean()) for k, v in parts.state_dict().items() if v.ndim > 1}
    for k, v in whole.state_dict().items():   # the same start, up to chance
        if v.ndim > 1 and v.numel() > 2000: torch.testing.assert_close(begin[name(k)][0], v.std(), rtol=.1, atol=1e-3)
    parts.load_state_dict({name(k): v for k, v in whole.state_dict().items()})
    return spec, whole, parts


@pytest.mark.parametrize("options", [{}, dict(norm="batch"), dict(num_heads=4, stem="linear", ffn_expand=2.), dict(norm="rms", gamma_init=.5)], ids=str)
@pytest.mark.parametrize("head, extra", NETWORKS)
def test_paper_network_is_body_and_head_by_name(head, extra, options):
    if head == "paper-avg": options = {k: v for k, v in options.items() if k not in ("num_heads", "ffn_expand")}
    _, whole, parts = whole_and_parts("patchconvnet_tiny", head, extra, options)
    x = torch.randn(4, 3, 32, 24)
    for mode in (True, False):   # BatchNorm: statistics of the batch, then the running ones
        out, expected = parts.train(mode)(x), whole.train(mode)(x)
        assert out.shape == (4, 7) and torch.equal(out, expected)
    norms = {type(m) for m in parts.modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.RMSNorm, TokenBatchNorm))}
    assert norms == {type(make_norm(options.get("norm", "layer"), 8))}   # all of them, in the body and behind it


def test_paper_network_drops_paths_in_the_body_alone():
    spec = make_spec("digits", "paper", arch="patchconvnet_tiny", drop_path=.3)
    net, _ = network_for(SimpleNamespace(c=10), spec.arch, head_of(spec), spec.recipe.drop_path)
    assert [b.drop_path.drop_prob for b in net[0].model.blocks] == [.3] * 6 and not hasattr(net[1][0], "drop_path")


def test_paper_head_takes_the_layer_scale_of_its_network():
    def gammas(arch, **options):
        spec, whole, parts = whole_and_parts(arch, "paper", {}, dict(embed_dim=32, depth=2) | options)
        return spec, {g.item() for g in (parts[1][0].gamma_1[0], parts[1][0].gamma_2[0], parts[0].model.blocks[0].gamma_1[0])}
    for arch, gamma in (("patchconvnet_s60", 1e-4), ("patchconvnet_s120", 1e-6)):
        spec, found = gammas(arch)
        assert len(found) == 1 and found.pop() == pytest.approx(gamma)
        assert gammas(arch, gamma_init=gamma)[0] == spec   # what is the default is no other run
    assert [*gammas("patchconvnet_s120", gamma_init=1e-4)[1]] == [pytest.approx(1e-4)]
    of_head, of_arch = split_options("paper", "resnet18", dict(norm="batch"))   # behind another network a head is only a head
    assert of_head == dict(norm="batch") and of_arch == {}


def test_paper_network_counts_the_same_in_one_piece_and_in_two():
    table = complexity(["patchconvnet_tiny", "patchconvnet_tiny+paper"], sizes=(64,), speed=False)
    counts = table[["Mparams", "GMACs", "GMACs folded"]].to_numpy(float)
    assert (counts[0] == counts[1]).all() and counts[0, 0] == pytest.approx(.39088)   # 1000 classes
    assert counts[0, 2] < counts[0, 1]


def test_paper_norms_by_word():
    assert isinstance(make_norm("batch", 6), TokenBatchNorm) and make_norm("layer", 6).eps == 1e-6 and [*NORMS] == ["layer", "batch", "rms"]
    with pytest.raises(BadInput, match="norm: 'bacth' is unknown. Did you mean 'batch'"): make_norm("bacth", 6)
    with pytest.raises(TypeError, match="norm: expected layer, batch, rms, or a class"): make_norm(3, 6)
    a, b = (make_spec("digits", "paper", arch="patchconvnet_tiny", options=o) for o in ({}, dict(norm="layer")))
    assert a == b and a.id == b.id


def test_paper_tiny_network_is_told_from_its_weights():
    net = timm.create_model("patchconvnet_tiny", num_classes=10)
    assert sum(p.numel() for p in net.parameters()) == 294_850 and net.default_cfg["pool_size"] == (28, 28)
    assert variant_of(net.state_dict()) == "timm.create_model('patchconvnet_tiny', num_classes=10)"
    linear = timm.create_model("patchconvnet_tiny", stem="linear")
    assert variant_of(linear.state_dict()) == "timm.create_model('patchconvnet_tiny', stem='linear')"
    assert variant_of(timm.create_model("patchconvnet_s20", depth=1, patch_size=8).state_dict()).startswith("timm.create_model('patchconvnet_tiny', embed_dim=384, depth=1")
    x = torch.randn(1, 3, 16, 16)
    whole = eval(variant_of(linear.state_dict()), dict(timm=timm))
    whole.load_state_dict(linear.state_dict())
    assert torch.equal(whole.eval()(x), linear.eval()(x))


# ----------------------------------------------------------------------------------------------------------------
# specs

SMALL = dict(recipe="quick", seeds=[1, 2])

def test_paper_ablation_of_a_row_is_one_run_wherever_it_stands():
    b1, b2 = (ablation_specs(name, **SMALL) for name in ("B1", "B2"))
    assert b1["lr=0.003 wd=0.01"] == b2["lr=0.003 drop_path=0.15"] and b1["lr=0.001"] == b2["lr=0.001 drop_path=0.15"]
    every = {s.id for specs in (b1, b2) for its in specs.values() for s in its}
    assert len(every) == 2 * (14 + 20 - 4)
    table5, b3 = (ablation_specs(name, **SMALL) for name in ("table5", "B3"))
    assert len({s.id for its in table5.values() for s in its}) == 12 and len({s.id for its in b3.values() for s in its}) == 28
    assert [s.seed for s in table5["none"]] == [1, 2] and table5["batch norm"][0].recipe == table5["none"][0].recipe
    s = b3["B60 batch"][0]
    assert dict(s.options) == dict(embed_dim=192, gamma_init=1e-6, norm="batch") and (s.recipe.wd, s.recipe.drop_path) == (.05, .3)
    assert b1["lr=0.004"][0].recipe.lr == pytest.approx(.004 * math.sqrt(32 / 2048)) and b1["wd=0.1"][0].recipe.wd == .1


def test_paper_ablation_takes_what_all_rows_have_in_common():
    specs = ablation_specs("B1", **SMALL, rows=["wd=0.1"], epochs=3, bs=128, drop_path=0., options=dict(depth=2))
    assert [*specs] == ["lr=0.003 wd=0.01", "wd=0.1"]   # what it is compared with comes along
    s = specs["wd=0.1"][0]
    assert (s.recipe.epochs, s.recipe.bs, s.recipe.drop_path) == (3, 128, 0) and s.recipe.lr == pytest.approx(3e-3 / 4) and dict(s.options) == dict(depth=2)
    five = ablation_specs("table5", **SMALL, options=dict(num_heads=4))
    assert {name: dict(its[0].options) for name, its in five.items() if its[0].options} == {
        "linear projection": dict(stem="linear"), "batch norm": dict(norm="batch"), "multi-head": dict(num_heads=4)}
    assert ablation_specs("B2", **SMALL, arch="xeca_resnext_tiny")["lr=0.001 drop_path=0"][0].arch == "xeca_resnext_tiny"
    assert [r.name for r in find_rows("B3", ["S36 batch", "S20 layer"])] == ["S20 layer", "S36 layer", "S36 batch"]


@pytest.mark.parametrize("make, words", [
    (lambda: SWEEPS["table4"], "ablation: 'table4' is unknown. Did you mean 'table5'"),
    (lambda: find_rows("table5", ["batchnorm"]), "rows: of table5: 'batchnorm' is unknown. Did you mean 'batch norm'"),
    (lambda: ablation_specs("B1", **SMALL, lr=1e-3), "lr: the rows of B1 decide it, got 0.001"),
    (lambda: ablation_specs("B3", **SMALL, drop_path=.1), "drop_path: the rows of B3 decide it"),
    (lambda: ablation_specs("table5", **SMALL, options=dict(norm="rms")), "options: the rows of table5 decide norm"),
    (lambda: ablation_specs("B3", **SMALL, arch="xeca_resnext_tiny"), "of a PatchConvNet, which xeca_resnext_tiny is not. Take patchconvnet_tiny"),
    (lambda: ablation_specs("table5", **SMALL, arch="patchconvnet_tinny"), "Did you mean 'patchconvnet_tiny'"),
    (lambda: ablation_specs("B1", **SMALL, options=dict(stemm="linear")), "stemm: the network patchconvnet_tiny has no such option"),
    (lambda: ablation_specs("table5", **SMALL, options=dict(num_heads=5)), "num_heads: 5 "),
    (lambda: ablation_specs("table5", **SMALL, drop_path=1.5), "drop_path"),
    (lambda: ablation_specs("table5", **SMALL, size=30), "which do not divide 30. Use 24 or 32"),
    (lambda: ablation_specs("table5", recipe="probe"), "train: an ablation trains whole networks from scratch, got 'frozen'"),
    (lambda: ablation_specs("table5", **SMALL, data="no/such.tar"), "no/such.tar"),
])
def test_paper_ablation_that_cannot_be_is_told_before_the_work(make, words):
    with pytest.raises((BadInput, FileNotFoundError)) as e: make()
    assert words in str(e.value)


# ----------------------------------------------------------------------------------------------------------------
# tables and figures

def made(sweep, value, rows=(), seeds=(1, 2, 3), **more):
    "Results with values by row and seed; None for one that diverged."
    specs = ablation_specs(sweep, recipe="quick", seeds=seeds, rows=rows)
    def result(name, spec):
        v = value(name, spec.seed)
        how = dict(status="diverged", metrics={}, diverged_epoch=4) if v is None else dict(status="complete", metrics={"accuracy": v})
        return Result(spec, primary="accuracy", parameters=10**6, pictures=[90, 200], seconds_per_epoch=2., classes=[10, 20, 20], **how | more)
    return {name: [result(name, s) for s in its] for name, its in specs.items()}


def test_paper_ablation_table_is_paired_and_keeps_the_paper_apart():
    rng = np.random.default_rng(0)
    values = {name: .5 + .1 * rng.random(3) for name in printed("table5")}
    results = made("table5", lambda name, seed: None if (name, seed) == ("multi-head", 2) else values[name][seed - 1])
    table = ablation_table("table5", results).set_index("row")
    for name, v in values.items():
        if name in ("none", "multi-head"): continue
        its, test = table.loc[name], stats.ttest_rel(v, values["none"])
        interval = test.confidence_interval(.95)
        np.testing.assert_allclose([its.accuracy, its.sd, its.difference, its.low, its.high], [v.mean(), v.std(ddof=1), (v - values["none"]).mean(), *interval], rtol=1e-9)
        assert its.paper_top1 == pytest.approx(printed("table5")[name] / 100) and its.paper_difference == pytest.approx((printed("table5")[name] - 82.1) / 100)
    heads = table.loc["multi-head"]
    assert (heads.n, heads.n_pairs, heads.diverged) == (2, 2, "5") and heads.accuracy == pytest.approx(values["multi-head"][[0, 2]].mean())
    assert np.isnan(table.loc["none"].difference) and np.isnan(table.loc["none"].paper_difference)
    text = format_ablation(table.reset_index()).set_index("row")
    assert [*text.columns[-2:]] == ["paper, ImageNet-1k, S60, 400 epochs: top-1 %", "paper: points"] and "points vs none [95%]" in text
    assert "(diverged in epoch 5)" in text.loc["multi-head"]["accuracy %"] and [*text.iloc[2, -2:]] == ["80.0", "-2.1"]
    remarks = " ".join(ablation_remarks("table5", results))
    assert "inside the noise of single runs" in remarks and "multi-head: 2 heads" in remarks and "in no mean: multi-head." in remarks and "Near guessing" not in remarks


def test_paper_ablation_says_what_learned_nothing_and_what_failed_in_the_paper():
    results = made("B1", lambda name, seed: None if name == "lr=0.007" else .1, seeds=[1])
    text, remarks = format_ablation(ablation_table("B1", results)).set_index("row"), " ".join(ablation_remarks("B1", results))
    paper = text["paper, ImageNet-1k, S60, 400 epochs: top-1 %"]
    assert [*paper[["lr=0.007", "wd=0.001", "wd=0.002"]]] == [f"failed at epoch {e}" for e in (34, 92, 105)] and paper["lr=0.0005"] == "77.00"
    assert text.loc["lr=0.007"]["accuracy %"] == "– (diverged in epoch 5)" and text.loc["lr=0.001"]["lr (printed)"] == "0.000125 (0.001)"
    assert "Near guessing (10.0): lr=0.0005" in remarks and "lr=0.007, " not in remarks.partition("Near guessing")[2]
    assert "for batches of 2048, times 0.125" in remarks and "From one seed there is no interval" in remarks
    b3 = made("B3", lambda name, seed: .5 + .01 * seed + .02 * ("batch" in name))
    text = format_ablation(ablation_table("B3", b3)).set_index("row")
    assert text.loc["B36 batch"].vs == "B36 layer" and "paper, ImageNet-1k, S20 to B120, 400 epochs: top-1 %" in text and text.loc["B36 batch"].iloc[-1] == "+0.7"
    with pytest.raises(BadInput, match="results: there is nothing to compare"): ablation_table("B3", {})


def test_paper_ablation_figures_show_ours_and_the_paper_s_in_axes_of_their_own():
    results = made("B2", lambda name, seed: None if name == "lr=0.002 drop_path=0" else .5 + .001 * len(name))
    ours, paper = ablation_plot("B2", ablation_table("B2", results)).axes
    texts = [[t.get_text() for t in ax.texts] for ax in (ours, paper)]
    assert texts[1] == [f"{v:.2f}" for v in printed("B2").values()] and texts[0][2] == "failed" and len(texts[0]) == 20
    fig = ablation_plot("B1", ablation_table("B1", made("B1", lambda name, seed: .5 + .01 * seed)))
    rate, decay = fig.axes[1], fig.axes[3]
    drawn = {x: y for x, y in zip(*rate.lines[0].get_data())}
    assert drawn[.003] == pytest.approx(82.1) and np.isnan(drawn[.007]) and decay.lines[0].get_xdata()[3] == .01
    assert [t.get_text() for t in (*rate.texts, *decay.texts)] == ["failed"] * 3
    some = ablation_table("table5", made("table5", lambda name, seed: .5, rows=["batch norm"]))
    ours, paper = ablation_plot("table5", some).axes
    assert paper.lines[0].get_xdata() == pytest.approx([.3]) and ours.get_title() == "ours"
    assert ablation_plot("table5", some[some.versus == ""]) is None


# ----------------------------------------------------------------------------------------------------------------
# the command

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("ablate") / "photos", np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 4)):
        for name, level in (("dark", 40), ("light", 170)):
            (root / part / name).mkdir(parents=True)
            for i in range(n): Image.fromarray((level + rng.integers(0, 60, (24, 24, 3))).astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as e: main(["ablate", *map(str, words)])
    return e.value.code, out.getvalue(), err.getvalue()


def test_paper_ablate_command_from_the_plan_to_the_page(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["table5", "--data", photos, "--recipe", "quick", "--size", 16, "--bs", 8, "--epochs", 1, "--options", "embed_dim=16,depth=1", "--seeds", "1,2", "--out", tmp_path / "runs"]
    code, out, _ = run(*words, "--dry-run")
    assert code == 0 and "12 different runs, 0 of them" in out and "Each: 1 epochs of 2 steps, 8 of 16 pictures" in out and "To be made: 24 steps" in out
    assert not (tmp_path / "runs").exists()   # nothing was made
    code, out, _ = run(*words, "--rows", "query per class")
    assert code == 0 and "paper-classes seed 2" in out and len([*tmp_path.glob("runs/*/result.json")]) == 4
    code, out, err = run(*words)
    assert code == 0, err
    assert "4 of 12 runs are in" in out and "paper norm=batch seed 1" in out and "paper stem=linear seed 2" in out   # rows are told apart
    page = (tmp_path / "runs/ablation-table5.html").read_text()
    assert "paper, ImageNet-1k, S60, 400 epochs" in page and "inside the noise of single runs" in page and page.count("<svg") + page.count("image/svg") == 1
    with (tmp_path / "runs/ablation-table5.csv").open() as f: rows = {r["row"]: r for r in csv.DictReader(f)}
    assert [*rows] == [r.name for r in SWEEPS["table5"]] and rows["batch norm"]["options"] == "depth=1 embed_dim=16 norm=batch" and rows["none"]["n"] == "2"
    results, problems = collect([tmp_path / "runs/ablation-table5.runs.csv"])
    assert len(results) == 12 and not problems and {r.spec.head for r in results} == {*PAPER_HEADS}
    mine = np.mean([r.metrics["accuracy"] for r in results if dict(r.spec.options).get("norm")])
    assert float(rows["batch norm"]["accuracy"]) == pytest.approx(mine)
    told = io.StringIO()
    with redirect_stdout(told), pytest.raises(SystemExit): main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "r.html")])
    assert "stem=linear" in told.getvalue() and "{'" not in told.getvalue() and "runs/ablation-table5.html" in told.getvalue()
    code, out, _ = run(*words, "--dry-run")
    assert "12 of them" in out and "To be made: 0 steps" in out


def test_paper_ablate_command_counts_a_run_that_diverged(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run("table5", "--data", photos, "--recipe", "quick", "--size", 16, "--bs", 8, "--epochs", 1, "--options", "embed_dim=16,depth=1", "--seeds", 1,
                         "--lr", "1e30", "--rows", "average pooling", "--out", tmp_path)
    assert code == 0, err
    assert "diverged in epoch 1" in out and "in no mean: none, average pooling" in out and "81.9" in out


def test_paper_heads_are_taken_by_the_other_commands():
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit): main(["bench", "--help"])
    assert "paper, paper-classes, paper-avg" in " ".join(out.getvalue().split()).replace("paper- ", "paper-")
    with pytest.raises(BadInput, match="Did you mean 'paper-classes'"): make_spec("digits", "paper-clases")


@pytest.mark.parametrize("words, told", [
    ([], "name one of table5, B1, B2, B3"), (["B4", "--data", "digits"], "ablation: 'B4' is unknown"), (["table5"], "data: name the pictures"),
    (["table5", "--data", "photos.tar"], "photos.tar"), (["table5", "--data", "digits", "--heads", "avg"], "heads: the rows name theirs"),
    (["b1", "--data", "digits", "--lr", "1"], "lr: the rows of B1 decide it"), (["B3", "--data", "digits", "--arch", "resnet18"], "which resnet18 is not"),
    (["table5", "--data", "digits", "--rows", "batch-norm"], "Did you mean 'batch norm'"), (["table5", "--data", "digits", "--recipe", "papr-small"], "Did you mean 'paper-small'"),
    (["table5", "--data", "digits", "--wd", "x"], "--wd"), (["table5", "--data", "digits", "--recipe", "fixres", "--dry-run"], "recipe: ablations train from scratch"),
])
def test_paper_ablate_command_says_what_is_wrong(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert code == 2 and told in err and err.count("\n") == 1 and not [*tmp_path.iterdir()], err


def test_paper_ablate_command_lists_the_rows():
    code, out, _ = run("--list")
    assert code == 0 and all(row.name in out for rows in SWEEPS.values() for row in rows) and "failed in 105" in out
    code, out, _ = run("b2", "--list")
    assert "lr=0.002 drop_path=0.1" in out and "multi-head" not in out
