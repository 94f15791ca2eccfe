"Whole epochs, the blog's way against ours: what is trained, what is counted, what is written. No test decides by a time."
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.all import Transform
from fastai.vision.all import Callback, PILImage, set_seed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from attnpool.cli import main
from attnpool.cost import timing
from attnpool.cost.epochs import SETTINGS, measure_epochs, usual_settings
from attnpool.cost.parts import PARTS, Watch, watched
from attnpool.cost.pools import multiply_adds
from attnpool.cost.steps import blogs_network
from attnpool.cost.ways import WAYS, Setting, Way, epoch_of, make_photos, part_of, write_part
from attnpool.data.find import find_pictures
from attnpool.data.listing import Listing, list_csv
from attnpool.models.xresnet import ARCHS
from attnpool.registry import BadInput

SMALL = Setting("xeca_resnext_tiny", 32, 4, 8, 4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A dozen tiny pictures."
    return make_photos(tmp_path_factory.mktemp("photos"), 8, 4, side=40)


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    "Both ways, ready to train."
    listing = find_pictures(photos)
    return {name: epoch_of(WAYS["cpu"][name], listing, SMALL, tmp_path_factory.mktemp("cache")) for name in ("blog", "ours")}


def train(learn, epoch, *cbs):
    with learn.added_cbs(cbs): epoch()


class Steps(Callback):
    def __init__(self): self.n = self.validated = 0
    def after_step(self): self.n += 1
    def after_batch(self): self.validated += 0 if self.training else len(self.x)


def test_speed_of_both_ways_is_that_of_the_same_pictures(made):
    seen, steps = {}, {}
    for name, (learn, epoch) in made.items():
        files, counted = [], Steps()
        def noting(create, file, files):
            return lambda i: (files.append(file(i)), create(i))[1]
        for dl in learn.dls.loaders:
            items = dl.dataset.items
            read = dl.dataset.tls[0].tfms[0]
            file = (lambda i, items=items: items[i][0]) if name == "blog" else (lambda i, read=read, items=items: read.file(items[i]))
            dl.create_item = noting(dl.create_item, file, files)
        try: train(learn, epoch, counted)
        finally:
            for dl in learn.dls.loaders: del dl.create_item
        seen[name], steps[name] = sorted(str(f.resolve()) for f in files), (counted.n, counted.validated)
        assert len(learn.recorder.losses) == counted.n and np.isfinite(learn.recorder.losses).all()
    assert seen["blog"] == seen["ours"] and len(seen["ours"]) == 12 and steps["blog"] == steps["ours"] == (2, 4)
    labels = {name: dict(zip(learn.dls.vocab, range(2))) for name, (learn, _) in made.items()}
    assert labels["blog"] == labels["ours"] == dict(cool=0, warm=1)


def test_the_blogs_way_is_the_blogs(made):
    learn, _ = made["blog"]
    parts = [*learn.model.modules(), *learn.cbs, *learn.metrics, learn.loss_func, learn.opt_func]
    parts += [t for dl in learn.dls.loaders for p in (dl.after_item, dl.after_batch) for t in p.fs]
    modules = {getattr(o, "__module__", type(o).__module__).partition(".")[0] for o in parts}
    assert modules <= {"fastai", "fastxtend", "torch", "kornia"} and {"fastai", "fastxtend", "torch"} <= modules
    ours, _ = made["ours"]
    assert [m.name for m in learn.metrics] == ["accuracy"] and len(ours.metrics) == 4
    assert type(learn.loss_func) is type(ours.loss_func) and learn.loss_func.eps == ours.loss_func.eps == .1
    assert (learn.lr, ours.recipe.lr, ours.recipe.opt, ours.recipe.schedule) == (8e-3, 8e-3, "ranger", "flat_cos")
    assert ours.dls.about["augment"] == "blog"


@pytest.mark.parametrize("arch", ["xeca_resnext_tiny", "xeca_resnext50s"])
def test_both_networks_compute_the_same(arch):
    theirs, ours = blogs_network(arch, 3), ARCHS[arch](3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    a, b = theirs(x), ours(x)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    grads = [torch.autograd.grad(o.square().sum(), [p for p in m.parameters() if p.ndim > 1][:1])[0] for o, m in ((a, theirs), (b, ours))]
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-3 * grads[0].abs().max().item())
    with pytest.raises(BadInput, match="arch: 'xresnext' is unknown"): blogs_network("xresnext")


# Where the time goes

def test_a_watch_counts_for_one_part_at_a_time():
    watch, start = Watch(), time.perf_counter()
    def fails():
        time.sleep(.01)
        raise KeyError
    inner = watch.timed("decode", lambda: time.sleep(.02))
    outer = watch.timed("item transforms", lambda: (time.sleep(.01), inner(), 7)[-1])
    assert outer() == 7
    with pytest.raises(KeyError): watch.timed("step", fails)()
    watch.turn("the rest")
    took, s = time.perf_counter() - start, watch.seconds
    assert tuple(s) == PARTS and sum(s.values()) == pytest.approx(took, abs=2e-3)
    assert s["decode"] >= .02 and s["item transforms"] >= .01 and s["step"] >= .01 and watch.part == "the rest"


class Slow(Transform):
    "Before all others of its pipeline."
    order = -100
    def encodes(self, x: PILImage | torch.Tensor):
        time.sleep(.01)
        return x


def test_parts_of_an_epoch_are_told_apart_and_everything_is_put_back(photos, tmp_path):
    learn, epoch = epoch_of(WAYS["cpu"]["ours"], find_pictures(photos), SMALL, tmp_path)
    train(learn, epoch)
    class SlowSteps(Callback):
        def after_pred(self): time.sleep(.03)        # forward, or validation: two batches and one
        def after_backward(self): time.sleep(.05)    # of the callbacks: the rest
    accumulate, cbs, metrics = learn.metrics[0].accumulate, [type(cb) for cb in learn.cbs], list(learn.metrics)
    learn.metrics[0].accumulate = lambda l: (time.sleep(.04), accumulate(l))
    for dl in learn.dls.loaders:
        dl.after_item.add(Slow())    # of twelve pictures
        dl.after_batch.add(Slow())   # of three batches, two tensors each
    before = [(dl.after_item, dl.after_batch, dl.fake_l.num_workers) for dl in learn.dls.loaders]
    start = time.perf_counter()
    with learn.added_cbs([SlowSteps()]), watched(learn) as watch: epoch()
    took, s = time.perf_counter() - start, watch.seconds
    assert sum(s.values()) == pytest.approx(took, abs=5e-3) and all(v > 0 for v in s.values())
    assert s["item transforms"] >= .12 and s["batch transforms"] >= .03 and s["forward"] >= .06 and s["validation"] >= .03
    assert s["metrics"] >= .04 and s["the rest"] >= .1 and s["decode"] < .12
    assert before == [(dl.after_item, dl.after_batch, dl.fake_l.num_workers) for dl in learn.dls.loaders]
    assert not any("create_item" in vars(dl) for dl in learn.dls.loaders) and [type(cb) for cb in learn.cbs] == cbs and list(learn.metrics) == metrics


def test_what_is_watched_trains_as_before(photos, tmp_path):
    weights = []
    for i in range(2):
        set_seed(0)
        learn, epoch = epoch_of(WAYS["cpu"]["ours"], find_pictures(photos), SMALL, tmp_path / str(i))
        before = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
        if i:
            with watched(learn): epoch()
        else: epoch()
        weights.append((before, torch.cat([p.detach().flatten() for p in learn.model.parameters()]), learn.recorder.values))
    assert torch.equal(weights[0][0], weights[1][0]) and torch.equal(weights[0][1], weights[1][1]) and weights[0][2] == weights[1][2]
    assert not torch.equal(*weights[0][:2])


def test_a_compiled_way_trains(photos, tmp_path, monkeypatch):
    "In groups of layers, which a compiled network has no more; without the minutes of a compiler."
    def compiled(self): self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    learn, epoch = epoch_of(Way("bf16", compiled=True), find_pictures(photos), SMALL, tmp_path)
    epoch()
    assert learn.model._compiled_call_impl and len(learn.opt.param_groups) == 2 and np.isfinite(learn.recorder.losses).all()


# The pictures

@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.integers(0, 12), st.integers(1, 40), st.integers(1, 15))
def test_a_part_is_spread_over_the_classes(counts, valid, n_train, n_valid):
    train = [str(c) for c, n in enumerate(counts) for _ in range(n)]
    val = [str(i % len(counts)) for i in range(valid + 1)]
    val.sort()
    whole = Listing("x", ".", [f"{i}.jpg" for i in range(len(train + val))], train + val, len(train))
    try: part = part_of(whole, n_train, n_valid)
    except BadInput as e:   # one class, or nothing to validate on
        assert n_train < len(train) and re.search("one class|no validation", str(e))
        return
    assert part.n_train == min(n_train, len(train)) and 1 <= len(part.files) - part.n_train <= n_valid
    assert set(part.labels[part.n_train:]) <= set(part.labels[:part.n_train])
    for c, n in enumerate(counts): assert abs(part.labels[:part.n_train].count(str(c)) - part.n_train * n / len(train)) <= 2
    assert part_of(whole).files == whole.files


