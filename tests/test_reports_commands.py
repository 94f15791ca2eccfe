"Commands and reports with what people type and call things: names like markup, paths, outputs, terminals, homes, logs, mistakes."
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console

from attnpool import choices
from attnpool.cli import main
from attnpool.data import DataId
from attnpool.recipe import get_recipe, Recipe, network_for
from attnpool.registry import BadInput
from attnpool.report.collect import collect, group_by_setting, read_log, tell_apart
from attnpool.report.page import learning_curves, markdown, write_report
from attnpool.report.stats import rich_table, summarize
from attnpool.runs.options import check_out, expand, guarded
from attnpool.runs.spec import make_spec, Spec
from attnpool.runs.store import Result
from test_report import fake_run, history_of, metrics_of, spec_of

HERE = Path(__file__).parent.parent


# Names

NASTY = '<script>alert(1)</script> & [red]x[/red] [/] $a_{$ | "q" \'q\' _x_ `b` *c* \\ {{ 7 * 7 }} {% raw %} <!-- -- --> é \u202e \x1b[31m\n\n# h'
LEADING = '_x_ $1$ and $2$'


def tame(name): return 'tame' if name in (NASTY, LEADING) else name


def a_result(head='avg', seed=1, **values):
    spec, history = spec_of(head, seed), history_of(2, metrics_of(.8 + seed / 100))
    given = dict(status='complete', metrics=metrics_of(.8 + seed / 100), primary='accuracy', parameters=10**6, pictures=[15, 10], seconds_per_epoch=1.5,
                 device='cpu', machine='x', git='4e12435', versions=dict(torch='2'), epochs=history)
    return Result(spec, **given | values)


def named(field, name):
    "Results that have a name in one of the fields that people can set."
    where, _, key = field.partition('.')
    results = [a_result(h, s) for h in ('avg', 'slim') for s in (1, 2)]
    def put(r):
        if where == 'Spec': return replace(r, spec=replace(r.spec, **{key: name}))
        if where == 'DataId': return replace(r, spec=replace(r.spec, data=replace(r.spec.data, **{key: name})))
        if where == 'Recipe': return replace(r, spec=replace(r.spec, recipe=replace(r.spec.recipe, **{key: name})))
        if where == 'Result': return replace(r, **{key: name})
        if field == 'head of one': return replace(r, spec=replace(r.spec, head=name)) if r.spec.head == 'slim' else r
        if field == 'option': return replace(r, spec=replace(r.spec, head='avg', options=((name, name), ('p', r.spec.head))))
        if field == 'version': return replace(r, versions={name: name})
        if field == 'size': return replace(r, sizes={'64': {name: .5}})
        if field == 'metric': return replace(r, metrics={**r.metrics, name: .5}, epochs=r.epochs.assign(**{name: .5}))
        if field == 'primary': return replace(r, primary=name, metrics={name: .5 + r.spec.seed / 10}, epochs=r.epochs.assign(**{name: .5}))
        raise KeyError(field)
    return [*map(put, results), *(put(a_result('avg', s, pictures=[1, 2])) for s in (1, 2))] if field not in ('head of one', 'option') else [*map(put, results)]


FIELDS = [f'{cls.__name__}.{f.name}' for cls in (Spec, DataId, Recipe, Result) for f in fields(cls)
          if f.type in (str, str | None) and f.name not in ('head', 'status', 'primary', 'start')]
FIELDS += ['head of one', 'option', 'version', 'size', 'metric', 'primary']


@pytest.fixture
def registered(monkeypatch):
    "A recipe's names are those of tables, and everybody can register one."
    for table in choices.TABLES:
        for name in (NASTY, LEADING, 'tame'): monkeypatch.setitem(table.data, name, next(iter(table.values())))


class Structure(HTMLParser):
    "The elements of a page with the names of their attributes, and its text."
    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.elements.append((tag, *(k for k, _ in attrs)))
    def handle_data(self, data): self.text.append(data)
    def handle_comment(self, data): self.elements.append('comment')


def pipes(line): return len(re.findall(r'(?<!\\)\|', line))


def shown(results):
    "What a terminal gets."
    console = Console(file=io.StringIO(), width=2000)
    groups = group_by_setting(results)
    for (title, _), group in zip(tell_apart(groups), groups): console.print(rich_table(summarize(group), title), crop=False)
    return console.file.getvalue()


def words(text): return ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())


def all_named(name):
    "All fields at once, in two settings."
    spec = spec_of('avg', 1, DataId(name, name, name, name), **{f.name: name for f in fields(Recipe) if f.type == 'str' or f.type is str})
    spec = replace(spec, head=name, arch=name, task=name, options=((name, name),), recipe=replace(spec.recipe, name=name))
    values = dict(metrics={name: .7}, primary=name, sizes={'64': {name: .5}}, device=name, machine=name, git=name, versions={name: name},
                  epochs=pd.DataFrame({'epoch': [0, 1], name: [.6, .7]}))
    results = [a_result(seed=s, **values) for s in (1, 2)]
    return [replace(r, spec=replace(spec, seed=r.spec.seed), pictures=[n, n]) for n in (1, 2) for r in results]


