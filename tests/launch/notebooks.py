"""Notebooks run from their first cell to the last, without a browser.

  python -m tests.launch.notebooks

runs launch/evaluate.ipynb on the demo in ./work and saves it with what it
shows. Bars and warnings, which stderr gets, are left out.
"""

import hashlib
import json
import os
import pathlib

import nbclient
import nbformat

NOTEBOOK = pathlib.Path(__file__).parents[2] / "launch" / "evaluate.ipynb"


def execute(
  path: pathlib.Path,
  folder: pathlib.Path,
  work: str | os.PathLike,
  timeout: int = 600,
) -> nbformat.NotebookNode:
  """The notebook with what it shows; its file stays as it is.

  Args:
    path: of the notebook.
    folder: to start it from.
    work: HOURJAX_WORK of it.
    timeout: seconds of a cell.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
  """
  notebook = nbformat.read(path, as_version=4)
  for cell in code_cells(notebook):
    cell.outputs, cell.execution_count = [], None
  client = nbclient.NotebookClient(
    notebook,
    timeout=timeout,
    kernel_name="python3",
    record_timing=False,
    coalesce_streams=True,
    resources={"metadata": {"path": str(folder)}},
  )
  return client.execute(env={**os.environ, "HOURJAX_WORK": str(work)})


def code_cells(
  notebook: nbformat.NotebookNode,
) -> list[nbformat.NotebookNode]:
  """In order."""
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
  """Of all code cells."""
  return [out for cell in code_cells(notebook) for out in cell.outputs]


def fingerprint(notebook: nbformat.NotebookNode) -> str:
  """Of the code: tells whether outputs are of the cells as they are now."""
  code = json.dumps([cell.source for cell in code_cells(notebook)])
  return hashlib.sha256(code.encode()).hexdigest()[:16]


def record(path: pathlib.Path) -> None:
  """Runs a notebook on ./work, from its own folder, and saves it."""
  notebook = execute(path, path.parent, "work")
  for cell in code_cells(notebook):
    cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
  notebook.metadata["recorded"] = fingerprint(notebook)
  nbformat.write(notebook, path)


if __name__ == "__main__":
  record(NOTEBOOK)
