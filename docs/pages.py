"""Runs the pages (`make pages`) and keeps what they show in step with the code.

Each page is run in a fresh process, as `nbdev_test` would run it. A page is written where its outputs differ from those
in the file in more than numbers and pictures; `--check` writes nothing and names such pages. An error fails either way.
A cell that begins with `#| varies` shows what depends on the machine: of its outputs only the kinds are compared.
Cells with a flag of `settings.ini` are left out, as in `nbdev_test`; a page that is written runs its slow ones too, for
what is shown below them.
"""
import argparse
import html
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from execnb.nbio import nb2str, read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ['__main__', 'pandas', 'scipy.stats', 'sklearn', 'matplotlib.pyplot', 'timm', 'fastai.vision.all']

# What may change from run to run and from machine to machine, in the order in which it is taken out.
UNITS = r'(?:\s?(?:ns|[µu]s|ms|s|sec|seconds|min|minutes|h|[kKMGT]?i?B|bytes|[kMGT]))?(?![A-Za-z0-9])'
LEFT_OUT = [(re.compile(pattern, flags), by) for pattern, flags, by in [
    (r'\x1b\[[\d;?]*[A-Za-z]', 0, ''),                        # colours of a terminal
    (r'^[^\n]*\r(?=[^\n])', re.M, ''),                        # what a progress bar has overwritten
    (r'data:[\w/+.;=-]+;base64,[\w+/=\s]+', 0, 'data:'),
    (r' at 0x[0-9a-fA-F]+', 0, ''),
    (rf'(?:/private)?(?:{re.escape(tempfile.gettempdir())}|/tmp|/var/folders)(?:/[^\s/\'",:)]+)', 0, 'TMP'),
    (r'\btmp[a-z0-9_]{8}\b', 0, 'TMP'),
    (r'\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?Z?)?', 0, '#'),
    (r'\b0x[0-9a-fA-F]+\b', 0, '#'),
    (r'(?<![A-Za-z0-9.])(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{6,}(?![A-Za-z0-9])', 0, '#'),   # hashes, not 5.204170427930421e-18
    (r'(?<![\w.])\d+(?:\.\d+)+[\w.+-]*', 0, lambda m: '#' if m[0].count('.') > 1 else m[0]),   # versions: 2.5.1+cpu
    (r'(?<!\w)[-+−]?\d+(?:x\d+)+(?!\w)', 0, '#'),             # 224x224
    (rf'(?<!\w)[-+−]?(?:\d+(?:,\d{{3}})*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?%|{UNITS})?', 0, '#'),
    (r'#(?::#)+', 0, '#'),                                    # 1:02:03
    (r'([^\w\s#])(?:\s*\1)+', 0, r'\1'),                      # rules of tables and bars, as wide as their numbers
    (r'\s+', 0, ' '),
]]


def without_numbers(text):
    "A text without numbers, units after them, times, hashes, temporary paths, and with its white space folded."
    for pattern, by in LEFT_OUT: text = pattern.sub(by, text)
    return text.strip()


def words(source):
    "The text that HTML shows."
    return html.unescape(re.sub(r'<(style|script)\b.*?</\1>|<[^>]*>', ' ', source, flags=re.S))


def shown(output):
    "What is compared of one output: what is printed, the richest text of what is displayed, the kind of all else."
    if output.get('name') == 'stderr': return ''
    if output['output_type'] == 'stream': return without_numbers(''.join(output['text']))
    if output['output_type'] == 'error': return output['ename']
    data = {kind: ''.join(text) if isinstance(text, list) else text for kind, text in output['data'].items()}
    pictures = sorted(kind for kind in data if not kind.startswith('text/'))
    if pictures: return f'[{" ".join(pictures)}]'
    if 'text/html' in data: return without_numbers(words(data['text/html']))
    return without_numbers(data.get('text/markdown', data.get('text/plain', '')))


def compared(cell):
    "What a cell shows, as far as it is compared; `#| varies`: only how many outputs of which kind."
    if cell['cell_type'] != 'code': return ''
    if re.search(r'^#\|\s*varies', ''.join(cell['source']), re.M):
        return ' '.join(o['output_type'] for o in cell['outputs'] if o.get('name') != 'stderr')
    return ' '.join(filter(None, map(shown, cell['outputs'])))


def differences(old, new):
    "For each cell that shows something else than before: its first line, and where the two begin to differ."
    for before, after in zip(old['cells'], new['cells']):
        a, b = compared(before), compared(after)
        if a == b: continue
        start = max(len(os.path.commonprefix([a, b])) - 30, 0)
        code = next((line for line in ''.join(after['source']).splitlines() if not line.startswith('#|')), '')
        yield f"{code}\n    - {a[start:start + 100] or 'nothing'}\n    + {b[start:start + 100] or 'nothing'}"


