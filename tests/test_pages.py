"`make pages`: a page whose words differ from what its code shows today is found; numbers and pictures may change."
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

nbdev_clean = pytest.importorskip("nbdev.clean", reason="with the dev extra").nbdev_clean
SCRIPT = Path(__file__).parent.parent / "docs/pages.py"
spec = importlib.util.spec_from_file_location("pages", SCRIPT)
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


def printed(text, name="stdout"): return dict(output_type="stream", name=name, text=text.splitlines(True))
def displayed(**data): return dict(output_type="display_data", metadata={}, data={k.replace("_", "/"): v for k, v in data.items()})


def cell(*outputs, source="x"):
    return dict(cell_type="code", metadata={}, execution_count=None, source=[source], outputs=list(outputs))


def same(old, new, source="x"): return pages.compared(cell(*old, source=source)) == pages.compared(cell(*new, source=source))


@pytest.mark.parametrize("old, new", [
    ("accuracy 59.0%, 4.7 s per epoch", "accuracy 8.25%, 320 ms per epoch"),
    ("loss -1e-05", "loss 0.12"),
    ("0.0", "5.204170427930421e-18"),
    ("(tensor([[0.1, 2.]]), 1,234)", "(tensor([[-3.1,   .7]]), 7)"),
    ("<Figure at 0x7f00aa>", "<Figure>"),
    ("0x7f00aa12", "0x1234"),
    ("runs/digits-avg-1-0a1b2c3d4e", "runs/digits-avg-1-99ffee11bb"),
    ("/tmp/tmpab12cd_x/runs/report.html", "/tmp/tmpzz99__yy/runs/report.html"),
    ("took 0:01:02, 3.5 MB, 1 KiB", "took 1:22, 900 KB, 2 MiB"),
    ("2026-11-26 01:02:03", "2027-01-05 11:12:13"),
    ("torch 2.5.1+cpu", "torch 2.11.0+cu128"),
    ("(32, 224x224)", "(8, 64x48x3)"),
    ("\x1b[1mhead\x1b[0m  ───── a\n ━━━ 1", "head ── a ━━━━━━━ 22"),
    ("  1%|   |\r 50%|#  |\rdone", "done"),
    ("a    12.5  b", "a 1.25\n  b"),
])
def test_numbers_times_and_places_may_change(old, new): assert same([printed(old)], [printed(new)])


@pytest.mark.parametrize("old, new", [
    ("the head looks left", "the head looks right"),
    ("xresnext50", "xresnext18"),
    ("['avg', 'slim']", "['avg', 'slim', 'concat']"),
    ("float32", "float16"),
    ("True", "False"),
    ("--epochs INTEGER", "--epochs FLOAT"),
    ("report.html", "report.md"),
    ("(0.1, 0.2)", "(0.1, nan)"),
    ("lr=0.1", "wd=0.1"),
    ("2 heads", "2 pools"),
])
def test_a_changed_word_is_found(old, new):
    assert not same([printed(old)], [printed(new)])
    assert not same([displayed(text_plain=old)], [displayed(text_plain=new)])
    old, new = (displayed(text_html=f"<td>{text}</td>", text_plain="a") for text in (old, new))
    assert not same([old], [new])


def test_of_pictures_only_the_presence_counts():
    picture, other = displayed(image_png="iVBOR", text_plain="<Figure>"), displayed(image_png="AAAA", text_plain="<Figure>")
    assert same([picture], [other])
    assert not same([picture], []) and not same([picture], [picture, other])
    html = '<a href="data:image/png;base64,{}">left</a> data:image/png;base64,{}'
    assert same([displayed(text_html=html.format("iVBOR+/=", "iVBOR="))], [displayed(text_html=html.format("AA", "BB"))])


def test_of_html_the_words_count():
    old = "<style>td {color: red}</style><table><tr><td>a</td><td>1</td></tr></table>"
    new = "<table class=x>\n<td> a <td>2"
    assert same([displayed(text_html=old)], [displayed(text_html=new)])


def test_warnings_and_the_pieces_that_a_kernel_prints_do_not_count():
    assert same([printed("a\n"), printed("b\n"), printed("slow!", "stderr")], [printed("a\nb\n")])


def test_of_what_varies_only_the_kinds_count():
    assert same([printed("an Intel")], [printed("an AMD")], source="#| varies\nmachine()")
    assert not same([printed("an Intel")], [], source="#| varies\nmachine()")
    assert not same([printed("an Intel")], [printed("an AMD")], source="machine()  #| varies")


def test_a_difference_is_told_with_its_cell():
    old, new = (dict(cells=[cell(printed(text), source="#| echo: false\nshow()")]) for text in ("before a", "before b"))
    assert list(pages.differences(old, new)) == ["show()\n    - before a\n    + before b"]
    assert list(pages.differences(old, old)) == []


def page(file, *cells):
    title = dict(cell_type="markdown", metadata={}, source=["# Title"])
    notebook = dict(cells=[title, *cells], metadata={}, nbformat=4, nbformat_minor=5)
    for i, c in enumerate(notebook["cells"]): c["id"] = f"cell-{i}"
    file.write_text(json.dumps(notebook))
    return file


def outputs(file): return [c["outputs"] for c in json.loads(file.read_text())["cells"][1:]]


def test_pages_are_run_compared_and_written(tmp_path):
    good = page(tmp_path / "good.ipynb", cell(printed("1 apple\n"), source="import time\nprint(time.time(), 'apple')"))
    left_out = [cell(printed("kept"), source=f"#| {directive}\n1/0") for directive in ("cuda", "eval: false")]
    skipped = page(tmp_path / "skipped.ipynb", *left_out)
    noisy = "import sys\nprint('apple'); print('slow!', file=sys.stderr)"
    stale = page(tmp_path / "stale.ipynb", cell(printed("pear\n"), source=noisy), cell(printed("gone"), source="y = 1"))
    plums = cell(printed("kept"), source="#| slow\nprint(1 + 1, 'plums')")
    slow = page(tmp_path / "slow.ipynb", plums, cell(source="print('cherry')"))
    broken = page(tmp_path / "broken.ipynb", cell(source="def f(): return 1/0\nf()"))
    before = {f: f.read_text() for f in (good, skipped, stale, broken)}

    def run(*arguments):
        return subprocess.run([sys.executable, SCRIPT, "-j2", *arguments], capture_output=True, text=True)

    checked = run("--check", good, skipped, stale, broken)
    assert checked.returncode == 1 and {f: f.read_text() for f in before} == before
    assert "failed: broken" in checked.stdout and "differs: stale" in checked.stdout and "- pear" in checked.stdout
    assert "ZeroDivisionError" in checked.stdout and "return 1/0" in checked.stdout
    written = run(good, skipped, stale, slow)
    assert written.returncode == 0 and "written: stale, slow" in written.stdout, written.stdout
    assert outputs(slow) == [[printed("2 plums\n")], [printed("cherry\n")]]
    assert good.read_text() == before[good] and skipped.read_text() == before[skipped]
    assert outputs(stale) == [[printed("apple\n")], []]
    after = stale.read_text()
    nbdev_clean(fname=stale)
    assert stale.read_text() == after
