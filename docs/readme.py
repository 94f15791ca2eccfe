"Makes README.md of nbs/index.ipynb: without hidden cells and directives, its pictures in docs/readme."
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent
pictures = root/'docs/readme'

nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
nb.metadata['language_info'] = {'name': 'python'}   # for the colours of the code; nbdev_clean removes it from notebooks
nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide', c.source)]
for cell in nb.cells: cell.source = re.sub(r'(?m)^#\|.*\n', '', cell.source)

text, resources = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': 'docs/readme', 'unique_key': 'index'})
shutil.rmtree(pictures, ignore_errors=True)
pictures.mkdir(parents=True)
for name, content in resources['outputs'].items(): (root/name).write_bytes(content)
(root/'README.md').write_text(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n')
