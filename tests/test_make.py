"`make`: each target stands in an environment that nothing else fills, and the workflow runs each of them."
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = dict(test=".venv", pages=".venv", prepare=".venv", bench=".venv-bench", docs=".venv-docs", newest=".venv-newest")


def commands(*arguments):
    "What make would run if no environment were there."
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    made = subprocess.run(["make", "-n", "-W", "settings.ini", *arguments], cwd=ROOT, capture_output=True, text=True, env=outside)
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="with make")
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_makes_one_environment_and_uses_no_other(target):
    found = commands(target)
    assert {*re.findall(r"\.venv[\w-]*", found)} == {TARGETS[target]}
    assert re.search(r"pip .*install .*-e ", found) and "download.pytorch.org" not in found
    installs = [line for line in commands(target, "TORCH=cpu").splitlines() if re.search(r"pip .*install .*-e ", line)]
    assert installs and all("https://download.pytorch.org/whl/cpu" in line for line in installs)


def test_the_workflow_runs_every_target():
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    assert {*re.findall(r"\bmake (\w+)", workflow)} == {*TARGETS}
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert {*phony} - {*TARGETS} == {"help", "clean", "in-step", "readme"}   # the last two are parts of test and prepare
