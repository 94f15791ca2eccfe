"Several runs at a time: real processes that train tiny networks, are killed and interrupted, and end with whoever asked."
import io
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
import pytest
import torch
from fastai.data.external import fastai_cfg
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from attnpool.cli import main
from attnpool.heads import AvgPoolHead, HEADS
from attnpool.measured import cores, machine, measured_file
from attnpool.models.surgery import body_of
from attnpool.registry import BadInput
from attnpool.report.stats import remarks
from attnpool.runs.jobs import check_jobs, free_memory, how_many, question
from attnpool.runs.spec import make_spec
from attnpool.runs.store import CHECKPOINT, load_run
from attnpool.runs.sweep import sweep
from attnpool.runs.train import run
from attnpool.runs.workers import InWorker, Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="several runs at a time need Linux")
SMALL = dict(epochs=1, size=20, bs=128)
ARCH = "xeca_resnext_tiny"


@pytest.fixture
def threads():
    "Sets how many threads torch has; afterwards as many as before."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pics(tmp_path_factory):
    "Twenty-four small pictures of two classes."
    folder, rng = tmp_path_factory.mktemp("jobs") / "pics", np.random.default_rng(0)
    for name, value in dict(dark=60, light=190).items():
        (folder / name).mkdir(parents=True)
        for i in range(12): Image.fromarray((value + rng.normal(0, 60, (20, 20, 3))).clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder


def numbers(result):
    "What a run has computed, to the last digit."
    history = result.history().drop(columns=["seconds", "train_seconds"])
    return history.to_csv(), result.metrics, {k: v.numpy().tobytes() for k, v in load_file(result.folder / "weights.safetensors").items()}


def below(pid):
    "The processes below one, as the system has them now; a zombie is none."
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try: state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError: continue
        if state != "Z": parents.setdefault(int(parent), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        its = parents.get(todo.pop(), [])
        found += its
        todo += its
    return found


@pytest.fixture
def others():
    "What lives below this process before a test: other tests leave the servers of multiprocessing, which stay."
    return set(below(os.getpid()))


def alive(pids):
    def state(pid):
        try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError: return "Z"
    return [p for p in pids if state(p) != "Z"]


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, "it did not come this far"
        time.sleep(.02)
    return found


# Workers

COUNTING = """
import os, time, torch

def threads(tell): return os.getpid(), torch.get_num_threads(), torch.ones(300, 300).mm(torch.ones(300, 300)).sum().item()
def slow(tell, n):
    tell("begins", os.getpid())
    for i in range(n): time.sleep(.01)
    return n
def length(tell, text): return len(text)
def wordy(tell): print('a line\\nand', end=' more')
def harm(tell): os.kill(os.getpid(), 9)
def wrong(tell, kind):
    class Odd(Exception): pass   # cannot be sent
    raise Odd("a local one") if kind == "odd" else FileNotFoundError(2, "no such file", "photo.png")
"""


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("module")
    (folder / "counting.py").write_text(COUNTING)
    sys.path.insert(0, str(folder))
    import counting
    yield counting
    sys.path.remove(str(folder))


def test_jobs_workers_call_what_they_are_told_and_end_with_whoever_asked(counting, capsys, others):
    with Workers() as workers:
        found = workers.together(3, 2, counting.threads)
        assert len({pid for pid, *_ in found} | {os.getpid()}) == 4 and {t for _, t, _ in found} == {2}   # two threads in a copied process
        assert {total for *_, total in found} == {300**3}
        again = workers.together(2, 1, counting.threads)
        assert [pid for pid, *_ in again] == [pid for pid, *_ in found[:2]] and {t for _, t, _ in again} == {1}   # not made anew

        workers.together(1, 1, counting.wordy)
        assert capsys.readouterr().out == "a line\nand more\n"   # all of it, in whole lines

        with pytest.raises(FileNotFoundError) as e: workers.together(1, 1, counting.wrong, "file")
        assert e.value.filename == "photo.png" and e.value.strerror == "no such file"
        assert isinstance(e.value.__cause__, InWorker) and "in wrong" in str(e.value.__cause__)   # where it was raised
        with pytest.raises(RuntimeError, match="Odd: a local one"): workers.together(1, 1, counting.wrong, "odd")

        first, second, *_ = lines = workers.grow(3)
        for line, n in zip(lines, (10**6, 3)): workers.ask(line, 1, counting.slow, n)
        told = []
        while len(told) < 3: told += workers.heard()
        pid = next(values[0] for line, _, word, *values in told if (line, word) == (first, "begins"))
        assert [(args, word, *values) for line, args, word, *values in told if line is second][-1] == ((3,), "done", 3)
        os.kill(pid, signal.SIGKILL)
        assert [(line, args, word) for line, args, word in workers.heard(10)] == [(first, (10**6,), "gone")]
        assert len(workers.grow(3)) == 3 and first not in workers.lines   # another in its place
        there = set(below(os.getpid())) - others
        assert workers.together(3, 1, counting.slow, 1) == [1, 1, 1]
        workers.ask(workers.lines[0], 1, counting.slow, 10**6)   # in the middle of something
    wait_for(lambda: not alive(there), 10)


LAUNCHED = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGCHLD, signal.SIG_IGN)   # as some launchers leave it to what they begin
sys.path.insert(0, Path('.'))   # Python looks at text only
import counting
from attnpool.runs.workers import Workers
with Workers() as workers:
    print([workers.together(n, 1, counting.length, 'four') for n in (1, 3)])
    lines = workers.grow(3)
    for line in lines: line.close()
    workers.lines.clear()
    workers.server.process.kill()
    workers.server.process.wait()
    print(workers.together(2, 1, counting.length, 'again'))
    try: workers.together(2, 1, counting.harm)
    except ValueError as e: print(e)
"""


def test_jobs_workers_wherever_they_are_begun_and_when_what_makes_them_is_killed(counting, tmp_path):
    (tmp_path / "script.py").write_text(LAUNCHED)
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(counting.__file__).parent), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.splitlines() == ["[[4], [4, 4, 4]]", "[5, 5]", "jobs: a process was killed, perhaps as the memory was full. Try --jobs 1, or a smaller --bs."], done.stderr


# Numbers

def test_jobs_have_the_numbers_that_a_run_has_alone_with_as_many_threads(pics, tmp_path, threads):
    specs = [make_spec(str(pics), head, seed, epochs=2, size=16, bs=8) for seed in (1, 2) for head in ("avg", "concat")]
    threads(2)
    out = io.StringIO()
    made = sweep(specs[:3], tmp_path / "two", "cpu", Console(file=out, force_terminal=True, width=100), jobs=2)
    said = out.getvalue()
    assert "2 runs at a time, with 1 thread each." in said and [r.spec for r in made] == specs[:3] and {r.threads for r in made} == {1}
    assert said.count("epochs") > 3 and all(re.search(rf"run {i}/3  \w+ seed \d: accuracy", said) for i in (1, 2, 3))
    one, = sweep(specs[:3] + specs[3:], tmp_path / "two", "cpu", Console(file=(last := io.StringIO())), jobs=2)[3:]   # one is left: here, and no less
    assert torch.get_num_threads() == 2 and one.threads == 1 and "at a time" not in last.getvalue() and "3 of 4 runs are in" in last.getvalue()
    threads(1)
    for r in (*made, one): assert numbers(run(r.spec, tmp_path / "alone", "cpu")) == numbers(r)
    assert not any("threads" in text for text in remarks([*made, one]))
    assert any("made with 1 and 4 threads" in text for text in remarks([*made, replace(one, threads=4)]))


def test_jobs_of_a_probe_share_the_maps(pics, tmp_path, monkeypatch, threads, capsys):
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    fastai_cfg.cache_clear()
    torch.manual_seed(0)
    save_file(body_of(ARCH).model.state_dict(), tmp_path / "body.safetensors")
    specs = [make_spec(str(pics), head, seed, ARCH, "probe", size=16, bs=8, epochs=4, split="seed", start=str(tmp_path / "body.safetensors"))
             for seed in (1, 2) for head in ("avg", "concat")]
    threads(2)
    made = sweep(specs, tmp_path / "two", "cpu", jobs=2)
    assert capsys.readouterr().out.count("maps of the body  24/24 pictures") == 1
    maps, = (tmp_path / "home").rglob("maps-*/maps.npy")
    assert all(maps.stat().st_mtime_ns < (r.folder / "spec.json").stat().st_mtime_ns for r in made)   # once, before all runs
    threads(1)
    for r, alone in zip(made, sweep(specs, tmp_path / "alone", "cpu", jobs=1)): assert numbers(r) == numbers(alone) and r.found == alone.found
    fastai_cfg.cache_clear()


# What ends a sweep, or one of its processes

OWN = """
import os, signal, time
from pathlib import Path
from attnpool.heads import AvgPoolHead

class Head(AvgPoolHead):
    "Average pooling that is no good in another process than that of the test."
    def forward(self, x):
        if self.training and os.getpid() != int(os.environ['TEST_PID']): self.harm()
        return super().forward(x)

class Once(Head):
    def harm(self):
        done = Path(os.environ['TEST_FLAG'])
        if any(done.parent.glob('runs/*Once*/checkpoint.safetensors')) and not done.exists():   # after an epoch
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)

