"What a machine is asked once: kept whole, per machine, and no error where nothing can be kept."
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from attnpool import measured as room
from attnpool.data.pictures import loading_on
from attnpool.measured import cores, machine, measured, measured_file, share_cores
from attnpool.runs.workers import Workers

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    "A cache and a memory of its own for each test."
    monkeypatch.setenv("ATTNPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "_asked", {})
    return tmp_path / "cache/measured.json"


def again(monkeypatch): monkeypatch.setattr(room, "_asked", {})   # as another process that reads the file
def never(): raise AssertionError("measured again")


def test_measured_once_and_kept(fresh, monkeypatch):
    assert measured("runs side by side", lambda: dict(best=(2, 1.5), words="ä")) == dict(best=[2, 1.5], words="ä")
    again(monkeypatch)
    assert measured("runs side by side", never) == dict(best=[2, 1.5], words="ä")
    assert measured("another", lambda: None) is None and measured("another", never) is None
    kept = json.loads(fresh.read_text())
    assert list(kept) == [f"{machine()}, {cores()} cores"] and list(kept.popitem()[1]) == ["runs side by side", "another"]
    assert [f.name for f in fresh.parent.iterdir()] == ["measured.json"]   # nothing half-written beside it


def test_an_answer_stays_for_the_process(fresh):
    measured("q", lambda: 1)
    fresh.write_text(fresh.read_text().replace("1\n", "2\n"))
    assert measured("q", never) == 1
    fresh.unlink()
    assert measured("q", never) == 1


def test_other_threads_ask_again(monkeypatch):
    measured("q", lambda: 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert measured("q", lambda: 2) == 2
    finally: torch.set_num_threads(before)
    again(monkeypatch)
    assert measured("q", never) == 1


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a": 1}', "\xff\xfe"])
def test_a_broken_file_is_measured_again_and_mended(fresh, monkeypatch, content):
    fresh.parent.mkdir()
    fresh.write_bytes(content.encode("latin-1"))
    assert measured("q", lambda: 3) == 3
    again(monkeypatch)
    assert measured("q", never) == 3


def test_where_nothing_can_be_kept(fresh, monkeypatch):
    fresh.parent.write_text("a file where the folder should be")
    assert measured("q", lambda: 4) == 4 and measured("q", never) == 4
    monkeypatch.setenv("ATTNPOOL_CACHE", "/proc/none")
    again(monkeypatch)
    assert measured("q", lambda: 5) == 5 and fresh.parent.is_file()


def test_switched_off_the_file_is_left_alone(fresh, monkeypatch):
    measured("q", lambda: 6)
    before = fresh.read_text()
    again(monkeypatch)
    monkeypatch.setenv("ATTNPOOL_MEASURED", "0")
    assert measured_file() is None and measured("q", lambda: 7) == 7 and measured("q", never) == 7 and fresh.read_text() == before


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTNPOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured_file() == tmp_path / "attnpool/measured.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert measured_file() == tmp_path / "me/.cache/attnpool/measured.json"


def test_a_failure_is_not_kept(fresh):
    with pytest.raises(ZeroDivisionError): measured("q", lambda: 1 / 0)
    with pytest.raises(TypeError): measured("q", lambda: object())
    assert not fresh.exists() and measured("q", lambda: 8) == 8


def test_threads_measure_one_after_the_other():
    busy, found = [], []
    def slow():
        busy.append(1)
        assert len(busy) == 1
        busy.pop()
        return 9
    threads = [threading.Thread(target=lambda q=q: found.append(measured(q, slow))) for q in "abab" * 4]
    for t in threads: t.start()
    for t in threads: t.join()
    assert found == [9] * 16
    assert measured("outer", lambda: measured("inner", lambda: 1) + 1) == 2   # one measurement may ask another


def test_what_another_process_has_kept_counts(fresh, monkeypatch):
    "It answered while this one was still measuring: both say the same from then on."
    code = "from attnpool.measured import measured; measured('q', lambda: 'theirs'); measured('more', lambda: 1)"
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    assert measured("q", lambda: (subprocess.run([sys.executable, "-c", code], check=True, env=env), "ours")[1]) == "theirs"
    again(monkeypatch)
    assert measured("q", never) == "theirs" and measured("more", never) == 1


def loaders(tell): return loading_on("cuda", None)[1]


def test_processes_side_by_side_share_the_cores(monkeypatch):
    alone = cores()
    assert loading_on("cuda", None)[1] == min(16, alone) and loading_on("cpu", None)[1] == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))   # torchrun's
    assert cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with Workers() as workers: assert workers.together(2, 1, loaders) == [1, 1] and workers.together(1, 3, loaders) == [3]
    threads = torch.get_num_threads()
    monkeypatch.setattr(room, "_share", None)
    try:
        share_cores(5)
        assert cores() == torch.get_num_threads() == 5
    finally: torch.set_num_threads(threads)
