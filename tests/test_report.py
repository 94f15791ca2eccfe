"Tables and pages from runs, from others' logs, and beside the blog's numbers."
import json
import shutil
import re
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from attnpool.cli import main
from attnpool.data import DataId
from attnpool.heads import ABLATIONS, HEADS
from attnpool.models.xresnet import ARCHS
from attnpool.recipe import RECIPES
from attnpool.registry import BadInput
from attnpool.report.collect import by_row, collect, group_by_setting, read_log, setting_of, tell_apart, write_runs
from attnpool.report.page import learning_curves, markdown, write_report
from attnpool.report.published import blog_tables, published
from attnpool.report.measures import measure_maps
from attnpool.report.stats import format_table, learning_rates, primary_of, remarks, summarize
from attnpool.runs.spec import Spec, make_spec
from attnpool.runs.store import Result, load_run, write_result

DIGITS = DataId("digits", "digits", "", "digits")


def spec_of(head="avg", seed=1, data=DIGITS, eval_sizes=(), **fields):
    recipe = dict(lr=.01) | fields
    return Spec("classify", data, "xeca_resnext_tiny", head, seed, replace(RECIPES["quick"], **recipe), eval_sizes=eval_sizes)


def result(head="avg", seed=1, accuracy=.9, **fields):
    "An invented result of one metric, without a folder."
    return Result(spec_of(head, seed, **fields), "complete", dict(accuracy=accuracy), "accuracy")


def history_of(epochs, last):
    rows = [dict(epoch=e) | {k: v * (1 - .5**(e + 1) * (e < epochs - 1)) for k, v in last.items()} for e in range(epochs)]
    return pd.DataFrame(rows).assign(seconds=1.5, train_seconds=1.2)


def metrics_of(accuracy):
    return dict(train_loss=.5, valid_loss=.6, accuracy=accuracy, balanced_accuracy_score=accuracy, f1_score=accuracy - .01, matthews_corrcoef=accuracy - .02)


def fake_run(out, spec, accuracy, **fields):
    "A run folder of the real layout, with invented numbers."
    folder = out / spec.name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec.to_json()))
    last = metrics_of(accuracy)
    history_of(spec.recipe.epochs, last).to_csv(folder / "history.csv", index=False)
    sizes = {"256": dict(accuracy=accuracy + .01, f1_score=accuracy, matthews_corrcoef=accuracy, balanced_accuracy_score=accuracy, valid_loss=.55)}
    values = dict(status="complete", metrics=last, primary="accuracy", sizes=sizes, parameters=10**6, pictures=[1500, 1000], seconds_per_epoch=1.5, device="cpu",
                  machine="x, 2 cores", threads=2, git="4e12435", versions=dict(torch="2", attnpool="0.1.0"))   # a commit that looks like a number
    return write_result(Result(spec, **values | fields), folder).folder


def flat_run(out, head, seed, accuracy, epochs=2, data="digits"):
    "A run folder as it was written until version 0.1."
    spec = dict(data=data, arch="xeca_resnext_tiny", head=head, seed=seed, recipe="quick", epochs=epochs, size=40, bs=32, lr=.01, opt="adam",
                schedule="one_cycle", label_smoothing=0., mix="", wd=None, precision="auto", eval_sizes=[], skip_broken=False)
    folder = out / f"{head}-{seed}"
    folder.mkdir(parents=True)
    history_of(epochs, metrics_of(accuracy)).to_csv(folder / "history.csv", index=False)
    (folder / "spec.json").write_text(json.dumps(spec))
    values = dict(spec=spec, status="complete", diverged_epoch=None, **metrics_of(accuracy), sizes={}, peak_in_box=.5, parameters=10**6,
                  pictures=[1500, 1000], seconds_per_epoch=1.5, device="cpu", processes=1, git="4e12435", versions=dict(torch="2"))
    values["files"] = {f.name: f.stat().st_size for f in folder.iterdir()}
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def test_published_numbers_are_the_blogs():
    facts = published()
    assert len(facts) == 247 and set(facts["head"]) <= set(HEADS) | {"avgattn-act"} <= set(HEADS) | set(ABLATIONS) and set(facts.arch) <= set(ARCHS)
    def value(data, arch, head, metric, size=224, lr=None):
        rows = facts[(facts.data == data) & (facts.arch == arch) & (facts["head"] == head) & (facts.metric == metric) & (facts["size"] == size)]
        if lr: rows = rows[rows.lr == lr]
        (row,) = rows.itertuples()
        return row.mean, row.std
    assert value("imagenette", "xeca_resnext50s", "avg", "accuracy", lr=8e-3) == (.9580, .0011)
    assert value("petals", "xeca_resnext50s", "learned", "f1") == (.8602, .0022)
    assert value("imagewoof", "xeca_resnext50s", "concat", "delta_accuracy", 384)[0] == -.02