def run(path, flags):
    "The page after a run, clean, as a notebook; the traceback as a text where a cell fails."
    nb = read_nb(path)

    def skipped(cell):
        if cell['cell_type'] != 'code': return True
        directives = extract_directives(cell, remove=False)
        if flags & directives.keys() or directives.get('eval:', [''])[0].lower() == 'false': return True
        cell['outputs'] = []

    sys.path.insert(0, str(ROOT))
    os.chdir(path.parent)
    shell = CaptureShell(path, mpl_format='png')   # retina doubles the size of a page
    try: shell.run_all(nb, exc_stop=True, preproc=skipped)
    except BaseException as e:
        shell.exc = shell.exc or e
        return shell.prettytb(path)
    for cell in nb.cells:   # warnings and progress belong to a terminal
        if cell['cell_type'] == 'code': cell['outputs'] = [o for o in cell['outputs'] if o.get('name') != 'stderr']
    clean_nb(nb)
    return nb


def page(path, check, every, flags):
    "Run a page, and write it if that is asked for: what became of it, and how it differs."
    new = run(path, flags - {'slow'} if every else flags)
    if isinstance(new, str): return 'failed', new
    different = '\n'.join(differences(json.loads(path.read_text()), json.loads(nb2str(new))))
    if check or not (different or every): return 'differs' if different else 'same', different
    if not every and 'slow' in flags and re.search(r'"#\|\s*slow', path.read_text()): return 'slow', different
    write_nb(new, path)
    return 'written', different


def in_fresh_process(path, context, every, **options):
    start = time.perf_counter()
    bare = 'TRITON_INTERPRET' in path.read_text()   # triton reads it when it is imported, which fastai does
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn') if bare else context) as process:
        try: state, text = process.submit(page, path, every=every, **options).result()
        except BrokenProcessPool: state, text = 'failed', 'Its process was killed.'
    seconds = time.perf_counter() - start
    print(f'{seconds:6.1f} s  {path.stem:24} {state}', *filter(None, [text]), sep='\n    ', flush=True)
    return in_fresh_process(path, context, every=True, **options) if state == 'slow' else (path, state)


def chosen(names):
    "The pages of those names or paths, the guides first, since they take longest; all pages for no name."
    found = [p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
    found = {p: re.sub(r'^\d+_', '', p.stem) for p in sorted(found, key=lambda p: (-len(p.parts), p))}
    pages = list(found) if not names else []
    for name in names:
        here = [Path(name).resolve()] if Path(name).is_file() else [p for p in found if name in (found[p], p.stem)]
        pages += here or sys.exit(f'No page is called {name}.')
    return pages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pages', nargs='*', help='names or paths of pages [default: all]')
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 if a page differs')
    parser.add_argument('--all', action='store_true', help='write every page')
    parser.add_argument('--flags', default='', help='also run the cells with these flags, such as cuda or slow')
    parser.add_argument('-j', '--jobs', type=int, default=os.cpu_count(), help='pages at a time [default: the cores]')
    asked = parser.parse_args()
    found = chosen(asked.pages)
    # a terminal of one width and without colours; one thread for each of several processes
    os.environ |= dict(COLUMNS='80', NO_COLOR='1', OMP_NUM_THREADS='1')
    kept = tempfile.TemporaryDirectory()   # what pages measure of this machine is not kept for its user
    os.environ['ATTNPOOL_CACHE'] = kept.name
    for name in ('GITHUB_ACTIONS', 'FORCE_COLOR', 'PY_COLORS'): os.environ.pop(name, None)
    can_fork = 'forkserver' in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('forkserver' if can_fork else 'spawn')
    if can_fork and len(found) > 4: context.set_forkserver_preload(HEAVY)
    flags = set(get_config(path=ROOT).tst_flags.split()) - set(asked.flags.split())
    job = partial(in_fresh_process, context=context, check=asked.check, every=asked.all, flags=flags)
    start = time.perf_counter()
    with ThreadPoolExecutor(asked.jobs) as threads: states = list(threads.map(job, found))
    print(f'{len(states)} pages in {time.perf_counter() - start:.0f} s.')
    by_state = {state: [p.stem for p, s in states if s == state] for state in ('failed', 'differs', 'written')}
    for state, names in by_state.items():
        if names: print(f'{state}: {", ".join(names)}')
    if by_state['differs']: print('What differs is not what the code shows today: run `make pages` and commit.')
    sys.exit(bool(by_state['failed'] or by_state['differs']))


if __name__ == '__main__': main()