class Always(Head):
    def harm(self):
        while not any(Path('runs').glob('*Once*/result.json')): time.sleep(.05)   # the other run is to end
        os.kill(os.getpid(), signal.SIGKILL)

class Full(Head):
    def harm(self): raise OSError(28, 'No space left on device')
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A folder with heads in which something happens, as the working folder."
    (tmp_path / "own_heads.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_PID", str(os.getpid()))
    monkeypatch.setenv("TEST_FLAG", str(tmp_path / "killed"))
    yield tmp_path
    sys.modules.pop("own_heads", None)


def test_jobs_a_run_whose_process_is_killed_goes_on_in_another_at_most_twice(own, pics, threads, capsys, others):
    threads(2)
    once, always = (make_spec(str(pics), f"own_heads:{name}", epochs=2, size=16, bs=8, lr=1e-3) for name in ("Once", "Always"))
    with pytest.raises(BadInput, match=r"jobs: the process of run 2/2  own_heads:Always\S* seed 1 was killed 3 times.*--jobs 1"):
        sweep([once, always], "runs", "cpu", checkpoint_seconds=0, jobs=2)
    said = capsys.readouterr().out
    assert said.count("its process was killed. It goes on in another.") == 3 and re.search(r"own_heads:Once\S* seed 1: goes on after epoch 1", said)
    assert not set(below(os.getpid())) - others
    threads(1)
    assert numbers(run(once, "runs", "cpu")) == numbers(run(once, "alone", "cpu"))   # as if nothing had happened


