"""Bring the notebook lesson.ipynb up to date: its copy of dtm.py, and the outputs of its cells.

    pip install nbclient ipykernel && python -m figures.lesson     half a minute

The notebook can be opened alone, because its first cell holds a compressed copy of dtm.py. A change
of dtm.py or of a cell makes this copy or the outputs stale, and a test then asks for this command.
"""

import base64
import lzma
import re
import tempfile
from pathlib import Path

from llada.checkpoint import write_file

NOTEBOOK = Path(__file__).parent / "lesson.ipynb"
DTM = Path(__file__).parent.parent / "dtm.py"


def pack(source: bytes) -> str:
    """Return a file in the form in which the notebook holds it: xz, then base64."""
    return base64.b64encode(lzma.compress(source, preset=9)).decode()


def code_cells(notebook: dict) -> list[str]:
    """Return the source of each code cell."""
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def packed_file(notebook: dict) -> bytes:
    """Return the file that the first code cell unpacks."""
    [packed] = re.findall(r'b64decode\(\s*"([^"]*)"', code_cells(notebook)[0])
    return lzma.decompress(base64.b64decode(packed))


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    copy = f'b64decode(\n        "{pack(DTM.read_bytes())}"'
    first.source = re.sub(r'b64decode\(\s*"[^"]*"', copy, first.source)
    with tempfile.TemporaryDirectory() as folder:  # It has no other file, so the copy is used.
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, resources=where, record_timing=False).execute()
    write_file(NOTEBOOK, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main()
