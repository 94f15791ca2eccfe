"Tables and pages from runs, from others' logs, and beside the blog's numbers."
import csv
import json
import re
import time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from attnpool.report.collect import collect, read_log, settings
from attnpool.report.page import markdown, write_report
from attnpool.report.published import blog_tables, published
from attnpool.report.stats import format_table, summarize
from attnpool.runs.spec import make_spec
from attnpool.runs.store import load_run
from attnpool.heads import HEADS
from attnpool.models.xresnet import ARCHS


def fake_run(out, spec, accuracy, epochs=80):
    "A run folder of the real layout, with invented numbers."
    spec = replace(spec, epochs=epochs)
    folder = out / spec.name
    folder.mkdir(parents=True)
    last = dict(train_loss=.5, valid_loss=.6, accuracy=accuracy, balanced_accuracy_score=accuracy, f1_score=accuracy - .01, matthews_corrcoef=accuracy - .02)
    rows = [dict(epoch=e) | {k: v * (1 - .5**(e + 1) * (e < epochs - 1)) for k, v in last.items()} | dict(seconds=1.5) for e in range(epochs)]
    with (folder / "history.csv").open("w") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "spec.json").write_text(json.dumps(asdict(spec)))
    result = dict(spec=asdict(spec), status="complete", **last, parameters=10**6, seconds_per_epoch=1.5, peak_in_box=None,
                  sizes={"256": dict(accuracy=accuracy + .01, f1_score=accuracy, matthews_corrcoef=accuracy, balanced_accuracy_score=accuracy, valid_loss=.55)},
                  device="cpu", machine="x", threads=2, versions=dict(torch="2"))
    result["files"] = {f.name: f.stat().st_size for f in folder.iterdir()}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_published_numbers_are_the_blogs():
    facts = published()
    assert len(facts) == 247 and set(facts["head"]) <= set(HEADS) and set(facts.arch) <= set(ARCHS)
    def value(data, arch, head, metric, size=224, lr=None):
        rows = facts[(facts.data == data) & (facts.arch == arch) & (facts["head"] == head) & (facts.metric == metric) & (facts["size"] == size)]
        if lr: rows = rows[rows.lr == lr]
        (row,) = rows.itertuples()
        return row.mean, row.std
    assert value("imagenette", "xeca_resnext50s", "avg", "accuracy", lr=8e-3) == (.9580, .0011)
    assert value("petals", "xeca_resnext50s", "learned", "f1") == (.8602, .0022)
    assert value("imagewoof", "xeca_resnext50s", "concat", "delta_accuracy", 384)[0] == -.02