@pytest.mark.parametrize("name", [NASTY, LEADING], ids=['nasty', 'leading'])
def test_no_name_is_markup_in_a_page(name, tmp_path, registered):
    pages = []
    for folder, n in (('nasty', name), ('tame', 'tame')):
        (tmp_path / folder).mkdir()
        with warnings.catch_warnings():
            warnings.filterwarnings('error', module='matplotlib|rich')
            pages.append(write_report(all_named(n), tmp_path / folder / 'r.html', title=f'About {n}'))
    ours, due = (Structure(p.read_text()) for p in pages)
    assert ours.elements == due.elements
    text, due_text = words(''.join(ours.text)), words(''.join(due.text))
    assert text.count(words(name)) == len(re.findall(r"\btame\b|\bTame\b", due_text)) > 30 or text.count(words(name)) > 30
    def table_lines(page): return [pipes(line) for line in page.with_suffix('.md').read_text().splitlines() if line.startswith('|')]
    assert table_lines(pages[0]) == table_lines(pages[1])
    saved, _ = collect([pages[0].with_suffix('.runs.csv')])
    assert [replace(r, epochs=None) for r in saved] == [replace(r, spec=replace(r.spec, data=replace(r.spec.data, path='')), epochs=None) for r in all_named(name)]


@pytest.mark.parametrize("field", FIELDS)
def test_no_name_is_markup_in_a_terminal(field, registered):
    text, due = shown(named(field, NASTY)), shown(named(field, 'tame'))
    assert text.count('[red]x[/red] [/] $a_{$') == due.count('tame') and 'alert' not in text.replace('<script>alert(1)</script>', '')


def test_the_title_holds_the_datas_name_in_one_piece(capsys):
    name = 'My data, of a name that is longer than the table [2024] is wide'
    for title, _ in tell_apart(group_by_setting([replace(r, spec=replace(r.spec, data=DataId(name))) for r in named('Result.git', 'x')])): assert title.startswith(f'{name}, xeca')


def test_every_head_stands_in_the_legend_as_it_is_called():
    import matplotlib.pyplot as plt
    names = ['_x_', 'a$b', '$x_1$', r'\frac', '__', 'a\nb']
    fig = learning_curves([a_result(n) for n in names])
    texts = fig.axes[0].get_legend().get_texts()
    fig.canvas.draw()
    assert [t.get_text().replace(r'\$', '$').strip() for t in texts] == [n.replace('\n', ' ') for n in names]
    plt.close(fig)


def test_long_names_are_whole_in_page_and_table(tmp_path):
    long = 'a_data_set_with_a_name_of_more_than_fifty_characters_' * 3
    results = [replace(a_result(long, s), spec=replace(spec_of(long, s), data=DataId(long))) for s in (1, 2)]
    page = write_report(results, tmp_path / 'r.html')
    assert page.read_text().count(long) >= 4 and long in page.with_suffix('.md').read_text()
    assert markdown(pd.DataFrame({'a|b': ['x\ny|z']})) == '| a\\|b |\n| --- |\n| x y\\|z |'


# Files

def run(*args, capsys=None):
    "Status, and what stands on both streams; a traceback is an error of this test."
    with pytest.raises(SystemExit) as e: main(list(map(str, args)))
    out, err = capsys.readouterr()
    assert 'Traceback' not in out + err
    return e.value.code, out, err


def photos(root, n=6, size=24):
    g = np.random.default_rng(0)
    for name, colour in dict(red=(220, 40, 40), green=(40, 220, 40)).items():
        (root / name).mkdir(parents=True)
        for i in range(n): Image.fromarray((np.array(colour) + g.integers(-30, 30, (size, size, 3))).clip(0, 255).astype('uint8')).save(root / name / f'{i}.png')
    return root


LOG = 'epoch,train_loss,valid_loss,accuracy,time\n0,1.9,1.7,0.41,00:36\n1,1.2,1.1,0.66,00:40\n'
FAST = ['--heads', 'avg', '--seeds', '1', '--epochs', '1', '--size', '20', '--bs', '4', '--device', 'cpu']


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A folder with pictures and a run on them, not to be written to."
    folder = tmp_path_factory.mktemp('trained')
    photos(folder / 'photos')
    with pytest.raises(SystemExit) as e: main(['bench', str(folder / 'photos'), *FAST, '--out', str(folder / 'R')])
    assert e.value.code == 0
    return folder