def test_the_blogs_average_attention_is_two_heads():
    "An activation before the last linear layer on Imagenette and Petals, none on ImageWoof: section names of the blog's notebooks."
    facts = published()
    rows = facts[facts["head"].str.startswith("avgattn")]
    assert {d: set(g["head"]) for d, g in rows.groupby("data")} == dict(imagenette={"avgattn-act"}, petals={"avgattn-act"}, imagewoof={"avgattn"})
    assert len(rows) == 33 and rows[rows.data == "imagewoof"].note.str.contains("without the activation").all() and rows.note.notna().all()
    ours = [result(h, s, v) for h, v in (("avgattn", .91), ("avgattn-act", .95)) for s in (1, 2)]
    for data, last in (("imagenette", "avgattn-act"), ("imagewoof", "avgattn")):
        table = blog_tables(ours, data)["3. Average attention"]
        names = table["head"].tolist()
        blogs = f"{last}, blog (xeca_resnext50s)"
        assert names.index(blogs) == names.index(last) + 1 and [n for n in names if n.startswith("avgattn") and "blog" in n] == [blogs]
        assert "the activation" in table.set_index("head").loc[blogs, "note"] or "an activation" in table.set_index("head").loc[blogs, "note"]


def test_published_runs_make_the_same_results_and_tables(tmp_path):
    home = replace(DIGITS, path="/home/me/digits")
    for head, accuracy in (("avg", .9), ("concat", .93), ("avg", .91), ("concat", 1 / 3)):
        fake_run(tmp_path / "runs", spec_of(head, int(accuracy * 100), home, (48, 64), epochs=3), accuracy)
    fake_run(tmp_path / "runs", spec_of("concat", 90, home, epochs=2, lr=1., wd=.1, mix="cutmixup"), .1)
    diverged = dict(status="diverged", diverged_epoch=0, metrics={}, sizes={}, images_per_second=None)
    bad = fake_run(tmp_path / "runs", spec_of("learned", 1, home, epochs=3), .1, **diverged)
    (bad / "history.csv").unlink()
    (bad / "result.json").write_text(json.dumps(json.loads((bad / "result.json").read_text()) | dict(files={})))
    results, problems = collect([tmp_path / "runs"])
    assert len(results) == 6 and not problems
    page = write_report(results, tmp_path / "one" / "report.html")
    published_runs = page.with_suffix(".runs.csv")
    again, problems = collect([published_runs])
    assert not problems and "/home/me" not in published_runs.read_text()
    assert [replace(r, files={}) for r in results] == again   # to the last digit
    for a, b in zip(results, again):
        assert len(a.history()) == len(b.history()) and b.folder is None
        if len(b.history()): pd.testing.assert_frame_equal(a.history(), b.history(), rtol=1e-15)
    for a, b in zip(group_by_setting(results), group_by_setting(again), strict=True):
        pd.testing.assert_frame_equal(summarize(a), summarize(b), check_exact=True)
    second = write_report(again, tmp_path / "two" / "report.html")
    assert second.with_suffix(".md").read_text() == page.with_suffix(".md").read_text()
    assert second.with_suffix(".csv").read_text() == page.with_suffix(".csv").read_text()


@pytest.mark.parametrize("text", ["2024", "4e12435", "NaN", "True", "None", "[1]", '"', "{", "null", "a,b", "über"])
def test_no_text_becomes_a_number_on_its_way_through_a_table(tmp_path, text):
    r = replace(result(text, data=DataId(text, text, text)), git=text, machine=text, versions=dict(torch=text))
    write_runs([r], tmp_path / "a.csv")
    assert collect([tmp_path / "a.csv"])[0] == [r]