def test_published_runs_make_the_same_tables(tmp_path):
    for head, accuracy in (("avg", .9), ("concat", .93), ("avg", .91), ("concat", .92)):
        fake_run(tmp_path / "runs", make_spec(head=head, seed=int(accuracy * 100), eval_sizes=(48,)), accuracy, epochs=3)
    fake_run(tmp_path / "runs", make_spec(head="concat", seed=90, lr=1.), .1, epochs=2)
    results, _ = collect([tmp_path / "runs"])
    for r in results: r["spec"]["data"] = "/home/me/digits"
    (tmp_path / "one").mkdir()
    page = write_report(results, tmp_path / "one" / "report.html")
    again, problems = collect([page.with_suffix(".runs.csv")])
    assert not problems and "/home/me" not in page.with_suffix(".runs.csv").read_text()
    def key(r): return r["spec"]["head"], r["spec"]["seed"], r["spec"]["lr"]
    for a, b in zip(sorted(results, key=key), sorted(again, key=key), strict=True):
        assert a["spec"] | dict(data="digits", eval_sizes=list(a["spec"]["eval_sizes"])) == b["spec"]
        assert all(a[k] == b[k] for k in ("status", "accuracy", "sizes", "parameters", "versions", "seconds_per_epoch"))
        assert b["history"].epoch.tolist() == list(range(a["spec"]["epochs"]))[:len(b["history"])]
    for a, b in zip(sorted(settings(results), key=len), sorted(settings(again), key=len), strict=True):
        def rows(table): return table.sort_values(["head", "lr"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(rows(summarize(a)), rows(summarize(b)), rtol=1e-4)
    (tmp_path / "two").mkdir()
    write_report(again, tmp_path / "two" / "report.html")
    assert "concat" in (tmp_path / "two" / "report.md").read_text()


def test_fifty_long_runs_make_a_report_quickly(tmp_path):
    rng = np.random.default_rng(0)
    for head in ("avg", "learned", "sandwich", "concat", "slim"):
        for seed in range(10): fake_run(tmp_path, make_spec(head=head, seed=seed), .9 + rng.normal(0, .005))
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
    _, broken = (fake_run(tmp_path, make_spec(seed=seed), .9) for seed in (1, 2))
    (broken / "result.json").write_text("{")
    results, problems = collect([tmp_path, tmp_path])   # twice the same folder is once
    assert [r["spec"]["seed"] for r in results] == [1] and problems == [f"{broken}: result.json is torn."]
    with pytest.raises(FileNotFoundError, match="runs: there is no"): collect([tmp_path / "nowhere"])


def test_a_csvlogger_file_of_fastai_is_read(tmp_path, dls):
    from fastai.vision.all import CSVLogger, Learner, accuracy
    from attnpool.models.xresnet import xeca_resnext_tiny
    learn = Learner(dls, xeca_resnext_tiny(10), metrics=accuracy, path=tmp_path, cbs=CSVLogger("avg-7.csv"))
    with learn.no_bar(): learn.fit(2, 1e-3)
    r = read_log(tmp_path / "avg-7.csv")
    assert (r["spec"]["head"], r["spec"]["seed"], r["spec"]["epochs"], r["status"]) == ("avg", 7, 2, "complete")
    assert r["accuracy"] == pytest.approx(learn.recorder.values[-1][-1], abs=1e-5)
    write_report([r], tmp_path / "report.html")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="expected a CSVLogger file"): read_log(tmp_path / "empty.csv")


def result(head, seed, accuracy, lr=.01, **spec):
    return dict(spec=dict(data="digits", head=head, seed=seed, lr=lr, **spec), status="complete", accuracy=accuracy)


def test_settings_are_not_mixed_and_rates_become_rows():
    groups = settings([result("avg", 1, .9, size=40), result("avg", 1, .8, size=64), result("slim", 1, .7, size=40), result("slim", 1, .6, lr=.02, size=40)])
    assert [[r["label"] for r in g] for g in groups] == [["avg", "slim 0.01", "slim 0.02"], ["avg"]]
    table = summarize(groups[0]).set_index("head")
    assert table.loc["slim 0.02", "difference"] == pytest.approx(-.3)


def test_several_rates_of_the_baseline_compare_with_the_best():
    group, = settings([result("avg", s, v, lr) for lr, v in ((.01, .8), (.02, .9)) for s in (1, 2)] + [result("slim", s, .85) for s in (1, 2)])
    table = summarize(group).set_index("head")
    assert table.loc["slim", "difference"] == pytest.approx(-.05) and np.isnan(table.loc["avg 0.02", "difference"])


def test_verdicts_in_plain_words():
    rs = [result("avg", s, v) for s, v in enumerate((.90, .92, .91))]
    def verdict(values):
        table = format_table(summarize(rs + [result("slim", s, v) for s, v in enumerate(values)]))
        return table.set_index("head").loc["slim", "verdict"]
    assert verdict((.94, .96, .95)) == "better" and verdict((.80, .82, .81)) == "worse" and verdict((.90, .93, .90)) == "cannot tell with 3"
    assert verdict((.99,)) == "cannot tell with 1"


def test_the_blogs_tables_by_hand(tmp_path):
    for head, value in (("avg", .95), ("learned", .93)):
        for seed, d in enumerate((-.01, 0, .01)): fake_run(tmp_path, make_spec(head=head, seed=seed), value + d, epochs=1)
    tables = blog_tables(collect([tmp_path])[0], "imagenette")
    assert list(tables) == ["1. Baseline", "2. Sandwich norm", "3. Average attention", "4. Concat attention", "5. Larger images: change against the training size"]
    base = tables["1. Baseline"]
    assert base["accuracy %"].tolist()[0] == "95.00 ± 1.00" and base["F1"].tolist()[0] == "0.9400 ± 0.0100"
    assert base[base["head"] == "avg, blog (xeca_resnext50s)"]["accuracy %"].tolist() == ["95.80 ± 0.11", "94.96 ± 0.23", "95.77 ± 0.10"]
    sizes = tables["5. Larger images: change against the training size"].set_index("head")
    assert sizes.loc["avg", "accuracy %"] == "+1.00" and sizes.loc["avg", "valid loss"] == "-0.0500"
    assert "5." not in "".join(blog_tables([result("avg", 1, .9)]))
    with pytest.raises(ValueError, match="published: expected petals, imagenette, imagewoof, got 'pets'"): blog_tables([result("avg", 1, .9)], "pets")


def test_markdown_by_hand():
    assert markdown(pd.DataFrame(dict(a=["x"], b=[1]))) == "| a | b |\n| --- | --- |\n| x | 1 |"


def finished(folder, head, seed, accuracy, epochs=2, **fields):
    "The folder of a run with other fields, made at a commit whose name looks like a number."
    run = fake_run(folder, replace(make_spec(head=head, seed=seed), **fields), accuracy, epochs)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | dict(git="4e12435")))
    return run