def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'avg-1.csv').write_text(LOG)
    (tmp_path / 'link.html').symlink_to('avg-1.csv')
    (tmp_path / 'list.csv').write_text('path,label\n' + ''.join(f'photos/{c}/{i}.png,{c}\n' for c in ('red', 'green') for i in range(6)))
    (next((tmp_path / 'R').glob('photos-*'))).rename(tmp_path / 'R/run')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [
    "report avg-1.csv --out avg-1.html", "report avg-1.csv --out ./x/../avg-1.html", "report avg-1.csv --out link.html", "report link.html --out avg-1.html",
    "report R/report.runs.csv --out R/report.html", "report R/report.runs.csv --out {here}/R/report", "report avg-1.csv R --out avg-1.csv",
    "report R --out R/run/history.html", "report R/run --out R/run/result.json", "maps R/run photos/red/0.png --out photos/red/0.png", "maps R/run photos --out photos/red/0.png",
    "maps R/run --out R/run/weights.safetensors", "maps R/run avg-1.csv --out avg-1.csv", "maps R --measure --out R/run/history.html", "data list.csv --out list.csv",
    "data photos --out photos/red/0.png", "data photos/ --out {here}/photos/green/1.png", "data list.csv --out photos/red/0.png"])
def test_no_output_is_an_input(place, words, capsys):
    (place / 'x').mkdir()
    before = contents(place)
    code, out, err = run(*words.format(here=place).split(), capsys=capsys)
    assert code == 2 and err.startswith('attnpool: --out: ') and err.count('\n') == 1, (words, err)
    assert contents(place) == before


@pytest.mark.parametrize("words", [
    "report avg-1.csv --out R", "report avg-1.csv --out R/", "report avg-1.csv --out .", "report R --out x.csv", "report R --out avg-1.csv/x.html", "report R --out /proc/x.html",
    "maps R/run --out R", "maps R/run --out nowhere/x.html", "maps R/run --out /proc/x.html", "data photos --out R", "data photos --out nowhere/x.png",
    "data photos --out /proc/x.png", "complexity --networks resnet18 --out R", "complexity --networks resnet18 --out nowhere/x.csv", "complexity --networks resnet18 --out /proc/x.csv",
    "speed --quick --out avg-1.csv", "speed --quick --out /proc/speed", "lr photos --out avg-1.csv", "lr photos --out /proc/runs", "bench photos --out avg-1.csv", "bench photos --out /proc/x"])
def test_an_output_that_cannot_be_is_told_before_the_work(place, words, capsys, monkeypatch):
    import attnpool.cost.networks, attnpool.cost.pools, attnpool.maps.page, attnpool.report.measures, attnpool.report.page, attnpool.runs.train
    def worked(*args, **kw): raise AssertionError('the work has begun')
    for module, name in ((attnpool.cost.networks, 'complexity'), (attnpool.cost.pools, 'measure_pools'), (attnpool.runs.train, 'open_run'), (attnpool.runs.train, 'run'),
                         (attnpool.report.page, 'write_report'), (attnpool.report.measures, 'measure_maps')): monkeypatch.setattr(module, name, worked)
    before = contents(place)
    code, out, err = run(*words.split(), capsys=capsys)
    assert code == 2 and err.startswith('attnpool: --out: ') and err.count('\n') == 1, (words, err)
    assert contents(place) == before


def test_outputs_of_before_are_written_again(place, capsys):
    for _ in range(2):
        assert run('report', 'R', 'avg-1.csv', '--out', 'R/report.html', capsys=capsys)[0] == 0
        assert run('report', 'avg-1.csv', '--out', 'new/folder/r.html', capsys=capsys)[0] == 0
        assert run('data', 'photos', '--out', 'photos.png', '--size', '20', capsys=capsys)[0] == 0
        assert run('maps', 'R/run', 'photos/red/0.png', '--out', 'maps.html', '--device', 'cpu', capsys=capsys)[0] == 0
    assert (place / 'R/report.html').stat().st_size > 1e4 and (place / 'avg-1.csv').read_text() == LOG


@pytest.mark.parametrize("words, theirs", [
    ("report R --out mine.html", 'mine.md'), ("report R --out mine.html", 'mine.csv'), ("report R --out mine.html", 'mine.runs.csv'), ("maps R --measure --out mine.html", 'mine.csv'),
    ("maps R --measure --out R/report.runs.csv", None), ("report R --out L/rates.html", 'L/rates.csv'), (f"bench photos {' '.join(FAST)} --out L", 'L/report.csv'),
    (f"bench photos {' '.join(FAST)} --out L", 'L/report.html'), (f"lr photos {' '.join(FAST)} --rates 1e-3 --out L", 'L/rates.csv')])
def test_no_file_of_another_is_replaced_by_a_derived_one(place, words, theirs, capsys):
    (place / 'L').mkdir()
    if theirs: (place / theirs).write_text('head,0.001\navg,0.5\n' if theirs == 'L/rates.csv' and 'report' in words else 'my own words\n')
    before = contents(place)
    code, out, err = run(*words.split(), capsys=capsys)
    assert code == 2 and re.match(r'attnpool: --out: \S+ was not written by this command, .* --out \S*new', err) and err.count('\n') == 1, (words, err)
    assert (theirs or 'R/report.runs.csv') in err and contents(place) == before