def test_results_from_before_version_0_2_read_from_folders_and_from_tables(tmp_path):
    folder = flat_run(tmp_path, "avg", 1, .9)
    r, = collect([tmp_path])[0]
    assert r.spec.data.name == "digits" and r.spec.recipe == replace(RECIPES["quick"], lr=.01, epochs=2) and r.value == .9 and r.folder == folder
    header = ["spec.data", "spec.arch", "spec.head", "spec.seed", "spec.recipe", "spec.epochs", "spec.size", "spec.bs", "spec.lr", "spec.opt",
              "spec.schedule", "spec.label_smoothing", "spec.mix", "spec.wd", "spec.precision", "spec.eval_sizes", "spec.skip_broken"]
    values = 'digits,xeca_resnext_tiny,avg,1,quick,2,40,32,0.01,adam,one_cycle,0.0,"""""",,auto,[],False'
    history, last = pd.read_csv(folder / "history.csv"), 'complete,,{},0.5,1000000,"[1500, 1000]",1.5,cpu,1,4e12435,2'
    names = [*header, *history, "status", "diverged_epoch", "sizes", "peak_in_box", "parameters", "pictures", "seconds_per_epoch", "device",
             "processes", "git", "versions.torch"]
    lines = [f"{values},{','.join(map(repr, map(float, row)))},{last}" for row in history.values]
    (tmp_path / "old.runs.csv").write_text("\n".join([",".join(names), *lines]))
    table, = collect([tmp_path / "old.runs.csv"])[0]
    assert table == replace(r, files={}) and table.metrics["peak_in_box"] == .5
    pd.testing.assert_frame_equal(table.history(), history)


@pytest.mark.parametrize("path, name", [("digits", "digits"), ("/home/me/imagenette-128.tar", "imagenette-128"), ("my/photos.v2", "photos.v2")])
def test_results_from_before_version_0_2_have_data_by_name(tmp_path, path, name):
    flat_run(tmp_path, "avg", 1, .9, data=path)
    r, = collect([tmp_path])[0]
    assert (r.spec.data.name, r.spec.data.path) == (name, path) and setting_of(r)["data"] == name


def test_the_published_tables_of_this_repository(pytestconfig):
    "Means by hand, from the last rows of the file."
    file = pytestconfig.rootpath / "docs/results/digits.runs.csv"
    results, problems = collect([file])
    rows = pd.read_csv(file)
    ends = rows[rows.epoch == rows.epoch.max()].groupby("spec.head", sort=False).accuracy
    group, = group_by_setting(results)
    table = summarize(group).set_index("head")
    assert len(results) == 48 and not problems
    np.testing.assert_allclose(table.accuracy, ends.mean(), rtol=1e-12)
    np.testing.assert_allclose(table.sd, ends.std(), rtol=1e-12)
    assert list(table.columns) == ["lr", "parameters", "n", "diverged", "accuracy", "sd", "difference", "low", "high", "n_pairs", "verdict", "seconds_per_epoch",
                                   "peak_in_box", "balanced_accuracy", "balanced_accuracy_sd", "f1", "f1_sd", "mcc", "mcc_sd", "train_loss",
                                   "train_loss_sd", "valid_loss", "valid_loss_sd", "failed", "mean_low", "mean_high", "ratio", "lr_low", "lr_high",
                                   "wd", "run_seconds", "wd_low", "wd_high", "guess", "versus"]


def test_fifty_long_runs_make_a_report_quickly(tmp_path):
    rng = np.random.default_rng(0)
    for head in ("avg", "learned", "sandwich", "concat", "slim"):
        for seed in range(10): fake_run(tmp_path, spec_of(head, seed, epochs=80), .9 + rng.normal(0, .005))
    start = time.perf_counter()
    results, problems = collect([tmp_path])
    page = write_report(results, tmp_path / "report.html", data="imagenette")
    print(f"{time.perf_counter() - start:.1f} s")
    text = page.read_text()
    assert len(results) == 50 and not problems
    assert text.count("<table") == 1 + 5 and "95.80 ± 0.11" in text and "http" not in re.sub(r'data:[^"]+', "", text)
    assert "| avg |" in page.with_suffix(".md").read_text()
    assert len(pd.read_csv(page.with_suffix(".csv"))) == 5


def test_incomplete_folders_are_named_and_the_rest_is_reported(tmp_path):
    _, broken = (fake_run(tmp_path, spec_of(seed=seed), .9) for seed in (1, 2))
    (broken / "result.json").write_text("{")
    results, problems = collect([tmp_path, tmp_path])   # twice the same folder is once
    assert [r.spec.seed for r in results] == [1] and problems == [f"{broken}: result.json is torn."]
    with pytest.raises(FileNotFoundError, match="runs: there is no"): collect([tmp_path / "nowhere"])


