"""What a device holds, and what a user reads if the compiler fails."""

import numpy as np
import pytest

from configs import demo
from hourjax.errors import UserError
from hourjax.parallel.mesh import AXES, MeshConfig
from hourjax.planning import search
from hourjax.planning.compiler import compiled_step
from hourjax.planning.compiler.compile_pool import Outcome
from hourjax.planning.compiler.compiled_step import compile_step, device_memory
from hourjax.planning.topology import parse_topology
from hourjax.planning.workload import make_workload
from hourjax.training.config import build_experiment
from tests.planning.examples import experiment

GIB = 1 << 30
TOPOLOGY = parse_topology("v5e:4x4")


def _answer(**temporaries):
  common = {"seconds": 1.0, "traffic": []}
  kinds = {"parameters": 100, "gradients": 30, "batches": 7}
  return {
    "programs": {
      "accumulate": common
      | {"kinds": kinds, "temporaries": temporaries["accumulate"]},
      "update": common
      | {
        # It reads parameters that the other one does not.
        "kinds": {"parameters": 120, "gradients": 30, "optimizer": 60},
        "temporaries": temporaries["update"],
      },
    }
  }


def test_everything_that_is_there_counts_once():
  memory = device_memory(_answer(accumulate=1000, update=10), TOPOLOGY)
  assert memory.program == "accumulate"
  assert memory.batches == 14
  assert memory.total == 120 + 60 + 30 + 14 + 1000
  assert memory.limit == int(15.75 * GIB)
  assert memory.fits


def test_the_larger_program_counts_and_may_be_too_large():
  memory = device_memory(_answer(accumulate=1, update=16 * GIB), TOPOLOGY)
  assert memory.program == "update"
  assert not memory.fits


@pytest.fixture
def compiled(monkeypatch):
  found = experiment(mesh={"fsdp": 16})
  workload = make_workload(found, "full")

  def run(outcome, found=found):
    def ask(module, task, *, limit, flags):
      assert task["topology"] == "v5e:4x4" and task["unknown_trips"] >= 1
      assert f"--xla_x=1 --xla_jf_dump_to={task['folder']} " in flags
      return outcome

    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_x=1")  # the user's
    monkeypatch.setattr(compiled_step, "run_worker", ask)
    return compile_step(found, TOPOLOGY, workload)

  return run


def test_out_of_memory_is_an_answer(compiled):
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
    " for HLO temporaries (64.50G) exceeds available HBM (15.75G).\nmore"
  )
  found = compiled(Outcome({"exhausted": message, "program": "accumulate"}))
  assert found.answer is None
  assert found.needed == int(64.5 * GIB)
  assert found.reason == "accumulate: " + message.splitlines()[0]


def test_a_crash_names_the_topology(compiled):
  with pytest.raises(UserError, match=r"v5e:4x4: .*Check failed: x"):
    compiled(Outcome(None, False, "Check failed: x"))


def test_a_mistake_found_by_the_worker_is_passed_on(compiled):
  with pytest.raises(UserError, match="rows"):
    compiled(Outcome({"user_error": "rows"}))


def test_a_compiler_that_takes_too_long_is_not_a_step_that_does_not_fit(
  compiled,
):
  with pytest.raises(UserError) as error:
    compiled(Outcome(None, True, "not compiled within 900 s"))
  assert str(error.value) == (
    "--topology=v5e:4x4: the compiler did not finish within 900 s, so it is"
    " not known whether the step fits; give it more time, such as"
    " --compile_limit=1800"
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v6e:2x2"])  # as for v5e:2x2, v5p:2x2x1
def test_a_schedule_tells_what_the_whole_program_does(name, monkeypatch):
  """Traffic and arguments are the same; temporaries are counted."""
  monkeypatch.setenv("HOURJAX_COMPILATION_CACHE", "off")
  config = demo.get_config("stage=3").to_dict()
  config["model"]["memaug_layers"] = config["model"]["decoder"]["layers"] = 1
  config["mesh"] |= {"fsdp": 2, "seq": 2}
  config["optimizer"]["name"] = "adamw"
  config["batch_rows"] = 32
  found = build_experiment(config)
  workload = make_workload(found, "full")
  soon, whole = (
    compile_step(found, parse_topology(name), workload, whole=each).answer
    for each in (False, True)
  )
  assert soon["mesh"] == whole["mesh"] and soon["links"] == whole["links"]
  for program, read in whole["programs"].items():
    early = soon["programs"][program]
    assert early["traffic"] == read["traffic"]
    assert early["kinds"] == read["kinds"]
    assert early["arguments"] == pytest.approx(read["arguments"], rel=0.01)
  early, read = (
    x["programs"]["accumulate"]["temporaries"]
    - x["programs"]["accumulate"]["code"]
    for x in (soon, whole)
  )
  assert early == pytest.approx(read, rel=0.2)


def test_a_mesh_that_does_not_fill_the_devices_needs_no_compiler(compiled):
  with pytest.raises(UserError, match="takes 3 devices and there are 16"):
    compiled(None, experiment(mesh={"fsdp": 3}))


@pytest.mark.parametrize(
  "sizes, axes, devices, machines",
  [
    ({"fsdp": 8, "seq": 2}, ("seq",), 2, 1),
    ({"fsdp": 8, "seq": 2}, ("fsdp",), 8, 2),
    ({"fsdp": 8, "seq": 2}, ("fsdp", "seq"), 16, 2),
    ({"data": 2, "fsdp": 8}, ("data",), 2, 2),
    ({"data": 2, "fsdp": 8}, ("fsdp",), 8, 1),
    ({"data": 2, "fsdp": 2, "seq": 4}, ("data",), 2, 2),
    ({"fsdp": 4, "tensor": 4}, ("tensor",), 4, 1),
  ],
)
def test_gpus_of_a_group(sizes, axes, devices, machines):
  """As the worker counts them, and as the search's formulas do."""
  topology = parse_topology("h100:16")
  mesh = MeshConfig(**{"fsdp": 1} | sizes)
  shape = mesh.sizes(16)
  ids = np.arange(16).reshape(shape)
  group = ids[tuple(slice(None) if name in axes else 0 for name in AXES)]
  found = compiled_step.machine_links(group.ravel().tolist(), 8)
  assert (found["devices"], found["slices"]) == (devices, machines)
  links = search._links(dict(zip(AXES, shape)), topology)
  assert links.get("+".join(axes), found) == found