def test_our_tables_are_written_again(place, capsys):
    for _ in range(2):
        for words in ("maps R --measure --device cpu --out m.csv", "report R --out r.html", f"bench photos {' '.join(FAST)} --out R", f"lr photos {' '.join(FAST)} --rates 1e-3 --out L"):
            code, out, err = run(*words.split(), capsys=capsys)
            assert code == 0, (words, err)
    (place / 'report.csv').write_text((place / 'list.csv').read_text())
    code, out, err = run('bench', 'report.csv', *FAST, '--out', '.', capsys=capsys)
    assert code == 2 and 'report.csv is one of the files that this command reads' in err and '--out new.' in err, err   # a folder, as was asked for


def test_hard_links_are_the_same_file(tmp_path):
    (tmp_path / 'a.csv').write_text(LOG)
    os.link(tmp_path / 'a.csv', tmp_path / 'b.html')
    with pytest.raises(BadInput, match="--out: .*b.html is one of the files"): check_out(tmp_path / 'b.html', [tmp_path / 'a.csv'])


# Paths

def test_expand(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('MINE', '/data')
    assert [*map(expand, ('~', '~/r2', '$MINE/x', '${MINE}', '$NOT_THERE/x', 'a~b', 'digits', '', '~nobody_at_all/x'))] == [
        '/home/me', '/home/me/r2', '/data/x', '/data', '$NOT_THERE/x', 'a~b', 'digits', '', '~nobody_at_all/x']


def test_home_and_variables_in_every_path(place, capsys, monkeypatch):
    home = place / 'home'
    home.mkdir()
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('FASTAI_HOME', str(place / 'fastai'))
    monkeypatch.setenv('WHERE', str(place))
    (place / 'photos').rename(home / 'photos')
    for words in (f"bench ~/photos {' '.join(FAST)} --out=~/r2", f"lr $WHERE/home/photos {' '.join(FAST)} --rates 1e-3 --out ~/lr", "report ~/r2 $WHERE/avg-1.csv --out=~/page/r.html",
                  "data ~/photos --size 20 --out=$WHERE/d.png", "maps $WHERE/R/run ~/photos/red/0.png --data ~/photos --device cpu --out ${HOME}/m.html",
                  "maps R --measure --data ~/photos --device cpu --out ~/m.csv"):
        args = words.split() if 'lr ' not in words else [w for w in words.split()]
        code, out, err = run(*args, capsys=capsys)
        assert code == 0, (words, err)
    made = {str(p.relative_to(home)) for p in home.rglob('*') if p.is_file() and 'photos' not in p.parts[-2:]}
    assert {'r2/report.html', 'lr/rates.csv', 'page/r.html', 'm.html', 'm.csv'} <= made and (place / 'd.png').exists()
    assert not list(place.glob('~*')) and not list(place.glob('$*'))


def test_out_inside_the_data_is_said_and_works_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photos(tmp_path / 'photos'))
    for again in (False, True):
        code, out, err = run('bench', '.', *FAST, '--out', 'results', capsys=capsys)
        assert code == 0 and out.count('results lies inside the data, .') == 1 and ('are in results already' in out) == again, err
        assert run('data', '.', '--size', '20', capsys=capsys)[0] == 0
    assert run('report', 'results', capsys=capsys)[0] == 0 and run('data', '.', '--size', '20', capsys=capsys)[0] == 0


def test_a_folder_for_results_that_is_called_as_made_data_is_not_inside_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'digits').mkdir()
    code, out, err = run('bench', 'digits', *FAST, '--out', 'digits', capsys=capsys)
    assert code == 0 and 'inside the data' not in out + err


# Logs

def log(path, text):
    path.write_text(text)
    return path


HEAD = 'epoch,train_loss,valid_loss,accuracy,time\n'
FINE_TUNE = HEAD + '0,2.0,1.9,0.3,00:10\n' + HEAD + '0,1.5,1.4,0.5,00:20\n1,1.2,1.1,0.66,01:02:03\n'