def test_a_csvlogger_file_of_fastai_is_read(tmp_path, dls):
    from fastai.vision.all import CSVLogger, Learner, accuracy
    from attnpool.models.xresnet import xeca_resnext_tiny
    learn = Learner(dls, xeca_resnext_tiny(10), metrics=accuracy, path=tmp_path, cbs=CSVLogger("avg-7.csv"))
    with learn.no_bar(): learn.fit(2, 1e-3)
    r = read_log(tmp_path / "avg-7.csv")
    assert (r.spec.head, r.spec.seed, r.spec.recipe.epochs, r.status) == ("avg", 7, 2, "complete") and len(r.history()) == 2
    assert r.value == pytest.approx(learn.recorder.values[-1][-1], abs=1e-5)
    assert setting_of(r) == dict(data=tmp_path.name, epochs=2, task="classify", skip_broken=False)   # nothing that it does not know
    write_report([r], tmp_path / "report.html")
    assert collect([tmp_path / "report.runs.csv"])[0] == [r]
    (tmp_path / "empty.csv").touch()
    with pytest.raises(BadInput, match="^runs: expected a CSVLogger file with epochs and a column accuracy"): read_log(tmp_path / "empty.csv")
    (tmp_path / "picture.csv").write_bytes(bytes(range(256)))
    with pytest.raises(BadInput, match="^runs: .*picture.csv is no CSV file"): collect([tmp_path / "picture.csv"])


def test_settings_are_not_mixed_and_rates_become_rows():
    results = [result("avg", 1, .9), result("avg", 1, .8, size=64), result("slim", 1, .7), result("slim", 1, .6, lr=.02), result("avg", 2, .5, name="other")]
    groups = group_by_setting(results)
    assert [list(by_row(g)) for g in groups] == [["avg", "slim 0.01", "slim 0.02"], ["avg"]] and len(groups[0]) == 4   # a name is no setting
    table = summarize(groups[0]).set_index("head")
    assert table.loc["slim 0.02", "difference"] == pytest.approx(-.3)
    assert len(group_by_setting([result(), replace(result(seed=2), pictures=[10, 5])])) == 2   # of other pictures
    assert len(group_by_setting([result(), result(seed=2, data=replace(DIGITS, path="elsewhere"))])) == 1


def test_a_decay_of_the_heads_own_is_no_setting_but_decays_that_are_compared_are():
    own = [result("avg", 1, .9, wd=.1), result("avg", 2, .9, wd=.1), result("slim", 1, .7), result("slim", 2, .8)]
    [group] = group_by_setting(own)
    text = format_table(summarize(group)).set_index("head")
    assert summarize(group).set_index("head").loc["slim", "difference"] == pytest.approx(-.15) and list(text.wd) == ["0.1", "–"]
    assert not any("wd" in title for title, _ in tell_apart([group, [result(name="other", epochs=1)]]))
    assert list(format_table(summarize([result("avg", 1, wd=.1), result("slim", 1, wd=0.)])).wd) == ["0.1", "0"]
    apart = group_by_setting([*own, result("slim", 1, .75, wd=.1)])
    assert [len(g) for g in apart] == [3, 2] and [t[-6:] for t, _ in tell_apart(apart)][0] == "wd 0.1"
    assert "wd" not in format_table(summarize([result("avg", 1, wd=.1), result("slim", 1, wd=.1)]))   # a title's


def test_a_heads_own_options_are_in_its_row_and_keep_it_beside_the_others():
    def one(head, seed, accuracy, **options):
        r = result(head, seed, accuracy)
        return replace(r, spec=replace(r.spec, options=tuple(options.items())))
    learned = [one("learned", s, .8, **options) for options in ({}, dict(num_heads=4)) for s in (1, 2)]
    group, = group_by_setting([*learned, result("avg", 1, .7), result("avg", 2, .7)])
    table = summarize(group).set_index("head")
    assert list(table.index) == ["learned", "learned num_heads=4", "avg"] and table.loc["learned num_heads=4", "difference"] == pytest.approx(.1)
    assert "options" not in setting_of(learned[2])
    other = one("avg", 1, .9, block_pool="x")   # of the network
    assert len(group_by_setting([*group, other])) == 2 and setting_of(other)["options"] == {"block_pool": "x"}


