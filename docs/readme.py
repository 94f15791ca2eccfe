"Makes README.md of nbs/index.ipynb: without hidden cells and directives, its pictures in docs/readme."
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parent.parent
pictures = root/'docs/readme'


def shown(cell):
    "A cell as it is shown: nothing of a hidden one, without directives, the picture before its code where it says so."
    directives = dict(re.findall(r'(?m)^#\|\s*([\w-]+):? *(.*)$', cell.source)) if cell.cell_type == 'code' else {}
    if 'hide' in directives: return
    cell.source = re.sub(r'(?m)^#\|.*\n', '', cell.source)
    first = directives.get('picture') == 'first'
    if first: yield nbformat.from_dict(cell | dict(id=f'{cell.id}-picture', metadata=dict(tags=['no-code'])))
    if directives.get('echo') == 'false': cell.metadata['tags'] = ['no-code']
    yield cell if not first else nbformat.from_dict(cell | dict(outputs=[]))


nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
nb.metadata['language_info'] = {'name': 'python'}   # for the colours of the code; nbdev_clean removes it from notebooks
nb.cells = [part for cell in nb.cells for part in shown(cell)]

removed = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={'no-code'}))
text, resources = MarkdownExporter(config=removed).from_notebook_node(
    nb, {'output_files_dir': 'docs/readme', 'unique_key': 'index'})
shutil.rmtree(pictures, ignore_errors=True)
pictures.mkdir(parents=True)
for name, content in resources['outputs'].items(): (root/name).write_bytes(content)
(root/'README.md').write_text(re.sub(r'\n{3,}', '\n\n', text).strip() + '\n')