@pytest.mark.parametrize("text, epochs, value, seconds, says", [
    (LOG, 2, .66, [36, 40], ''),
    (FINE_TUNE, 3, .66, [10, 20, 3723], '2 fits, of 1 and 2 epochs: joined to one training of 3'),
    (FINE_TUNE.replace('\n', '\n\n'), 3, .66, [10, 20, 3723], 'joined'),
    (FINE_TUNE + '\n  \n', 3, .66, [10, 20, 3723], 'joined'),
    (FINE_TUNE + '2,1.1,0.', 3, .66, [10, 20, 3723], 'is cut off and left out: 2,1.1,0.'),
    (FINE_TUNE + HEAD, 3, .66, [10, 20, 3723], ''),
    (FINE_TUNE.replace('\n', '\r\n'), 3, .66, [10, 20, 3723], 'joined'),
    ('\ufeff' + LOG, 2, .66, [36, 40], ''),
    (LOG + '0,1.1,1.0,0.7,00:30\n', 3, .7, [36, 40, 30], ''),                              # epochs that start over without a header
    (LOG + 'epoch,train_loss,valid_loss,accuracy,f1_score,time\n0,1.1,1.0,0.7,0.6,00:30\n', 3, .7, [36, 40, 30], 'joined'),
    ('epoch,train_loss,valid_loss,error_rate,time\n0,2,2,.5,00:01\n' + LOG, 3, .66, [1, 36, 40], 'joined'),
    ('epoch,train_loss,accuracy\n0,1.5,0.4\n', 1, .4, None, ''),
    ('epoch,train_loss,valid_loss,accuracy,time\n0,1.5,None,0.4,None\n', 1, .4, None, ''),
    (HEAD + '0,1.9,1.7,0.41,12.5\n', 1, .41, None, ''),
])
def test_a_log_of_one_or_more_fits(tmp_path, capsys, text, epochs, value, seconds, says):
    r = read_log(log(tmp_path / 'avg-7.csv', text))
    history, err = r.history(), capsys.readouterr().err
    assert len(history) == r.spec.recipe.epochs == epochs and history.epoch.tolist() == [*range(epochs)] and r.metrics['accuracy'] == value
    if 'None' not in text: assert r.status == 'complete' and r.value == value
    if seconds: assert history.seconds.tolist() == seconds and r.seconds_per_epoch == float(np.median(seconds))
    assert says in err and bool(says) == bool(err) and str(tmp_path) in err or not says


@pytest.mark.parametrize("text", ['', '\n', HEAD, 'a,b\n1,2\n', 'epoch,loss\n0,"1\n', LOG + 'epoch,train_loss,time\n0,1.1,00:30\n', 'no commas', 'head,n,accuracy,sd\navg,2,.9,.01\n', HEAD + '0,1,2,3,4,5,6\n1,2,3\n0,1'])
def test_what_is_no_log_is_one_line(tmp_path, capsys, text):
    assert read_log(log(tmp_path / 'slim-1.csv', LOG)).value == .66
    code, out, err = run('report', log(tmp_path / 'avg-1.csv', text), '--out', tmp_path / 'r.html', capsys=capsys)
    assert code == 2 and 'runs: ' in err and err.splitlines()[-1].startswith('attnpool: ') and not (tmp_path / 'r.html').exists()


def test_fastais_own_log_of_fine_tune(tmp_path, dls, capsys):
    from fastai.callback.progress import CSVLogger
    from fastai.vision.all import accuracy, Learner
    from attnpool.models.xresnet import xeca_resnext_tiny
    learn = Learner(dls, xeca_resnext_tiny(10), metrics=accuracy, path=tmp_path, cbs=CSVLogger('pets/avg-3.csv', append=True))
    (tmp_path / 'pets').mkdir()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        learn.fit(2, 1e-3)
    code, out, err = run('report', tmp_path / 'pets/avg-3.csv', '--out', tmp_path / 'r.html', capsys=capsys)
    assert code == 0 and 'holds 2 fits, of 1 and 2 epochs: joined to one training of 3.' in err and '3 epochs' in out


# Runs and logs by other words

def test_the_same_run_twice_is_one(trained, tmp_path, capsys):
    shutil.copytree(trained / 'R', tmp_path / 'copy')
    folder = next((trained / 'R').glob('photos-*'))
    alone, _ = collect([trained / 'R'])
    for more in (tmp_path / 'copy', trained / 'R/report.runs.csv', folder, folder / 'history.csv', folder / 'result.json'):
        for paths in ([trained / 'R', more], [more, trained / 'R']): assert [r.spec for r in collect(paths)[0]] == [alone[0].spec]
        assert [r.spec for r in collect([more])[0]] == [alone[0].spec] and len(collect([more])[0][0].history()) == 1
    (tmp_path / 'logs').mkdir()
    a = log(tmp_path / 'logs/avg-1.csv', LOG)
    assert len(collect([a, f'{tmp_path}/logs/../logs/avg-1.csv', trained / 'R'])[0]) == 2
    (tmp_path / 'b/logs').mkdir(parents=True)
    b = log(tmp_path / 'b/logs/avg-1.csv', LOG.replace('.66', '.67'))
    code, out, err = run('report', a, b, '--out', tmp_path / 'r.html', capsys=capsys)
    assert code == 2 and f'two runs of the head avg with seed 1, in {a} and in {b}' in err and err.count('\n') == 1, err