def test_a_run_that_a_later_version_made_again_counts_once(tmp_path):
    run = fake_run(tmp_path, spec_of(), .5)
    old = run.with_name("digits-avg-1-0123456789")
    shutil.copytree(run, old)
    results, problems = collect([tmp_path])
    assert [r.folder for r in results] == [run] and problems == [f"{old}: made again by a later version, left out."]
    assert len(collect([old])[0]) == 1   # alone it counts


def test_several_rates_of_the_baseline_compare_with_the_best():
    rates = [result("avg", s, v, lr=lr) for lr, v in ((.01, .8), (.02, .9)) for s in (1, 2)]
    table = summarize(rates + [result("slim", s, .85) for s in (1, 2)]).set_index("head")
    assert table.loc["slim", "difference"] == pytest.approx(-.05) and np.isnan(table.loc["avg 0.02", "difference"])


def test_verdicts_in_plain_words():
    rs = [result("avg", s, v) for s, v in enumerate((.90, .92, .91))]
    def verdict(values):
        table = format_table(summarize(rs + [result("slim", s, v) for s, v in enumerate(values)]))
        return table.set_index("head").loc["slim", "verdict"]
    assert verdict((.94, .97, .95)) == "better" and verdict((.80, .83, .81)) == "worse" and verdict((.90, .93, .90)) == "cannot tell with 3"
    assert verdict((.99,)) == "cannot tell with 1"


def test_the_blogs_tables_by_hand(tmp_path):
    for head, value in (("avg", .95), ("learned", .93)):
        for seed, d in enumerate((-.01, 0, .01)): fake_run(tmp_path, spec_of(head, seed, epochs=1), value + d)
    tables = blog_tables(collect([tmp_path])[0], "imagenette")
    assert list(tables) == ["1. Baseline", "2. Sandwich norm", "3. Average attention", "4. Concat attention", "5. Larger images: change against the training size"]
    base = tables["1. Baseline"]
    assert base["accuracy %"].tolist()[0] == "95.00 ± 1.00" and base["F1"].tolist()[0] == "0.9400 ± 0.0100"
    assert base[base["head"] == "avg, blog (xeca_resnext50s)"]["accuracy %"].tolist() == ["95.80 ± 0.11", "94.96 ± 0.23", "95.77 ± 0.10"]
    assert base["note"].iloc[-1] == "train loss and valid loss: probably those of the run with sandwich norm"
    sizes = tables["5. Larger images: change against the training size"].set_index("head")
    assert sizes.loc["avg", "accuracy %"] == "+1.00" and sizes.loc["avg", "valid loss"] == "-0.0500"
    assert "5." not in "".join(blog_tables([result("avg", 1, .9)]))
    with pytest.raises(BadInput, match="^published: 'pets' is unknown. Did you mean 'petals'.*imagenette, imagewoof"): blog_tables([result()], "pets")


def test_another_metric_than_accuracy_is_compared_alike(tmp_path):
    "Nothing in a table or page knows what the task's metric is called."
    def dice(head, seed, value):
        epochs = pd.DataFrame(dict(epoch=[0, 1], valid_loss=[.9, .5], dice=[value / 2, value]))
        return Result(spec_of(head, seed), "complete", dict(valid_loss=.5, dice=value, foreground_acc=.7), "dice", seconds_per_epoch=1., epochs=epochs)
    results = [dice(h, s, v + s / 100) for h, v in (("avg", .6), ("slim", .7)) for s in (1, 2)]
    table = summarize(results)
    assert primary_of(table) == "dice" and "accuracy" not in " ".join(table.columns) and table.foreground_acc.tolist() == [.7, .7]
    assert format_table(table)["dice %"].tolist() == ["61.5 ± 0.7", "71.5 ± 0.7"] and learning_rates(results)[1].loc["slim", .01] == pytest.approx(.715)
    page = write_report(results, tmp_path / "r.html").read_text()
    assert "Dice after the last epoch" in page and "ccuracy" not in re.sub(r'data:[^"]+', "", page).replace("foreground_acc", "")
    assert collect([tmp_path / "r.runs.csv"])[0] == results


