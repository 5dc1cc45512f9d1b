"""Two real processes of one JAX cluster read the same plan."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hourjax.data import synthetic
from hourjax.data.dataset import Dataset, SampleOptions
from hourjax.data.packing.row_plan import PlanOptions, RowPlan
from hourjax.data.pipeline import batches
from hourjax.data.prepared import Prepared
from hourjax.data.rows import RowSpec, Size
from hourjax.data.store.features import FeatureStore

ROOT = Path(__file__).parents[2]
STEPS, ROWS = 6, 4
SPEC = RowSpec(
  Size(features=4 * 4000, memory=5 * 4000, queries=6000, decoder=6000),
  4,
  16,
  8,
  8,
)
HOST = """
import sys
import jax
from pathlib import Path
from tests.data.test_pipeline_hosts import write_steps
port, index, start, root, batch_samples = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
host = (jax.process_index(), jax.process_count())
assert host == (int(index), 2)
write_steps(Path(root), int(start), host, int(batch_samples))
"""


def write_steps(root, start, host, batch_samples):
  """What a host's rows are in each step, and where the next one starts."""
  prepared = Prepared(root / "text")
  dataset = Dataset(
    prepared.records,
    prepared.columns,
    tokenizer=synthetic.tokenizer(),
    spec=SPEC,
    options=SampleOptions(seed=4),
    media_root=root,
    features=FeatureStore(root / "store"),
  )
  assert not dataset.skipped
  plan = RowPlan(
    dataset.sizes,
    SPEC.capacity,
    PlanOptions(seed=4, share=2, batch_samples=batch_samples),
    memory=prepared.columns.video,
  )
  index, hosts = host
  mine = np.array_split(np.arange(ROWS), hosts)[index].tolist()
  stream = batches(dataset, plan, SPEC, rows=ROWS, start=start, mine=mine)
  for step in range(STEPS):
    made = next(stream)
    np.savez(
      root / f"{step}-{host[0]}-of-{host[1]}.npz",
      position=made.position,
      **{k: v.view("u2") if v.dtype.kind == "V" or v.dtype == "bfloat16" else v
         for k, v in made.batch._asdict().items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("cluster")
  _, durations = synthetic.write_features(folder / "store", SPEC, 6e-4, 0)
  synthetic.write_conversations(folder / "text", len(durations), 3)
  return folder


def _free_port():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def _steps(root, host):
  paths = [root / f"{k}-{host[0]}-of-{host[1]}.npz" for k in range(STEPS)]
  return [dict(np.load(path)) for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize("batch_samples", [0, 5])
def test_two_processes_read_the_batches_of_one(root, batch_samples):
  write_steps(root, 0, (0, 1), batch_samples)
  whole = _steps(root, (0, 1))
  # The cluster starts where one process was after its second step.
  start = int(whole[1]["position"])
  port = _free_port()
  values = [(port, i, start, root, batch_samples) for i in range(2)]
  hosts = [
    subprocess.Popen([sys.executable, "-c", HOST, *map(str, each)], cwd=ROOT)
    for each in values
  ]
  assert [host.wait(120) for host in hosts] == [0, 0]
  parts = [_steps(root, (i, 2)) for i in range(2)]
  assert max(step["query_reads"].max() for step in whole) > 1
  for one, *halves in zip(whole[2:], *parts, strict=False):
    for name, array in one.items():
      if name == "position":
        assert all(half[name] == array for half in halves)
      else:
        together = np.concatenate([half[name] for half in halves])
        np.testing.assert_array_equal(together, array, err_msg=name)