def test_tables_put_together(tmp_path, capsys):
    fake_run(tmp_path / 'A', spec_of(seed=1), .9)
    fake_run(tmp_path / 'B', spec_of(seed=2), .8)
    for k in 'AB': assert run('report', tmp_path / k, '--out', tmp_path / f'{k}.html', capsys=capsys)[0] == 0
    texts = [(tmp_path / f'{k}.runs.csv').read_text() for k in 'AB']
    both = log(tmp_path / 'c.runs.csv', ''.join(texts))
    assert [r.value for r in collect([both])[0]] == [r.value for k in 'AB' for r in collect([tmp_path / k])[0]]
    table = pd.read_csv(tmp_path / 'A.runs.csv', dtype=str, keep_default_na=False)
    for column in ('accuracy', 'metrics.accuracy', 'epoch', 'parameters', 'seconds', 'spec.seed'):
        table.assign(**{column: 'abc'}).to_csv(tmp_path / 'd.runs.csv', index=False)
        code, out, err = run('report', tmp_path / 'd.runs.csv', '--out', tmp_path / 'r.html', capsys=capsys)
        assert code == 2 and 'abc' in err and err.startswith('attnpool: ') and err.count('\n') == 1, (column, err)


def test_a_log_that_is_none_says_why(tmp_path, capsys):
    (tmp_path / 'logs').mkdir()
    a = tmp_path / 'logs/avg-1.csv'
    for text, words in ((LOG.replace('.66', 'abc').replace('0abc', 'abc'), f"a cell of column accuracy in {a} is no number (could not convert string to float: 'abc')"),
                        (LOG.replace('1.1,', 'x,'), f'a cell of column valid_loss in {a} is no number'), (HEAD, f'{a} has a header, but no epochs')):
        code, out, err = run('report', log(a, text), '--out', tmp_path / 'r.html', capsys=capsys)
        assert code == 2 and words in err and err.count('\n') == 1, err
    code, out, err = run('report', tmp_path / 'logs', '--out', tmp_path / 'r.html', capsys=capsys)
    assert code == 2 and 'no runs, but CSV files (avg-1.csv). Name the files.' in err, err


def test_a_folder_whose_name_is_no_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / os.fsdecode(b'by\xe9'))
    code, out, err = run('bench', os.fsdecode(b'by\xe9'), *FAST, '--out', 'R', capsys=capsys)
    assert code == 0 and r'by\xe9' in (tmp_path / 'R/report.html').read_text() and len(collect(['R/report.runs.csv'])[0]) == 1
    assert run('report', 'R', capsys=capsys)[0] == 0


def test_a_grid_that_all_diverged_has_no_best(place, capsys):
    code, out, err = run('lr', 'photos', *FAST, '--rates', '1e30,2e30', '--out', 'L', '--epochs', '3', capsys=capsys)
    assert code == 0 and 'avg: all runs diverged: try smaller rates' in out and 'avg: 1e+30' not in out, out


@pytest.mark.parametrize("what, words", [("avg-1.csv", "MODEL: avg-1.csv is a picture or a folder of them."),
                                         ("nowhere", "model: there is no file or folder nowhere"), ("photos", "MODEL: photos is a picture or a folder of them.")])
def test_what_is_no_run_is_told_as_what_it_is(place, what, words, capsys):
    code, out, err = run('maps', what, '--device', 'cpu', capsys=capsys)
    assert code == 2 and err.startswith(f'attnpool: {words}') and err.count('\n') == 1, err


def test_a_folder_with_one_run_stands_for_it(place, capsys):
    code, out, err = run('maps', 'R', '--device', 'cpu', capsys=capsys)
    assert code == 0 and (place / 'maps.html').exists(), err


def test_settings_to_measure_are_named(place, capsys):
    run('bench', 'photos', *FAST, '--size', '24', '--out', 'R', capsys=capsys)
    code, out, err = run('maps', 'R', '--measure', '--out', 'm.csv', '--device', 'cpu', capsys=capsys)
    assert code == 2 and 'several settings: photos, xeca_resnext_tiny, quick, 24 px, 1 epoch; photos, xeca_resnext_tiny, quick, 20 px, 1 epoch. Name' in err, err


# Terminals and homes

def command(*args, cwd, **env):
    "A real process."
    env = {k: v for k, v in (os.environ | dict(PYTHONPATH=str(HERE)) | env).items() if v is not None}
    return subprocess.run([sys.executable, '-m', 'attnpool.cli', *map(str, args)], cwd=cwd, env=env, capture_output=True)