def test_names_of_others_are_text_in_a_page(tmp_path):
    nasty = "<script>alert(1)</script> & $x_1$ | \"q\""
    data = DataId(nasty, path=nasty)
    results = [replace(result(h, s, .9 + s / 100, data=data), machine=nasty, seconds_per_epoch=1., epochs=pd.DataFrame(dict(epoch=[0], accuracy=[.9])))
               for h in ("avg", nasty) for s in (1, 2)]
    results += [result("avg", 1, .5, data=data, mix="mixup")]
    page = write_report(results, tmp_path / "r.html", title=nasty).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 6 and "& $x" not in page
    lines = [l for l in (tmp_path / "r.md").read_text().splitlines() if l.startswith("| <script")]
    assert lines and all(len(re.findall(r"(?<!\\)\|", l)) == 8 for l in lines)
    assert collect([tmp_path / "r.runs.csv"])[0] == results


def test_measures_need_runs_of_one_setting_with_folders():
    for bad, words in (([], "no complete run"), ([result(), result(size=64)], "several settings"), ([result()], "come from a table")):
        with pytest.raises(BadInput, match=f"^runs: .*{words}"): measure_maps(bad)


def test_curves_of_an_unknown_metric_name_the_nearest():
    r = replace(result(), epochs=pd.DataFrame(dict(epoch=[0], accuracy=[.9])))
    with pytest.raises(BadInput, match="^metric: 'acuracy' is unknown. Did you mean 'accuracy'"): learning_curves([r], "acuracy")


def test_markdown_by_hand():
    assert markdown(pd.DataFrame(dict(a=["x"], b=[1]))) == "| a | b |\n| --- | --- |\n| x | 1 |"


def test_runs_that_chose_a_rate_are_not_part_of_the_comparison(tmp_path):
    for seed in (1, 2): fake_run(tmp_path, spec_of(seed=seed), .9)
    for seed in (0, 10): fake_run(tmp_path / "lr", spec_of(seed=seed, lr=.001), .95)
    (tmp_path / "lr" / "rates.csv").write_text("")
    results, problems = collect([tmp_path])
    assert [r.spec.seed for r in results] == [1, 2] and "runs of attnpool lr, left out" in problems[0]
    assert len(collect([tmp_path / "lr"])[0]) == 2   # when named


def test_the_blogs_values_stand_beside_runs_on_the_same_data(tmp_path):
    def on(*data, accuracy, seeds=(1,)): return [fake_run(tmp_path, spec_of(seed=s, data=DataId(*data)), accuracy) for s in seeds]
    on("digits", accuracy=.5, seeds=(1, 2, 3)), on("imagenette-160", accuracy=.8), on("woof", "imagewoof", "abc", accuracy=.7)
    results, _ = collect([tmp_path])
    for data, ours in (("imagenette", "80.0"), ("imagewoof", "70.0")):   # by name; by family, whatever it is called
        write_report(results, tmp_path / "r.html", data=data)
        text = (tmp_path / "r.md").read_text()
        assert ours in text[text.index("Table"):] and "50.0" not in text[text.index("Table"):]
    with pytest.raises(BadInput, match="^published: none of the runs is on petals. They are on digits, imagenette-160, woof"):
        write_report(results, tmp_path / "r.html", data="petals")


def test_settings_are_told_apart_by_what_differs(tmp_path):
    fake_run(tmp_path, spec_of(), .5), fake_run(tmp_path, spec_of(mix="cutmixup"), .8)
    results, _ = collect([tmp_path])
    write_report(results, tmp_path / "r.html")
    assert "mix cutmixup" in (tmp_path / "r.md").read_text() and sorted(pd.read_csv(tmp_path / "r.csv").mix) == ["cutmixup", "none"]
    other = result(data=DataId("digits", "digits", "f00"))
    assert [t for t, _ in tell_apart([[result()], [other]])] == ["digits, xeca_resnext_tiny, quick, 40 px, 8 epochs",
                                                                  "digits, xeca_resnext_tiny, quick, 40 px, 8 epochs, pictures f00"]


def test_titles_are_words_a_user_understands():
    def titles(*its): return [t for t, _ in tell_apart(group_by_setting(its))]
    plain = "digits, xeca_resnext_tiny, quick, 40 px, "
    assert titles(result(epochs=1)) == [plain + "1 epoch"]
    assert titles(result(), result(micro_bs=64)) == [plain + "8 epochs"]   # whole batches: without effect
    assert titles(result(), result(micro_bs=16)) == [plain + "8 epochs", plain + "8 epochs, in parts of 16"]
    said = titles(result(), result(data=DataId("other", "", "f00")))
    assert len(said) == 2 and not any("pictures" in t or "f00" in t for t in said)   # their names tell
    linear = result()
    linear = replace(linear, spec=replace(linear.spec, arch="patchconvnet_tiny", options=(("stem", "linear"),)))
    assert titles(replace(linear, spec=replace(linear.spec, options=())), linear)[1].endswith("stem=linear")