def test_jobs_an_error_of_a_run_is_that_error(own, pics, threads, capsys, others):
    threads(2)
    specs = [make_spec(str(pics), head, epochs=1, size=16, bs=8, lr=1e-3) for head in ("own_heads:Full", "avg")]
    with pytest.raises(OSError, match="No space left") as e: sweep(specs, "runs", "cpu", jobs=2)
    assert e.value.errno == 28 and "own_heads.py" in str(e.value.__cause__)
    words = f"bench {pics} --heads own_heads:Full,avg --seeds 1 --epochs 1 --size 16 --bs 8 --lr 1e-3 --device cpu --out runs --jobs 2".split()
    capsys.readouterr()
    with pytest.raises(SystemExit) as end: main(words)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnpool")]
    assert end.value.code == 2 and err == ["attnpool: [Errno 28] No space left on device"]
    assert not set(below(os.getpid())) - others


def test_jobs_a_head_that_only_this_process_knows_is_trained_in_it(pics, tmp_path, threads, monkeypatch, capsys):
    monkeypatch.setitem(HEADS, "justnow", AvgPoolHead)
    threads(2)
    specs = [make_spec(str(pics), head, epochs=1, size=16, bs=8, lr=1e-3) for head in ("justnow", "avg")]
    made = sweep(specs, tmp_path, "cpu", jobs=2)
    assert [r.status for r in made] == ["complete"] * 2 and {r.threads for r in made} == {2}
    assert "Known in this process only, so one run at a time: head: 'justnow' is unknown" in capsys.readouterr().out