@pytest.mark.parametrize("env", [dict(PYTHONIOENCODING='ascii'), dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')], ids=['ascii', 'C'])
def test_any_terminal_shows_tables(place, env):
    (place / 'grün±').mkdir()
    done = command('report', 'R', 'avg-1.csv', '--out', 'grün±/r.html', cwd=place, **env)
    assert done.returncode == 0 and b'Traceback' not in done.stderr and done.stdout.isascii() and b'66.0' in done.stdout
    assert '±' in (place / 'grün±/r.html').read_text(encoding='utf-8')   # files are UTF-8 whatever the terminal


@pytest.mark.parametrize("encoding", ['ascii', 'latin-1', 'cp1252', 'utf-8'])
def test_what_an_encoding_lacks_becomes_plain_text(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, 'stdout', stream)
    assert guarded(lambda: print('± – − × é \udcff 漢')) == 0
    text = stream.buffer.getvalue().decode(encoding)
    assert text.startswith('± – − × é ' if encoding == 'utf-8' else '± - - × é ' if encoding == 'latin-1' else '± – - × é ' if encoding == 'cp1252' else '+/- - - x ? ')


@pytest.mark.parametrize("name", ['bench', 'report', 'lr', 'data', 'maps', 'speed', 'complexity'])
def test_help_in_ascii(name, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', stream)
    with pytest.raises(SystemExit) as e: main([name, '--help'])
    assert e.value.code == 0 and b'--help' in stream.buffer.getvalue()


def test_an_unusable_home_has_a_remedy(place):
    words, home = ('data', 'photos', '--out', 'd.png', '--size', '20'), str(place / 'avg-1.csv')   # a file
    done = command(*words, cwd=place, HOME=home, FASTAI_HOME=None)
    assert done.returncode == 2 and done.stderr.decode().count('\n') == 1 and b'FASTAI_HOME' in done.stderr, done.stderr
    for named in ('/proc/x', '/dev/null'):
        done = command(*words, cwd=place, FASTAI_HOME=named)
        assert done.returncode == 2 and done.stderr.decode().count('\n') == 1 and f'its files in {named}' in done.stderr.decode(), done.stderr
    done = command(*words, cwd=place, HOME=home, FASTAI_HOME=str(place / 'fastai'))
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_a_closed_pipe_is_no_fault(place):
    with subprocess.Popen([sys.executable, '-m', 'attnpool.cli', 'data', 'photos', '--out', 'd.png', '--size', '20'], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | dict(PYTHONPATH=str(HERE))) as p:
        p.stdout.close()
        assert p.stderr.read() == b'' and p.wait() in (0, 1)


def test_narrow_and_colourless(place, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '40')
    monkeypatch.setenv('NO_COLOR', '1')
    code, out, err = run('report', 'R', '--out', 'r.html', capsys=capsys)
    assert code == 0 and '\x1b' not in out and 'photos, xeca_resnext_tiny, quick, 20 px, 1 epoch' in out   # in one piece


# Mistakes

def test_hand_edited_runs_are_left_out_by_name(tmp_path, capsys):
    good = fake_run(tmp_path, spec_of(seed=1), .9)
    edits = [lambda v: v['spec'].pop('data'), lambda v: v['spec'].pop('recipe'), lambda v: v['spec'].pop('head'), lambda v: v['spec']['recipe'].pop('epochs'), lambda v: v['spec'].pop('seed'),
             lambda v: v['spec'].update(options=3), lambda v: v.update(spec=None), lambda v: v.update(spec=[]), lambda v: v.update(files=[1]), lambda v: v.update(files={'history.csv': None}),
             lambda v: v['spec'].update(data='digits'), lambda v: v['spec'].update(eval_sizes=3), lambda v: v['spec']['recipe'].update(opt=None), lambda v: v.pop('primary'), lambda v: v.update(status=None)]
    for i, edit in enumerate(edits):
        folder = fake_run(tmp_path, spec_of(seed=10 + i), .9)
        values = json.loads((folder / 'result.json').read_text())
        edit(values)
        (folder / 'result.json').write_text(json.dumps(values))
    code, out, err = run('report', tmp_path, '--out', tmp_path / 'r.html', capsys=capsys)
    assert code == 0 and good.exists() and err.count('attnpool: left out: ') == len(err.splitlines()) >= len(edits) - 2, err
    for text in ('', '[]', 'null', '{}', '"x"', '{"spec": 1}', '\xff'):
        (good / 'result.json').write_bytes(text.encode('latin-1'))
        results, problems = collect([good])
        assert not results and len(problems) == 1 and str(good) in problems[0]


@pytest.mark.parametrize("args, words", [
    ("bench {photos} --device cuda:77", "--device: 'cuda:77' is not available here"), ("bench nowhere --device tpu", "--device: 'tpu'"),
    ("bench nowhere --cluster slrum", "cluster: expected 'slurm' or 'local'"), ("bench nowhere --cluster local --time-limit 0", "timeout_min: expected"),
    ("bench digits --eval-sizes 0", "eval_sizes: expected a whole number from 1 on, got 0"), ("bench digits --eval-sizes -5", "eval_sizes"), ("bench digits --seeds -1", "seed: expected a whole number from 0 on"),
    ("bench digits --seeds 99999999999", "seed: "), ("bench digits --out ''", "--out"), ("lr digits --rates x", "--rates"), ("lr digits --rates 0", "lr: "), ("lr digits --rates nan", "lr: "),
    ("report", "RUNS"), ("report nowhere", "runs: there is no nowhere"), ("report .", "runs: there is no finished run"), ("maps", "MODEL"), ("maps nowhere", "nowhere"), ("maps .", "MODEL: . is a picture"),
    ("maps . --measure", "runs: there is no complete run"), ("maps . --top 0", ""), ("data nowhere", "data: "), ("data", "data"), ("speed --device tpu", "--device"), ("complexity --sizes x", "--sizes"),
    ("complexity --networks no_such_network", "no_such_network"), ("complexity --sizes 33 --networks resnet18+avgg", ""), ("--nonsense", "--nonsense"), ("bench --epochs 1e400", "--epochs"),
    ("bench digits --lr inf", "lr: "), ("bench digits --bs 0", "bs: "), ("bench digits --gpus -1 --cluster local", "gpus"), ("bench digits --options num_heads=", "--options"),
    ("bench digits --arch ''", "arch"), ("bench digits --heads ''", "--heads"), ("bench ''", "data"), ("bench digits --drop-path 1", "drop_path: ")])
def test_a_mistake_is_one_line(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [a.strip("'") for a in args.format(photos=tmp_path).split()]
    code, out, err = run(*args, capsys=capsys)
    assert code == 2 and words in err and err.startswith('attnpool: ') and err.count('\n') == 1, err


@pytest.mark.parametrize("more, words, end", [
    ("--arch densenet121 --size 16", "size: densenet121 with the head avg cannot take pictures of 16 px (Given input size", "It takes 29."),
    ("--arch vit_tiny_patch16_224 --size 32 --eval-sizes 48", "eval_sizes: vit_tiny_patch16_224 with the head avg cannot take pictures of 48 px (Input height",
     "It takes 32. By its name it can be built for others: --options dynamic_img_size=True.")])
def test_a_size_that_the_network_cannot_take_is_told_before_the_training(place, more, words, end, capsys):
    code, out, err = run('bench', 'photos', *FAST, *more.split(), '--out', 'N', capsys=capsys)
    assert code == 2 and err.startswith(f'attnpool: {words}') and err.endswith(f'{end}\n') and err.count('\n') == 1, err
    assert 'epochs' not in out and not list((place / 'N').glob('photos-*'))   # nothing trained, nothing left


def test_trying_the_sizes_leaves_the_network_as_it_was(dls):
    from attnpool.runs.train import _learner, check_sizes
    spec = make_spec('digits', 'slim', size=64, bs=16, eval_sizes=[48, 96])
    learn = _learner(spec, dls)
    before, modes = {k: v.clone() for k, v in learn.model.state_dict().items()}, [m.training for m in learn.model.modules()]
    state = torch.get_rng_state()
    check_sizes('net', learn, [64, *spec.eval_sizes])
    assert torch.equal(state, torch.get_rng_state()) and modes == [m.training for m in learn.model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


@pytest.mark.parametrize("make, error, words", [
    (lambda: make_spec(eval_sizes='256'), BadInput, "eval_sizes: expected several sides"), (lambda: make_spec(eval_sizes=256), BadInput, "eval_sizes: expected several sides"),
    (lambda: make_spec(eval_sizes=['a']), BadInput, "eval_sizes: expected a whole number"), (lambda: make_spec(eval_sizes=[2.5]), BadInput, "eval_sizes"),
    (lambda: make_spec(seed='a'), BadInput, "seed: expected a whole number"), (lambda: make_spec(seed=1.5), BadInput, "seed"), (lambda: make_spec(seed=None), BadInput, "seed"),
    (lambda: make_spec(seed=float('inf')), BadInput, "seed"), (lambda: get_recipe(3), TypeError, "recipe: expected a Recipe, or one of quick"), (lambda: get_recipe(None), TypeError, "recipe: "),
    (lambda: make_spec(recipe=3), TypeError, "recipe: ")])
def test_arguments_by_hand(make, error, words):
    with pytest.raises(error, match=f"^{words}"): make()


def test_arguments_that_stay_as_they_were():
    assert make_spec(seed='3').seed == make_spec(seed=np.int64(3)).seed == make_spec(seed=3.).seed == 3
    assert make_spec(eval_sizes=np.array([64, 96])).eval_sizes == make_spec(eval_sizes=['64', 96]).eval_sizes == (64, 96)


def test_a_fault_inside_a_head_is_not_taken_for_an_option(dls):
    def head(ni, n_out): raise TypeError("f() got an unexpected keyword argument 'colour'")
    with pytest.raises(TypeError, match="colour") as e: network_for(dls, 'xeca_resnext_tiny', head)
    assert not isinstance(e.value, BadInput)
    with pytest.raises(BadInput, match="^nonsense: the network xeca_resnext_tiny has no such option"): network_for(dls, 'xeca_resnext_tiny', 'avg', nonsense=1)


@pytest.mark.parametrize("error", [RuntimeError('CUDA out of memory. Tried to allocate 3 GiB'), MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")])
def test_a_full_memory_has_a_remedy(error, capsys):
    def full(): raise error
    assert guarded(full) == 2
    assert re.fullmatch(r"attnpool: --device: its memory is full\..*--bs.*\n", capsys.readouterr().err)


def test_a_fault_keeps_its_traceback():
    def broken(): raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')
    with pytest.raises(RuntimeError): guarded(broken)
