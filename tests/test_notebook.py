from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / 'experiments' / 'colab.ipynb'


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # of Jupyter's, not of ours
def test_the_notebook_runs_on_cpu():
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    outputs = ''.join(str(cell.get('outputs', '')) for cell in notebook.cells)
    assert 'top1_interval' in outputs and "'probability'" in outputs and 'image/png' in outputs