SCRIPT = """
from attnpool.runs.spec import make_spec
from attnpool.runs.sweep import sweep
sweep([make_spec({pics!r}, "avg", seed, epochs=40, size=16, bs=8) for seed in (1, 2, 3)], "runs", "cpu", checkpoint_seconds=0, jobs=2)
"""   # no __main__ in it


def test_jobs_end_with_the_process_that_was_killed_or_interrupted_and_the_same_command_goes_on(pics, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(pics=str(pics)))
    specs = [make_spec(str(pics), "avg", seed, epochs=40, size=16, bs=8) for seed in (1, 2, 3)]
    folders = [tmp_path / "runs" / s.name for s in specs]
    def heed(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # what runs in the background of a shell ignores it, and hands that down
    def start(*words): return subprocess.Popen([sys.executable, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    def both(after):   # two runs at a time are in the middle of their epochs
        def checkpoints(): return [f / CHECKPOINT for f in folders if (f / CHECKPOINT).exists() and (f / CHECKPOINT).stat().st_mtime > after]
        wait_for(lambda: process.poll() is not None or len(checkpoints()) == 2)
        assert process.poll() is None, process.communicate()
        assert len(there := below(process.pid)) == 3   # what makes workers, and they
        return there

    began, process = time.time(), start("script.py")
    there = both(began)
    process.kill()
    wait_for(lambda: not alive(there), 10)
    process.communicate()

    command = ["-m", "attnpool.cli", "bench", str(pics), *"--heads avg --seeds 1,2,3 --epochs 40 --size 16 --bs 8 --device cpu --out runs --checkpoint-seconds 0 --jobs 2".split()]
    began, process = time.time(), start(*command)
    there = both(began)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.strip().splitlines()[-1] == "attnpool: stopped. What is done is kept in runs; the same command goes on."
    assert not alive(there) and len(re.findall("seed [123]: goes on after epoch", out)) >= 2 and "Traceback" not in err

    with pytest.raises(ValueError): load_run(folders[-1])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = sweep(specs, tmp_path / "runs", "cpu", Console(quiet=True), jobs=1)
        assert numbers(made[0]) == numbers(run(specs[0], tmp_path / "alone", "cpu"))   # killed once and interrupted once
    finally: torch.set_num_threads(before)


# How many

def answer(spec, **values):
    "Put an answer where the machine's are kept."
    file, where = measured_file(), f"{machine('cpu')}, {cores()} cores"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept.setdefault(where, {})[question(spec, 2)] = values
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize("case, n, gain, mb, pictures, jobs", [
    ("two end sooner", 4, 1.3, 100, 1e5, 2), ("three runs take as long as four", 3, 1.3, 100, 1e5, 1), ("unless two gain more", 3, 1.5, 100, 1e5, 2),
    ("nothing is gained", 4, 1., 100, 1e5, 1), ("memory for only one", 4, 1.9, 1e9, 1e5, 1), ("done sooner than workers begin", 4, 1.9, 100, 100, 1)])
def test_jobs_as_many_as_end_first(case, n, gain, mb, pictures, jobs, threads):
    threads(2)
    bs = 60 + len(case)   # a question of its own
    specs = [make_spec(head="avg", seed=seed, epochs=20, size=40, bs=bs) for seed in range(n)]
    answer(specs[0], rates=[[1, 1000.], [2, 1000. * gain]], mb=mb, pictures=pictures)
    with Workers() as workers:
        assert how_many(specs, torch.device("cpu"), workers) == jobs
        assert workers.server is None   # the answer was there


def test_jobs_are_measured_once(threads, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNPOOL_CACHE", str(tmp_path))
    threads(2)
    specs = [make_spec(head="avg", seed=seed, epochs=20, size=24, bs=32) for seed in range(8)]
    with Workers() as workers: first = how_many(specs, torch.device("cpu"), workers)
    kept, = json.loads((tmp_path / "measured.json").read_text()).values()
    (asked, found), = kept.items()
    assert first in (1, 2) and "xeca_resnext_tiny" in asked and [n for n, _ in found["rates"]] == [1, 2] and found["pictures"] == 1500
    assert all(rate > 10 for _, rate in found["rates"]) and 20 < found["mb"] < 4000
    with Workers() as workers: assert (how_many(specs, torch.device("cpu"), workers), workers.server) == (first, None)
    few = [replace(s, recipe=replace(s.recipe, epochs=1)) for s in specs[:2]]
    monkeypatch.setenv("ATTNPOOL_MEASURED", "0")
    with Workers() as workers:   # little to do; nothing is to be kept; one thread
        assert [how_many(its, torch.device("cpu"), workers) for its in (few, specs)] == [1, 1]
        monkeypatch.delenv("ATTNPOOL_MEASURED")
        threads(1)
        assert how_many(specs, torch.device("cpu"), workers) == 1 and workers.server is None
    wrong = [replace(s, recipe=replace(s.recipe, bs=5000)) for s in specs]   # the run itself tells what is wrong
    threads(2)
    with Workers() as workers: assert how_many(wrong, torch.device("cpu"), workers) == 1


def test_jobs_memory_and_mistakes(tmp_path, monkeypatch, capsys):
    total = next(int(line.split()[1]) / 1024 for line in Path("/proc/meminfo").open() if line.startswith("MemTotal"))
    assert 0 < free_memory(torch.device("cpu")) < total
    for jobs, words in ((0, "got 0"), (2.5, "got 2.5"), (True, "got True"), ("2", "got '2'")):
        with pytest.raises(BadInput, match=f"^jobs: expected .*{words}"): sweep([make_spec(head="avg", **SMALL)], tmp_path, jobs=jobs)
    with pytest.raises(BadInput, match="jobs: --array-size says"): check_jobs(2, cluster=True)
    check_jobs(None), check_jobs(1, cluster=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BadInput, match="jobs: the processes of a launcher train one run together, got 2"): check_jobs(2)
    monkeypatch.undo()
    for command in ("bench digits", "lr digits", "ablate table5 --data digits"):
        with pytest.raises(SystemExit) as end: main([*command.split(), "--jobs", "0", "--out", str(tmp_path / "no")])
        assert end.value.code == 2 and "--jobs" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_jobs_of_lr_and_ablate(pics, tmp_path, threads, capsys):
    threads(2)
    for words, n in ((f"lr {pics} --heads avg --rates 1e-3,2e-3 --seeds 0 --epochs 1 --size 16 --bs 8", 2),
                     (f"ablate B1 --data {pics} --rows lr=0.001,lr=0.002 --seeds 1 --epochs 1 --size 32 --bs 8 --arch xeca_resnext_tiny", 2)):
        out = tmp_path / words.split()[0]
        with pytest.raises(SystemExit) as end: main([*words.split(), "--device", "cpu", "--out", str(out), "--jobs", "2"])
        said = capsys.readouterr()
        assert not end.value.code, said.err
        assert "2 runs at a time, with 1 thread each." in said.out and {load_run(f.parent).threads for f in out.glob("*/result.json")} == {1}


@pytest.mark.cuda
def test_jobs_on_one_gpu(pics, tmp_path):
    specs = [make_spec(str(pics), "avg", seed, epochs=2, size=16, bs=8) for seed in (1, 2, 3)]
    made, alone = (sweep(specs, tmp_path / str(n), "cuda", Console(quiet=True), jobs=n) for n in (2, 1))
    for a, b in zip(made, alone): assert a.device.startswith("cuda") and a.metrics["train_loss"] == pytest.approx(b.metrics["train_loss"], rel=.02)
    with Workers() as workers: assert how_many(specs * 1000, torch.device("cuda"), workers) >= 1
