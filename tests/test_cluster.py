"A grid of runs as jobs: real processes by submitit's local executor, and a real Slurm where one answers."
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from inspect import signature
from io import StringIO
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from rich.console import Console

from attnpool.models.surgery import body_of
from attnpool.runs.cluster import queued, RunJob, submit
from attnpool.runs.spec import make_spec
from attnpool.runs.store import load_run

psutil, submitit = pytest.importorskip("psutil"), pytest.importorskip("submitit")
ROOT = Path(__file__).parent.parent
SMALL = dict(epochs=1, size=20, bs=128)


@pytest.fixture(autouse=True)
def jobs_import_this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def until(f, seconds=200):
    "Wait for something to be true."
    end = time.monotonic() + seconds
    while not (value := f()):
        assert time.monotonic() < end
        time.sleep(.1)
    return value


def submit_elsewhere(specs, out, call):
    "A submitter in a process of its own, to be killed."
    code = f"""from attnpool.models.surgery import body_of
from attnpool.runs.cluster import submit
from attnpool.runs.spec import read_spec
submit([read_spec(s) for s in {[s.to_json() for s in specs]!r}], {str(out)!r}, {call})"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def too_small(spec): return replace(spec, recipe=replace(spec.recipe, size=10))


def book(out): return json.loads((out / ".jobs/jobs.json").read_text()) if (out / ".jobs/jobs.json").exists() else {}


def logs(out): return "\n".join(f.read_text() for f in sorted((out / ".jobs").glob("*/*_log.*")))


def test_a_killed_submitter_and_a_preempted_job(tmp_path):
    specs = [make_spec(head=head, **SMALL) for head in ("avg", "slim")]
    submitter = submit_elsewhere(specs, tmp_path, "cluster='local', array_parallelism=2")
    until(lambda: len(book(tmp_path)) == 2 and len(set(queued("local")) & {tuple(v) for v in book(tmp_path).values()}) == 2)
    submitter.send_signal(signal.SIGKILL)
    submitter.wait()
    before = book(tmp_path)
    until(lambda: (tmp_path / specs[0].name / "spec.json").exists())   # its job is at work
    batch = before[specs[0].name][0]
    task = next(p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] and "submitit.core._submit" in p.info["cmdline"] and batch in p.info["cmdline"][-1])
    task.send_signal(signal.SIGUSR2)   # what Slurm sends before it takes a machine away
    shown = StringIO()
    results = submit([*specs, specs[0]], tmp_path, "local", array_parallelism=2, console=Console(file=shown, width=200))
    assert [r.status for r in results] == ["complete"] * 3 and results[0].spec == specs[0]
    assert book(tmp_path) == before   # nothing was submitted again
    assert "2 of 2 runs complete" in shown.getvalue()
    text = logs(tmp_path)
    assert text.count("Requeued job") == 1 and text.count("Starting with") == 3 and text.count("Job completed successfully") == 2
    assert not set(queued("local")) & {tuple(v) for v in before.values()}


def test_a_failing_job_is_named_with_its_log_and_the_others_are_made(tmp_path):
    good = make_spec(head="avg", **SMALL)
    bad = too_small(good)
    shown = StringIO()
    with pytest.raises(RuntimeError, match=f"1 of 2 runs failed: {bad.name}"):
        submit([bad, good], tmp_path, "local", array_parallelism=2, console=Console(file=shown, width=200))
    assert f"{bad.name} failed." in shown.getvalue() and "BadInput: size: a canvas needs at least 20 pixels, got 10" in shown.getvalue()
    assert load_run(tmp_path / good.name).status == "complete"
    made = book(tmp_path)
    assert len(submit([good], tmp_path, "local")) == 1 and book(tmp_path) == made


def test_a_head_that_cannot_take_the_map_is_named_and_tried_again(tmp_path):
    torch.save(body_of("xeca_resnext_tiny").model.state_dict(), tmp_path / "body.pth")
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8): Image.new("RGB", (32, 32), (i, 9 * i, 50)).save(tmp_path / f"photos/{name}/{i}.png")
    spec = make_spec(str(tmp_path / "photos"), "learned", 1, "xeca_resnext_tiny", "probe", start=str(tmp_path / "body.pth"),
                     options=dict(num_heads=7), epochs=1, size=32, bs=4)
    made = []
    for _ in range(2):
        said = StringIO()
        result, = submit([spec], tmp_path / "runs", "local", console=Console(file=said, width=400))
        assert result.status == "failed" and f"{spec.name}: failed: num_heads" in said.getvalue() and "0 of 1 runs complete, 1 failed" in said.getvalue()
        made.append((result.folder / "result.json").stat().st_mtime_ns)
    assert made[0] < made[1]


def test_the_same_place_is_not_used_by_two_submitters(tmp_path):
    (tmp_path / ".jobs").mkdir()
    with FileLock(tmp_path / ".jobs/.lock"), pytest.raises(ValueError, match="out: another process submits jobs"):
        submit([make_spec(**SMALL)], tmp_path, "local")


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cluster: expected 'slurm' or 'local', got 'lsf'"): submit([], tmp_path, "lsf")
    with pytest.raises(ValueError, match="timeout_min: expected at least 1 minute, got 0"): submit([], tmp_path, "local", timeout_min=0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no sbatch here. Submit from a machine of the Slurm cluster"): submit([], tmp_path, "slurm")


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    "Commands with Slurm's names, which note what they get."
    def command(name, text):
        (bin / name).write_text("#!/bin/sh\n" + text)
        (bin / name).chmod(0o755)
    (bin := tmp_path / "bin").mkdir()
    command("srun", "")
    command("sbatch", f"cat $1 > {bin}/batch; echo Submitted batch job 7")
    command("squeue", f"cat {bin}/queue")
    (bin / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return bin, command


def test_what_slurm_is_told(tmp_path, fake_slurm):
    bin, command = fake_slurm
    specs = [make_spec(head=head, **SMALL) for head in ("avg", "slim", "concat")]
    assert submit(specs, tmp_path, "slurm", partition="gpu", gpus=2, cpus=8, timeout_min=90, array_parallelism=2, wait=False, slurm_account="me") == []
    batch = (bin / "batch").read_text()
    name = book(tmp_path)[specs[0].name][0]
    for flag in (f"job-name={name}", "array=0-2%2", "partition=gpu", "gpus-per-node=2", "ntasks-per-node=2", "cpus-per-task=8", "time=90", "account=me"):
        assert f"#SBATCH --{flag}" in batch, flag
    assert [book(tmp_path)[s.name] for s in specs] == [[name, i] for i in range(3)]
    # two of them are in the queue: only the third is submitted again
    (bin / "queue").write_text(f"{name} 0 RUNNING\n{name} 1 PENDING\nother N/A RUNNING\n")
    assert queued("slurm") == {(name, 0): "RUNNING", (name, 1): "PENDING"}
    submit(specs, tmp_path, "slurm", wait=False)
    assert [book(tmp_path)[s.name][0] == name for s in specs] == [True, True, False] and "array=" not in (bin / "batch").read_text()
    command("sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    (bin / "queue").write_text("")
    with pytest.raises(ValueError, match="cluster: Slurm refuses the jobs: .*invalid partition specified: gpuu"):
        submit(specs, tmp_path, "slurm", partition="gpuu", wait=False)


def test_the_help_says_how_many_jobs_a_run_has():
    assert signature(submit).parameters["retries"].default + 1 == 4
    for command in ("bench", "ablate"):
        done = subprocess.run([sys.executable, "-m", "attnpool.cli", command, "--help"], capture_output=True, text=True)
        assert "a run that takes longer has four in all" in " ".join(re.sub("[^ -~]", " ", done.stdout).split())


def test_a_job_comes_back_as_it_was():
    spec = make_spec(**SMALL)
    again = RunJob().checkpoint(spec, "out", "cpu")
    assert isinstance(again.function, RunJob) and again.args == (spec, "out", "cpu")


def test_the_tasks_of_a_job_share_the_run(tmp_path):
    (result,) = submit([make_spec(**SMALL)], tmp_path, "local", tasks_per_node=2)
    assert result.processes == 2 and result.spec.recipe.bs == 128


def slurm_answers():
    try: return subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=20).stdout.strip() != ""
    except (OSError, subprocess.TimeoutExpired): return False


@pytest.mark.skipif(not slurm_answers(), reason="no Slurm answers here")
def test_a_grid_on_slurm(tmp_path):
    specs = [make_spec(head=head, **SMALL) for head in ("avg", "slim")]
    bad = too_small(specs[0])
    submitter = submit_elsewhere([*specs, bad], tmp_path, "cluster='slurm', array_parallelism=2")
    until(lambda: len(set(queued("slurm")) & {tuple(v) for v in book(tmp_path).values()}) == 3)
    submitter.send_signal(signal.SIGKILL)
    submitter.wait()
    before = book(tmp_path)
    until(lambda: (tmp_path / specs[0].name / "spec.json").exists())
    ids = subprocess.run(["squeue", "--me", "--noheader", "--array", "--format=%j %K %A %F_%K"], capture_output=True, text=True, check=True).stdout
    name, i = before[specs[0].name]
    job = re.search(rf"^{name} {i} \S+ (\S+)$", ids, re.M)[1]
    subprocess.run(["scancel", "--signal=USR2", job], check=True)   # what a preemption sends
    shown = StringIO()
    with pytest.raises(RuntimeError, match=f"1 of 3 runs failed: {bad.name}"): submit([*specs, bad], tmp_path, "slurm", console=Console(file=shown, width=200))
    assert "a canvas needs at least 20 pixels" in shown.getvalue()
    assert all(load_run(tmp_path / s.name).status == "complete" for s in specs)
    assert book(tmp_path) == before and logs(tmp_path).count("Requeued job") == 1