def test_rates_that_are_alike_or_learned_nothing_are_told_so():
    def at(lr, accuracy, head="avg"): return replace(result(head, 1, accuracy, lr=lr), pictures=[48, 12], classes=[3, 4, 4])
    best = learning_rates([at(.1, 1/3), at(.2, .5), at(.1, .9, "slim"), at(.2, .9, "slim"), at(.4, .7, "slim")])[0]
    assert best == {"avg": [], "slim": [.1, .2]}
    assert learning_rates([replace(at(.1, 0.), status="diverged", metrics={})])[0] == {"avg": None}


def test_the_paper_s_own_heads_are_not_asked_for_avg():
    assert not any("--heads" in line for line in remarks([result("paper"), result("paper-avg")]))
    assert any("add it to --heads" in line for line in remarks([result("slim"), result("paper")]))


def test_a_history_with_other_epochs_is_not_a_complete_run(tmp_path):
    run = fake_run(tmp_path, spec_of(epochs=2), .9)
    with (run / "history.csv").open("a") as f: f.write("0,1,1\n")
    values = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(values | dict(files={"history.csv": (run / "history.csv").stat().st_size})))
    with pytest.raises(BadInput, match="history.csv has 3 epochs instead of 2"): load_run(run)


def test_a_log_that_stopped_on_nan_counts_as_diverged_among_the_others(tmp_path):
    for seed, losses in ((1, (1, 1, 1)), (2, (1, 1, 1)), (3, (1, float("nan")))):
        rows = [dict(epoch=e, train_loss=l, valid_loss=l, accuracy=.9 if l == l else float("nan"), time="00:10") for e, l in enumerate(losses)]
        pd.DataFrame(rows).to_csv(tmp_path / f"learned-{seed}.csv", index=False)
    results, _ = collect(sorted(tmp_path.glob("*.csv")))
    [group] = group_by_setting(results)
    row = summarize(group).iloc[0]
    assert (row.n, row.diverged) == (2, 1)


# What a probe's report says

def probe_of(head="avg", seed=1, accuracy=.9, lr=.003, wd=3., split="seed", **fields):
    "An invented probe: its rates found, its split drawn by its seed."
    r = result(head, seed, accuracy)
    epochs = pd.DataFrame(dict(epoch=[0], accuracy=[accuracy]))
    values = dict(found=dict(lr=lr, wd=wd, trials=[]), redrawn=split == "seed", pictures=[48, 12], run_seconds=2., seconds_per_epoch=1., epochs=epochs)
    recipe = replace(r.spec.recipe, lr=None, wd=None)
    return replace(r, spec=replace(r.spec, recipe=recipe, split=split), **values | fields)


def told(results, folder, capsys):
    "What the page, the text beside it and the terminal say of results, each in one line."
    page = write_report(results, folder / "r.html")
    with pytest.raises(SystemExit) as end: main(["report", str(folder / "r.runs.csv"), "--out", str(folder / "again.html")])
    assert not end.value.code and (folder / "again.md").read_text() == (folder / "r.md").read_text()
    page = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page.read_text(), flags=re.S).replace("&#39;", "'")
    return [" ".join(text.split()) for text in (page, (folder / "r.md").read_text(), capsys.readouterr().out)]


def test_doubles_of_the_worst_split_are_told_everywhere(tmp_path, capsys):
    doubled = [probe_of(head, seed, doubles=n) for head in ("avg", "max") for seed, n in ((1, 2), (2, 4), (3, 0))]
    for text in told(doubled, tmp_path, capsys):
        assert text.count("In digits, up to 4 of 12 validation pictures in a split train as well") == 1 and "attnpool data DIR names them" in text
    official = [probe_of(seed=s, split="own", doubles=4) for s in (1, 2)]
    for text in told(official, tmp_path, capsys): assert "In digits, 4 of 12 validation pictures train as well" in text
    assert not remarks([probe_of(seed=s, doubles=n, pictures=[1500, 1000]) for s, n in enumerate((0, None, 0))])


