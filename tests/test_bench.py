"The benchmark: real data, real runs, real processes that are killed and interrupted."
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from attnpool.cli import main
from attnpool.data.digits import digits_dls
from attnpool.heads import HEADS
from attnpool.recipe import recipe_learner, RECIPES
from attnpool.registry import BadInput
from attnpool.report.page import write_report
from attnpool.report.stats import format_table, paired_difference, summarize
from attnpool.runs.spec import make_spec
from attnpool.runs.store import load_run, Result
from attnpool.runs.sweep import sweep
from attnpool.runs.train import open_run, run

SMALL = dict(epochs=1, size=20, bs=128)
FLAGS = ["--epochs", "1", "--size", "20", "--bs", "128", "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return run(make_spec(head="concat", **SMALL), out), out


def test_a_run_folder_holds_what_it_says(finished):
    result, out = finished
    folder = result.folder
    assert set(result.files) == {"spec.json", "history.csv", "maps.npz", "predictions.csv", "weights.safetensors"}
    assert {f.name for f in folder.iterdir()} == set(result.files) | {"result.json"}
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert len(rows) == 1 and float(rows[-1]["accuracy"]) == result.value
    spec = make_spec(head="concat", **SMALL)
    model = recipe_learner(digits_dls(size=20), spec.arch, spec.head).model
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    model.eval()
    dls = digits_dls(size=20)
    with torch.no_grad(): right = torch.cat([model(xb).argmax(1) == yb for xb, yb in dls.valid])
    assert right.float().mean().item() == pytest.approx(result.value, abs=.002)
    with np.load(folder / "maps.npz") as f:
        assert f["images"].shape == (8, 3, 20, 20) and f["maps"].shape[:2] == (8, 1) and f["boxes"].shape == (8, 4)
        assert str(f["unit"]) == "uniform" and np.allclose(f["maps"].mean((2, 3)), 1, atol=1e-5)
        assert list(f["files"]) == [""] * 8 and f["crops"].tolist() == [[0, 0, 20, 20]] * 8 and np.allclose(f["p"].sum(1), 1, atol=1e-5)
    assert 0 < result.metrics["peak_in_box"] < 1


def test_the_same_spec_gives_the_same_history(finished, tmp_path):
    def history(r): return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in csv.DictReader((r.folder / "history.csv").open())]
    assert history(run(make_spec(head="concat", **SMALL), tmp_path)) == history(finished[0])


def test_what_is_there_is_not_made_again(finished):
    result, out = finished
    before = {f: f.stat().st_mtime_ns for f in result.folder.iterdir()}
    assert run(make_spec(head="concat", **SMALL), out) == result
    assert before == {f: f.stat().st_mtime_ns for f in result.folder.iterdir()}


