"""Settings that fit: which are taken, and what is said where none are."""

import dataclasses

import pytest

from configs import finetune
from hourjax.errors import UserError
from hourjax.models.config import HOUR_LLAVA_3B, HOUR_LLAVA_7B
from hourjax.models.lora import LoraConfig
from hourjax.parallel import gpus
from hourjax.parallel.chips import CHIPS
from hourjax.parallel.gpus import GPUS, named_devices
from hourjax.parallel.mesh import MeshConfig
from hourjax.planning.compiler.compiled_step import compile_step
from hourjax.planning.one_host import fit_one_host, row_of
from hourjax.planning.plan import evaluate
from hourjax.planning.topology import parse_topology
from hourjax.planning.workload import make_workload
from hourjax.training.config import build_experiment

GIB = 2**30
LORA = LoraConfig(rank=16)
# Size, chip and rank -> base and where layers' inputs wait, as documented.
CHOSEN = {
  ("3b", "v5e-1", 16): ("bfloat16", "host"),
  ("3b", "v6e-1", 16): ("bfloat16", "device"),
  ("3b", "rtx4090", 16): ("bfloat16", "device"),
  ("3b", "l4", 16): ("bfloat16", "device"),
  ("3b", "v5e-8", 16): ("bfloat16", "device"),
  ("3b", "v5e-8", 0): ("bfloat16", "host"),
  ("3b", "v6e-8", 0): ("bfloat16", "device"),
  ("7b", "v5e-1", 16): ("nf4", "host"),
  ("7b", "rtx4090", 16): ("int8", "host"),
  ("7b", "v6e-1", 16): ("bfloat16", "host"),
  ("7b", "v6e-4", 16): ("bfloat16", "device"),
  ("7b", "h100", 16): ("bfloat16", "device"),
}


@pytest.mark.parametrize("size, chip, rank", CHOSEN)
def test_what_is_chosen(size, chip, rank, capsys):
  config = finetune.get_config(f"size={size},chip={chip},rank={rank}")
  made = build_experiment(config.to_dict())
  assert (made.lora.base, made.model.offload) == CHOSEN[size, chip, rank]
  assert made.lora.rank == rank
  found, count = named_devices(chip)
  assert made.batch_rows == made.mesh.fsdp == count
  said = capsys.readouterr().err
  assert f"note: {count} x {found.name}: " in said
  assert (made.model.offload == "host") == ("wait" in said)
  assert not made.reads_pixels


@pytest.mark.parametrize("model", [HOUR_LLAVA_3B, HOUR_LLAVA_7B])
def test_more_memory_never_costs_more(model):
  """A larger chip takes settings that are at most as slow."""
  order = ["bfloat16device", "bfloat16host", "int8device", "int8host",
           "nf4host"]  # fmt: skip
  known = sorted({**CHIPS, **GPUS}.values(), key=lambda chip: chip.limit)
  places = []
  for chip in known:
    try:
      settings = fit_one_host(model, chip, 1, options=LORA).settings
    except UserError:
      places.append(len(order))
      continue
    name = settings["lora.base"] + settings["model.offload"]
    places.append(order.index(name))
  assert places == sorted(places, reverse=True) and places[-1] == 0


@pytest.mark.parametrize(
  "arg, message",
  [
    ("size=3b,chip=v5e-1,rank=0", r"needs 5\d\.\d GiB of each of 1 v5e .*"
     r"memory and its gradient 1\.8.*rank=16 trains adapters, which fit"),
    ("size=3b,chip=v5e-1,hours=8", r"hours=\d[\d.]* fits; chip=\w+ fits"),
    ("size=7b,chip=v5e-8,rank=0", r"rank=16 trains adapters"),
    ("size=3b,chip=v9", r"chip=v9 is unknown.*known are v4, v5e"),
    ("size=3b,chip=v5e-0", r"chip=v5e-0 is unknown"),
    ("size=3b,chip=auto", r"found no TPU and no NVIDIA GPU"),
    ("size=3b,chip=v5e,rank=5000", r"rank is 5000, and .* lower the rank"),
  ],
)  # fmt: skip
def test_what_does_not_fit_names_the_smallest_change(arg, message):
  with pytest.raises(UserError, match=message):
    finetune.get_config(arg)


def test_the_smallest_change_is_enough():
  with pytest.raises(UserError) as error:
    finetune.get_config("size=3b,chip=v5e-1,hours=8")
  hours = str(error.value).partition("hours=")[2].partition(" ")[0]
  finetune.get_config(f"size=3b,chip=v5e-1,hours={hours}")
  with pytest.raises(UserError):
    finetune.get_config(f"size=3b,chip=v5e-1,hours={float(hours) + 0.05:g}")


def test_a_row_holds_the_hours(capsys):
  size = row_of(1.0, HOUR_LLAVA_3B)
  assert size.features == 3600 * 64 and size.memory >= 3600 * 65
  assert size.queries > 512 * 17 and size.decoder > size.queries
  short = row_of(0.01, HOUR_LLAVA_3B)
  assert short.features == 128 * 64


def test_gpus_are_found_by_their_driver(monkeypatch):
  answers = {"names": "NVIDIA H100 80GB HBM3\nNVIDIA H100 80GB HBM3\n"}

  def run(*_, **__):
    return type("Answer", (), {"stdout": answers["names"]})()

  monkeypatch.setattr(gpus.subprocess, "run", run)
  assert named_devices("auto", {}) == (GPUS["h100"], 2)
  answers["names"] = "NVIDIA GeForce GTX 1080\n"
  with pytest.raises(UserError, match="found NVIDIA GeForce GTX 1080, which"):
    named_devices("auto", {})
  with pytest.raises(UserError, match="JAX_PLATFORMS is cpu"):
    named_devices("auto", {"JAX_PLATFORMS": "cpu"})


@pytest.mark.slow
@pytest.mark.parametrize("base, offload", [("bfloat16", "host")])
def test_3b_on_one_chip_of_v5e_by_the_compiler(base, offload):
  """An hour of video fits, and the formulas say about what it takes."""
  config = finetune.get_config("size=3b,chip=v5e-1")
  made = build_experiment(config.to_dict())
  made = dataclasses.replace(
    made,
    lora=dataclasses.replace(made.lora, base=base),
    model=dataclasses.replace(made.model, offload=offload),
    mesh=MeshConfig(fsdp=1),
  )
  topology = parse_topology("v5e:1x1")
  workload = make_workload(made, "video=3600")
  plan = evaluate(
    made, topology, workload, compile_step(made, topology, workload), 0.0
  )
  assert plan.fits and plan.memory.total < 14.5 * GIB
  said = fit_one_host(HOUR_LLAVA_3B, CHIPS["v5e"], 1, options=made.lora).total
  assert said == pytest.approx(plan.memory.total, rel=0.08)