def test_the_bounds_of_a_share_are_cut_and_those_of_a_difference_are_not(tmp_path, capsys):
    results = [probe_of("avg", s, v) for s, v in enumerate((1., .8))] + [probe_of("max", s, v) for s, v in enumerate((.05, .3))]
    table = summarize(results)
    text = format_table(table)
    assert text["[95%]"].tolist() == ["0.0 to 100.0"] * 2 and "-72.5 [-422.6, +277.6]" in text["points vs avg [95%]"][1]
    assert table.mean_high[0] > 1 and table.mean_low[0] < 0   # for who computes with them
    page, md, _ = told(results, tmp_path, capsys)
    for said in page, md: assert said.count("are cut at 0 and 100%") == 1
    assert "are cut" not in "".join(told([result(seed=1), result(seed=2)], tmp_path, capsys))


def test_splits_are_called_splits_and_seeds_seeds(tmp_path, capsys):
    maps = tmp_path / "run"
    maps.mkdir()
    np.savez(maps / "maps.npz", images=np.zeros((2, 3, 8, 8), "float32"), maps=np.full((2, 1, 2, 2), .25, "float32"))
    for split, word, other in (("seed", "split", "seed"), ("own", "seed", "split")):
        page = write_report([probe_of(seed=s, split=split, folder=maps) for s in (1, 2)], tmp_path / "r.html").read_text()
        for said in ("mean over {0}s; thin: each {0}.", "({0} 1)", "median of epochs and {0}s", "mean over {0}s, with"):
            assert said.format(word) in page and said.format(other) not in page


def test_rates_in_the_table_were_used_and_stand_where_the_text_names_them(tmp_path, capsys):
    results = [probe_of("avg", s, lr=lr, wd=wd) for s, (lr, wd) in enumerate([(.03, .01), (.003, 3.), (.03, 3.), (.003, .01)])]
    table = summarize(results)
    assert (table.lr[0], table.wd[0]) == (.003, .01)   # of two as common the least; the medians were never used
    assert summarize([*results, probe_of("avg", 9, lr=.03, wd=3.)]).loc[0, ["lr", "wd", "wd_low", "wd_high"]].tolist() == [.03, 3., .01, 3.]
    page, md, _ = told(results, tmp_path, capsys)
    for said in page, md: assert "0.003 (0.003 to 0.03)" in said and "0.01 (0.01 to 3)" in said
    assert "| lr | wd |" in md and "Learning rate and weight decay: found" in page
    one = [replace(r, found=dict(lr=.003)) for r in results]   # the decay was typed
    page, md, _ = told(one, tmp_path, capsys)
    assert "Learning rate: found" in page and "eight decay" not in page and "wd |" not in md and "wd" not in format_table(summarize(one))


def test_the_text_beside_the_page_stands_alone(tmp_path, capsys):
    bad = [replace(probe_of("gem num", s), status="failed", metrics={}, found={}, epochs=None, reason="num_heads: 7\ndoes not divide") for s in (1, 2)]
    page, md, out = told([*(probe_of(seed=s, accuracy=.8 + s / 100) for s in (1, 2)), *bad], tmp_path, capsys)
    for text in page, md, out: assert text.count("cannot take the body's map: gem num (num_heads: 7 does not divide)") == 1
    assert "[95%]: corrected resampled t interval, paired by split." in md and "peak in box" not in md and "eak in box" not in page
    boxed = [replace(r, metrics=r.metrics | dict(peak_in_box=.5)) for r in (result(seed=1), result(seed=2))]
    page, md, out = told(boxed, tmp_path, capsys)
    assert "| peak in box |" in md and "Peak in box: share" in page and "in box" in out and "[95%]" not in md   # of one head
    fixed = [probe_of(seed=s, accuracy=.8 + s / 100, redrawn=False) for s in (1, 2)]
    assert "[95%]: jackknife t interval, paired by training part." in told(fixed, tmp_path, capsys)[1]


def test_without_average_pooling_the_way_to_differences_is_told(tmp_path, capsys):
    for text in told([probe_of("max"), probe_of("gem")], tmp_path, capsys): assert text.count("add it to --heads") == 1
    for text in told([probe_of("max"), probe_of("avg")], tmp_path, capsys): assert "--heads" not in text


def test_the_usual_rates_hold_the_recipe_s_own():
    from attnpool.cli import _usual_rates
    assert _usual_rates(None) == _usual_rates(4e-3) == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]
    assert 3e-3 in _usual_rates(3e-3) and len(_usual_rates(3e-3)) == 7
    assert min(_usual_rates(4e-4)) < 4e-4 < max(_usual_rates(4e-4)) and 4e-4 in _usual_rates(4e-4)