@pytest.mark.parametrize("harm, words", [
    (lambda f: (f / "result.json").unlink(), "no result.json"),
    (lambda f: (f / "result.json").write_text('{"spec": {'), "result.json is torn"),
    (lambda f: (f / "result.json").write_text('[1, 2]'), "result.json is not the result of a run"),
    (lambda f: os.truncate(f / "weights.safetensors", 1000), "weights.safetensors has 1000 bytes instead of"),
    (lambda f: (f / "history.csv").unlink(), "history.csv is missing"),
])
def test_half_written_folders_are_made_again_and_said(finished, tmp_path, capsys, harm, words):
    import shutil
    folder = tmp_path / finished[0].folder.name
    shutil.copytree(finished[0].folder, folder)
    (folder / "weights.safetensors.77.tmp").write_bytes(b"left by a killed process")
    (folder / "old.npz").write_bytes(b"of a run that did not finish")
    harm(folder)
    with pytest.raises(ValueError, match=words): load_run(folder)
    result, = sweep([make_spec(head="concat", **SMALL)], tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert words in said and "It is made again" in said
    assert result.value == finished[0].value and {f.name for f in folder.iterdir()} == set(result.files) | {"result.json"}


def test_runs_of_another_version_are_told(finished, tmp_path, capsys):
    import shutil
    folder = tmp_path / finished[0].folder.name
    shutil.copytree(finished[0].folder, folder)
    result = json.loads((folder / "result.json").read_text())
    result["versions"]["torch"] = "1.2.3"
    (folder / "result.json").write_text(json.dumps(result))
    sweep([make_spec(head="concat", **SMALL)], tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 1 runs are in" in said and "Some were made otherwise than here: cpu, attnpool" in said and "torch 1.2.3" in said


def test_a_diverged_run_is_a_result(tmp_path):
    spec = make_spec(head="learned", **SMALL | dict(lr=1e30))
    good = make_spec(head="learned", seed=2, **SMALL)
    bad, ok = sweep([spec, good], tmp_path)
    assert (bad.status, bad.diverged_epoch, bad.value, ok.status) == ("diverged", 0, None, "complete")
    assert sweep([spec, good], tmp_path) == [bad, ok]
    text = format_table(summarize([bad, replace(ok, spec=replace(ok.spec, recipe=bad.spec.recipe))]))   # at one rate
    assert "(1 diverged)" in text["accuracy %"][0] and text.n[0] == "1"
    write_report([bad, ok], tmp_path / "report.html")
    write_report([bad], tmp_path / "only.html")


def result(head, seed, accuracy):
    return Result(make_spec(head=head, seed=seed, lr=.01), "complete", dict(accuracy=accuracy), "accuracy", parameters=10**6, seconds_per_epoch=1.)


def test_paired_difference_equals_scipys():
    rng = np.random.default_rng(0)
    a, b = ({s: v for s, v in enumerate(rng.normal(.9, .01, 6))} for _ in range(2))
    mean, half, n = paired_difference(a, b)
    theirs = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval()
    assert (mean - half, mean + half, n) == (pytest.approx(theirs.low), pytest.approx(theirs.high), 6)
    assert paired_difference(a, {0: .5, 99: .1})[2] == 1 and np.isnan(paired_difference(a, {0: .5})[1])
    assert paired_difference(a, {99: .1})[2] == 0


def test_summary_by_hand():
    avg, other = [.90, .92, .91], [.93, .94, .95]
    table = summarize([result("avg", s, v) for s, v in enumerate(avg)] + [result("concat", s, v) for s, v in enumerate(other)])
    concat = table.set_index("head").loc["concat"]
    assert concat.accuracy == pytest.approx(.94) and concat.sd == pytest.approx(.01)   # sample, not population
    assert concat.difference == pytest.approx(.03) and concat.n_pairs == 3
    assert concat.low == pytest.approx(.03 - 4.302653 * np.std([.03, .02, .04], ddof=1) / 3**.5, abs=1e-6)
    text = format_table(table).set_index("head")
    assert text.loc["concat", "accuracy %"] == "94.0 ± 1.0" and text.loc["concat", "points vs avg [95%]"] == "+3.0 [+0.5, +5.5]" and text.loc["concat", "verdict"] == "better"
    assert text.loc["avg", "points vs avg [95%]"] == "–"
    single = format_table(summarize([result("avg", 1, .9), result("slim", 1, .8)])).set_index("head")
    assert single.loc["slim", "points vs avg [95%]"] == "-10.0" and single.loc["slim", "accuracy %"] == "80.0"
    with pytest.raises(ValueError, match="two runs of head 'avg' with seed 1"): summarize([result("avg", 1, .9), result("avg", 1, .8)])
    alone = format_table(summarize([result("slim", 1, .8), result("slim", 2, .8)]))
    assert "points vs avg [95%]" not in alone and "verdict" not in alone


def test_the_report_is_one_file_with_everything(finished, tmp_path):
    other = run(make_spec(head="avg", **SMALL), finished[1])
    page = write_report([other, finished[0]], tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in re.sub(r'data:[^"]+', "", page)
    assert page.count("<article") == 8 and page.count('class="column"') == 16   # pictures, each once for both heads
    assert page.count("data:image/webp") + page.count("data:image/png") == 8 and page.count("data:image/svg") == 2   # and two plots
    assert f"{100 * finished[0].value:.1f}" in page and "xeca_resnext_tiny" in page
    table = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [r["head"] for r in table] == ["avg", "concat"] and float(table[1]["accuracy"]) == pytest.approx(finished[0].value)
    with pytest.raises(ValueError, match="results: there is nothing to report"): write_report([], tmp_path / "x.html")


@pytest.mark.parametrize("args, words", [
    (["bench", "digit"], "data: 'digit' is unknown. Did you mean 'digits'?"),
    (["bench", "digits", "--heads", "avg,conct"], "head: 'conct' is unknown. Did you mean 'concat'?"),
    (["bench", "digits", "--recipe", "quik"], "recipe: 'quik' is unknown. Did you mean 'quick'?"),
    (["bench", "digits", "--arch", "xeca_resnext_tyny"], "arch: 'xeca_resnext_tyny' is unknown. Did you mean 'xeca_resnext_tiny'?"),
    (["bench", "digits", "--seeds", "1,two"], "--seeds: expected whole numbers separated by commas, got '1,two'"),
    (["bench", "digits", "--seeds", ","], "--seeds: expected names or numbers"),
    (["bench", "digits", "--epochs", "0"], "epochs: expected a number above 0, got 0"),
    (["bench", "digits", "--epochs", "many"], "--epochs"),
    (["bench", "digits", "--lr", "-1"], "lr: expected a number above 0, got -1.0"),
    (["bench", "digits", "--size", "8"], "size: a canvas needs at least 20 pixels, got 8"),
    (["bench", "digits", "--device", "cuda:99"], "--device: 'cuda:99' is not available here"),
    (["bench", "digits", "--out", "/proc/attnpool"], "--out: cannot write to /proc/attnpool (No such file or directory). Choose another folder"),
    (["bench", "digits", "--out", __file__], "--out: cannot write to"),
    (["bench", "digits", "--bs", "5000"], "bs: expected 1 to 1500, the training pictures, got 5000"),
    (["bench", "digits", "--nonsense"], "--nonsense"),
    (["bench", "digits", "--epocs", "3"], "--epocs: no such option. Did you mean --epochs?"),
    (["lr", "digits", "--schedul", "cosine"], "--schedul: no such option. Did you mean --schedule?"),
    (["bench", "digits", "--schedule", "cosin"], "schedule: 'cosin' is unknown. Did you mean 'cosine'?"),
    (["bench", "digits", "--task", "clasify"], "task: 'clasify' is unknown. Did you mean 'classify'?"),
    (["bench", "digits", "--augment", "petal"], "augment: 'petal' is unknown. Did you mean 'petals'?"),
    (["bench", "digits", "--augment", "blog"], "augment: digits are at random places as it is"),
    (["bench", "digits", "--heads", "avg,learned", "--options", "num_head=2"], "options: 'num_head' is unknown. Did you mean 'num_heads'?"),
    (["bench", "digits", "--options", "num_heads"], "--options: expected name=value, got 'num_heads'"),
    (["banch"], "banch"),
])
def test_a_users_mistake_is_one_line_and_status_2(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err
    assert err.startswith("attnpool: ") and err.count("\n") == 1


def test_help_names_everything_that_is_registered(capsys):
    for args in (["--help"], ["bench", "--help"]):
        with pytest.raises(SystemExit) as e: main(args)
        assert e.value.code == 0
    text = re.sub(r"-\s+", "-", re.sub("[│|]", " ", capsys.readouterr().out))   # a name may be broken at its hyphen
    assert [name for name in [*HEADS, *RECIPES] if not re.search(rf"\b{name}\b", text)] == []
    with pytest.raises(SystemExit) as e: main([])
    assert e.value.code == 0 and "bench" in capsys.readouterr().out


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    import attnpool.runs.spec
    def broken(*args, **kwargs): raise ValueError("could not broadcast")
    monkeypatch.setattr(attnpool.runs.spec, "make_spec", broken)
    with pytest.raises(ValueError, match="could not broadcast"): main(["bench", "digits"])


def pictures(root):
    "A folder of dark and light noise."
    g = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 6)):
        for c, level in (("dark", 40), ("light", 200)):
            (root / split / c).mkdir(parents=True)
            for i in range(n): Image.fromarray((level + g.integers(-30, 30, (48, 48, 3))).astype("uint8")).save(root / split / c / f"{i}.png")
    return str(root)


def test_other_sizes_are_validated_after_training(tmp_path):
    spec = make_spec(pictures(tmp_path / "pics"), "concat", epochs=1, size=32, bs=8, eval_sizes=[40, 48])
    assert spec.name.startswith("pics-concat-1-")
    r = run(spec, tmp_path / "runs", device="cpu")
    validated = {"valid_loss", "accuracy", "balanced_accuracy_score", "f1_score", "matthews_corrcoef"}
    assert set(r.sizes) == {"40", "48"} and set(r.sizes["40"]) == validated
    assert {"accuracy", "balanced_accuracy_score", "f1_score", "train_loss", "valid_loss"} <= r.metrics.keys() and r.status == "complete"
    history = pd.read_csv(tmp_path / "runs" / spec.name / "history.csv")
    assert len(history) == 1 and (history.iloc[0][["epoch", "valid_loss", "accuracy"]] == [0, r.metrics["valid_loss"], r.value]).all()   # of the training, not of another size
    assert len({r.metrics["valid_loss"], *(m["valid_loss"] for m in r.sizes.values())}) == 3
    assert set(np.load(tmp_path / "runs" / spec.name / "maps.npz")["labels"]) == {0, 1}   # files stand in the order of their classes
    assert r.pictures == [24, 12] and r.images_per_second > 0 and r.peak_memory_mb > 0
    with pytest.raises(ValueError, match="these pictures have one size"): run(make_spec(head="avg", eval_sizes=[48], **SMALL), tmp_path / "runs", device="cpu")
    (tmp_path / "pics/train/dark/broken.png").touch()
    with pytest.raises(ValueError, match="1 of 37 pictures"): run(make_spec(str(tmp_path / "pics"), "avg", epochs=1, size=32, bs=8), tmp_path / "runs", device="cpu")
    assert run(make_spec(str(tmp_path / "pics"), "avg", epochs=1, size=32, bs=8, skip_broken=True), tmp_path / "runs", device="cpu").pictures == [24, 12]


def test_two_processes_on_one_folder_make_each_run_once(tmp_path):
    flags = "--heads", "avg", "--seeds", "1,2,3,4"
    processes = [start(tmp_path, *flags) for _ in range(2)]
    said = [p.communicate(timeout=400) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    made = re.findall(r"avg seed (\d): accuracy", "".join(out for out, _ in said))
    specs = [make_spec(head="avg", seed=s, **SMALL) for s in (1, 2, 3, 4)]
    assert len({load_run(tmp_path / s.name).value for s in specs}) > 1
    histories = "".join(out for out, _ in said).count("1/1 epochs")
    assert histories == 4, said   # each run trained once; the other process only reads it


def start(out, *more):
    def heed(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # what runs in the background of a shell ignores it, and hands that down
    return subprocess.Popen([sys.executable, "-m", "attnpool.cli", "bench", "digits", "--out", str(out), *FLAGS, *more],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def wait_for(condition, process, seconds=240):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end, "the benchmark did not come this far"
        time.sleep(.01)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_interrupted_sweeps_go_on(tmp_path, sig):
    specs = [make_spec(head="avg", seed=s, **SMALL) for s in (1, 2, 3)]
    flags = "--heads", "avg", "--seeds", "1,2,3"
    process = start(tmp_path, *flags)
    second = tmp_path / specs[1].name
    wait_for(lambda: (second / "spec.json").exists(), process)   # in the middle of the second run
    process.send_signal(sig)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if sig == signal.SIGKILL else 130)
    if sig == signal.SIGINT: assert err.strip().splitlines()[-1] == f"attnpool: stopped. What is done is kept in {tmp_path}; the same command goes on."
    first = load_run(tmp_path / specs[0].name)
    made = (tmp_path / specs[0].name / "result.json").stat().st_mtime_ns
    with pytest.raises(ValueError): load_run(second)
    process = start(tmp_path, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "It is made again" in out and "1 of 3 runs are in" in out and "run 2/2" in out and "Report: file://" in out
    assert (tmp_path / specs[0].name / "result.json").stat().st_mtime_ns == made
    assert [load_run(tmp_path / s.name).spec.seed for s in specs] == [1, 2, 3] and first.status == "complete"
    assert json.loads((second / "result.json").read_text())["status"] == "complete"
    assert (tmp_path / "report.html").exists() and not list(tmp_path.rglob("*.tmp"))


KILLS = int(os.environ.get("ATTNPOOL_KILLS", 0))


@pytest.mark.skipif(not KILLS, reason="ATTNPOOL_KILLS=20 kills a sweep that often, which takes some minutes")
def test_kills_at_random_moments(tmp_path):
    specs = [make_spec(head="avg", seed=s, **SMALL) for s in range(1, 3 * KILLS + 1)]
    flags = "--heads", "avg", "--seeds", ",".join(str(s.seed) for s in specs)
    made, moments = {}, np.random.default_rng(0)

    def look():
        for file in (tmp_path / s.name / "result.json" for s in specs):
            if not file.exists(): continue
            load_run(file.parent)   # an error if a file is torn
            assert made.setdefault(file, file.stat().st_mtime_ns) == file.stat().st_mtime_ns, "a finished run was made again"

    for _ in range(KILLS):
        process = start(tmp_path, *flags)
        started = time.time()
        wait_for(lambda: any(f.stat().st_mtime > started for f in tmp_path.glob("*/spec.json")), process)   # it trains
        with pytest.raises(subprocess.TimeoutExpired): process.communicate(timeout=moments.uniform(0, 6))   # some runs later
        process.kill()
        process.communicate()
        look()
    process = start(tmp_path, *flags)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    look()
    assert len(made) == len(specs) and not list(tmp_path.rglob("*.tmp"))
    print(f"{KILLS} kills, {len(specs)} runs, each made once")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A finished run of a folder of pictures."
    root = tmp_path_factory.mktemp("photos")
    return run(make_spec(pictures(root / "pics"), "avg", epochs=1, size=32, bs=8), root / "runs", device="cpu"), root / "pics"


def test_a_run_opens_where_its_pictures_lie_now(photos, tmp_path):
    import shutil
    result, pics = photos
    assert "pictures.csv" in result.files
    shutil.copytree(pics, tmp_path / "moved")
    for data in (None, tmp_path / "moved"):
        learn = open_run(result.folder, "cpu", data)
        with learn.no_bar(): assert learn.validate()[1] == pytest.approx(result.value, abs=1e-6)
        assert learn.dls.listing.root == (data or pics)


def test_a_run_whose_pictures_have_changed_says_which(photos, tmp_path, capsys):
    import shutil
    result, pics = photos
    shutil.copytree(pics, now := tmp_path / "pics")
    shutil.copy(now / "train/dark/0.png", now / "train/dark/new.png")
    (now / "val/light/3.png").unlink()
    with pytest.raises(BadInput) as e: open_run(result.folder, "cpu", now)
    message = str(e.value)
    assert message.startswith(f"data: {now} has changed since {result.folder.name} was trained") and "check=False" in message
    assert "1 added: train/dark/new.png" in message and "1 removed: val/light/3.png" in message
    assert len(open_run(result.folder, "cpu", now, check=False).dls.train_ds) == 25
    maps = ["maps", str(result.folder), "--data", str(now), "--device", "cpu", "--out", str(tmp_path / "maps.html")]
    with pytest.raises(SystemExit, match="^2$"): main(maps)
    assert message in capsys.readouterr().err and "--no-check" in message
    with pytest.raises(SystemExit, match="^0$"): main([*maps, "--no-check"])
    assert (tmp_path / "maps.html").exists()
    again = make_spec(str(now), "avg", epochs=1, size=32, bs=8)
    assert again.name != result.spec.name   # bench trains on them and keeps the old run


def flat(result):
    "As a result was written until 0.1."
    values, spec = result.to_json(), result.spec.to_json()
    recipe = spec.pop("recipe")
    for name in ("task", "options", "start"): spec.pop(name)
    kept = {k: recipe[k] for k in ("epochs", "size", "bs", "lr", "opt", "schedule", "label_smoothing", "wd", "precision")}
    mix = "" if recipe["mix"] == "none" else recipe["mix"]
    values["spec"] = spec | kept | dict(data=spec["data"]["path"], recipe=recipe["name"], mix=mix)
    return {k: v for k, v in values.items() if k not in ("metrics", "primary")} | result.metrics


def test_a_run_of_an_earlier_version_reads_reports_and_opens(finished, tmp_path):
    import shutil
    new = finished[0]
    folder = tmp_path / "digits-concat-1-0123456789"
    shutil.copytree(new.folder, folder)
    (folder / "result.json").write_text(json.dumps(flat(new)))
    old = load_run(folder)
    assert old.spec.recipe == new.spec.recipe and old.metrics == new.metrics and old.value == new.value and old.spec.data.fingerprint == ""
    assert len(old.history()) == 1
    write_report([old], tmp_path / "report.html")
    assert "concat" in (tmp_path / "report.html").read_text()
    learn = open_run(folder, "cpu")
    with learn.no_bar(): assert learn.validate()[1] == pytest.approx(new.value, abs=1e-6)


def test_weights_that_fit_no_longer_are_told(finished, tmp_path):
    import shutil
    folder = tmp_path / "run"
    shutil.copytree(finished[0].folder, folder)
    values = json.loads((folder / "result.json").read_text())
    values["spec"]["head"] = "avg"
    (folder / "result.json").write_text(json.dumps(values))
    with pytest.raises(BadInput, match="the weights of .* do not fit today's xeca_resnext_tiny with the head avg"): open_run(folder, "cpu")


def test_a_sweep_speaks_of_its_tasks_metric(tmp_path, monkeypatch, capsys):
    from attnpool.tasks import TASKS
    monkeypatch.setitem(TASKS.data, "toy", replace(TASKS["classify"], primary="valid_loss", look=lambda learn: ({}, {})))
    result, = sweep([make_spec(task="toy", **SMALL)], tmp_path, "cpu")
    said = capsys.readouterr().out
    assert result.primary == "valid_loss" and result.value == result.metrics["valid_loss"] and "maps.npz" not in result.files
    assert "accuracy" not in said and f"valid_loss {result.value:.4g}" in said


@pytest.mark.parametrize("words", ["--heads lerned", "--recipe blogg", "--seeds one", "--arch resnet500", "--opt adamm", "--options num_head=2"])
def test_a_mistake_is_told_before_the_data_are_read(words, monkeypatch):
    import attnpool.runs.spec as spec
    monkeypatch.setattr(spec, "identify", lambda data: pytest.fail("the data were read"))
    with pytest.raises(SystemExit, match="^2$"): main(["bench", "imagenette", *words.split()])


def test_options_reach_the_heads_that_have_them(monkeypatch):
    import attnpool.runs.sweep as train
    asked = []
    monkeypatch.setattr(train, "sweep", lambda specs, *args: asked.extend(specs) or [])
    with pytest.raises(SystemExit): main(["bench", "digits", "--heads", "avg,learned", "--seeds", "1", "--options", "num_heads=2,ffn_expand=3", "--device", "cpu"])
    assert [dict(s.options) for s in asked] == [{}, {"num_heads": 2}]   # ffn_expand stands at its default


def test_a_run_of_a_newer_version_is_not_overwritten(finished, tmp_path):
    import shutil
    folder = tmp_path / finished[0].folder.name
    shutil.copytree(finished[0].folder, folder)
    values = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(values | dict(spec=values["spec"] | dict(views=1))))
    for make in (lambda: sweep([make_spec(head="concat", **SMALL)], tmp_path, "cpu"), lambda: run(make_spec(head="concat", **SMALL), tmp_path, "cpu")):
        with pytest.raises(BadInput, match="spec: this version knows no views. The run was made by a newer one"): make()
    assert (folder / "weights.safetensors").exists()