def test_a_part_as_a_table(photos, tmp_path):
    listing = part_of(find_pictures(photos), 6, 2)
    again = list_csv(write_part(listing, tmp_path / "below" / "part.csv"))
    assert [again.root / f for f in again.files] == [(listing.root / f).resolve() for f in listing.files]
    assert (again.labels, again.n_train) == (listing.labels, 6) and len(again.files) == 8


def test_pictures_that_are_made(tmp_path):
    files = sorted(make_photos(tmp_path, 4, 2, side=120).rglob("*.jpg"))
    assert [str(f.relative_to(tmp_path)) for f in files] == ["train/cool/0.jpg", "train/cool/2.jpg", "train/warm/1.jpg", "train/warm/3.jpg", "val/cool/0.jpg", "val/warm/1.jpg"]
    for f in files:
        with Image.open(f) as im: assert im.size == (160, 120) and im.format == "JPEG"
        assert .1 < f.stat().st_size / (160 * 120) < .7
    assert files[0].read_bytes() != files[4].read_bytes()


# The table

def test_speed_epochs_ends_with_its_files(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SETTINGS, ("cpu", True), ((SMALL,), 2))
    with pytest.raises(SystemExit) as e: main(["speed", "--epochs", "--quick", str(photos), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith(timing.machine()) and max(map(len, out.splitlines()[1:-1])) <= 80
    assert "xeca_resnext_tiny at 32 px, 8 pictures that train, 4 that validate" in out and re.search(r"2/2  blog \S+ s, ours \S+ s, ours, bf16", out)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["epochs.csv", "epochs.png"]
    table = pd.read_csv(tmp_path / "out" / "epochs.csv", comment="#")
    assert list(table.way) == list(WAYS["cpu"]) and (table.train == 8).all() and (table.valid == 4).all() and (table.batch == 4).all()
    assert table[list(PARTS)].sum(1).to_numpy() == pytest.approx(np.ones(3)) and (table[list(PARTS)] > 0).all(axis=None)
    assert (table.filter(regex="ratio").iloc[0] == 1).all() and (table.ratio_low <= table.ratio).all() and (table.ratio <= table.ratio_high).all()
    macs = multiply_adds(ARCHS["xeca_resnext_tiny"](2), (3, 32, 32))
    assert (table.peak_share * table.peak / table.step_rate).to_numpy() == pytest.approx([3 * macs] * 3)
    assert (table.pictures_per_second * table.seconds).to_numpy() == pytest.approx([8] * 3) and (table.once > 0).all()
    for part in PARTS: assert len(re.findall(rf"^{part} ", out, re.M)) == 1


def test_broken_pictures_are_left_out(photos, tmp_path):
    for f in photos.rglob("*.jpg"):
        (copy := tmp_path / f.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(f.read_bytes() if f.name != "3.jpg" else b"no picture")
    lines = []
    table = measure_epochs(tmp_path, [SMALL], 1, progress=lines.append, together=True)
    assert lines[0].endswith("7 pictures that train, 3 that validate; 2 broken or missing, left out") and (table.train == 4).all()   # a whole batch


def test_epochs_speed_of_each_device():
    for (kind, quick), (settings, rounds) in SETTINGS.items():
        assert usual_settings(kind, quick) == (settings, rounds) and rounds >= 2
        assert {s.arch for s in settings} <= set(ARCHS) and (kind == "cpu" or {s.bs for s in settings} == {64})   # the blog's
    assert usual_settings("cuda:1") == SETTINGS["cuda", False] and [s.size for s in SETTINGS["cuda", False][0]] == [128, 224]
    assert {(s.arch, s.size) for s in SETTINGS["cpu", False][0]} == {("xeca_resnext_tiny", 64), ("xeca_resnext50s", 128)}
    with pytest.raises(BadInput, match="device: epochs are measured on cpu or cuda, got mps"): usual_settings("mps")


@pytest.mark.parametrize("words, message", [
    (["--epochs", "{}/nowhere"], "data: there is no file or folder"), (["--epochs", "digits"], "data: 'digits' is a data set without files"),
    (["{}"], "data: only --epochs reads pictures"), (["--epochs", "--steps"], "--figures, --growth, --steps, --epochs and --dispatch are measured one at a time"),
    (["--epochs", "{}/train/cool"], "data:.*"), (["--epochs", "--device", "mps"], "--device: 'mps' is not available here"),
])
def test_mistakes_at_speed_epochs(photos, tmp_path, words, message, capsys):
    with pytest.raises(SystemExit) as e: main(["speed", *(w.format(photos) for w in words), "--out", str(tmp_path)])
    assert e.value.code == 2 and re.match(f"attnpool: {message}", err := capsys.readouterr().err) and err.count("\n") == 1


# Its processes

SCRIPT = """
from multiprocessing import active_children
from attnpool.cli import main
from attnpool.cost import epochs
from attnpool.cost.ways import Setting
from attnpool.registry import BadInput

def killing(line):
    if line.startswith("1/"): active_children()[0].kill()   # as the system ends a process where the memory is full

if __name__ == "__main__":
    setting = Setting("xeca_resnext_tiny", 32, 4, 8, 4)
    try: epochs.measure_epochs(PHOTOS, [setting], progress=killing)
    except BadInput as e: print(e, flush=True)
    epochs.SETTINGS["cpu", True] = (setting,), 10**6
    main(["speed", "--epochs", "--quick", PHOTOS, "--out", OUT])
"""


def test_speed_epochs_in_a_script_says_how_processes_begin(photos, tmp_path):
    (tmp_path / "script.py").write_text(f"""from attnpool.cost.epochs import measure_epochs
from attnpool.cost.ways import Setting
measure_epochs({str(photos)!r}, [Setting("xeca_resnext_tiny", 32, 4, 8, 4)])""")
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 1 and "BadInput: together: no process could begin. In a script, call below if __name__ ==" in done.stderr, done.stderr[-2000:]


def processes_of(group):
    "Those that are alive in a group of processes."
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, its = (path / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its) == group and state != "Z": found.append(int(path.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signal, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_process_of_speed_epochs_is_left(photos, tmp_path, signal, status):
    (tmp_path / "script.py").write_text(SCRIPT.replace("PHOTOS", repr(str(photos))).replace("OUT", repr(str(tmp_path / "out"))))
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    with open(tmp_path / "err", "w") as err:
        run = subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=err, text=True, env=env, start_new_session=True)
    assert run.stdout.readline().startswith("quick: a process was ended from outside")
    assert any(line.startswith("2/") for line in run.stdout)
    assert len(processes_of(run.pid)) >= 4
    if status == 130: os.killpg(run.pid, signal)   # as a terminal does
    else: run.kill()
    run.communicate(timeout=200)
    until = time.monotonic() + 20
    while processes_of(run.pid) and time.monotonic() < until: time.sleep(.1)
    assert not processes_of(run.pid) and run.returncode == status
    assert "Traceback" not in (said := (tmp_path / "err").read_text()), said