def test_runs_that_chose_a_rate_are_not_part_of_the_comparison(tmp_path):
    for seed in (1, 2): finished(tmp_path, "avg", seed, .9)
    for seed in (0, 10): finished(tmp_path / "lr", "avg", seed, .95, lr=.001)
    (tmp_path / "lr" / "rates.csv").write_text("")
    results, problems = collect([tmp_path])
    assert [r["spec"]["seed"] for r in results] == [1, 2] and "runs of attnpool lr, left out" in problems[0]
    assert len(collect([tmp_path / "lr"])[0]) == 2   # when named


def test_the_second_generation_of_published_runs_is_the_first(tmp_path):
    finished(tmp_path / "2024", "avg", 1, .9, epochs=3, data="2024")
    write_report(collect([tmp_path])[0], tmp_path / "a.html")
    again, _ = collect([tmp_path / "a.runs.csv"])
    assert again[0]["git"] == "4e12435" and again[0]["spec"]["data"] == "2024"   # neither is a number
    write_report(again, tmp_path / "b.html")
    a, b = (pd.read_csv(tmp_path / f"{n}.runs.csv") for n in "ab")
    assert list(a.epoch) == list(b.epoch) == [0, 1, 2] and (a.accuracy == b.accuracy).all() and set(a) == set(b)


def test_the_blogs_values_stand_beside_runs_on_the_same_data(tmp_path):
    for seed in (1, 2, 3): finished(tmp_path, "avg", seed, .5)
    finished(tmp_path, "avg", 1, .8, data="imagenette-160")
    results, _ = collect([tmp_path])
    write_report(results, tmp_path / "r.html", data="imagenette")
    text = (tmp_path / "r.md").read_text()
    assert "80.0" in text[text.index("Table"):] and "50.0" not in text[text.index("Table"):]
    with pytest.raises(ValueError, match="none of the runs is on petals. They are on digits, imagenette-160"): write_report(results, tmp_path / "r.html", data="petals")


def test_settings_are_told_apart_by_what_differs(tmp_path):
    finished(tmp_path, "avg", 1, .5, mix="")
    finished(tmp_path, "avg", 1, .8, mix="cutmixup")
    write_report(collect([tmp_path])[0], tmp_path / "r.html")
    assert "mix cutmixup" in (tmp_path / "r.md").read_text() and list(pd.read_csv(tmp_path / "r.csv").mix.fillna("")) == ["", "cutmixup"]


def test_a_history_with_other_epochs_is_not_a_complete_run(tmp_path):
    run = finished(tmp_path, "avg", 1, .9)
    with (run / "history.csv").open("a") as f: f.write("0,1,1\n")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | dict(files={"history.csv": (run / "history.csv").stat().st_size})))
    with pytest.raises(ValueError, match="history.csv has 3 epochs instead of 2"): load_run(run)


def test_a_log_that_stopped_on_nan_counts_as_diverged_among_the_others(tmp_path):
    for seed, losses in ((1, (1, 1, 1)), (2, (1, 1, 1)), (3, (1, float("nan")))):
        pd.DataFrame([dict(epoch=e, train_loss=l, valid_loss=l, accuracy=.9 if l == l else float("nan"), time="00:10") for e, l in enumerate(losses)]).to_csv(tmp_path / f"learned-{seed}.csv", index=False)
    results, _ = collect(sorted(tmp_path.glob("*.csv")))
    [group] = settings(results)
    row = summarize(group).iloc[0]
    assert (row.n, row.diverged) == (2, 1)
