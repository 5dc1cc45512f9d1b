import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from hourjax.errors import UserError
from hourjax.kernels import attention
from hourjax.models.config import HOUR_LLAVA_3B, HOUR_LLAVA_7B, TINY
from hourjax.models.params import param_axes, param_shapes
from hourjax.parallel import rules
from hourjax.parallel.mesh import AXES


def _mesh(*sizes):
  return AbstractMesh(sizes, AXES)


def _shardings(config, mesh):
  return rules.param_shardings(mesh, param_shapes(config), param_axes(config))


@pytest.mark.parametrize(
  "config, sizes",
  [
    (HOUR_LLAVA_3B, (1, 16, 16, 1)),
    (HOUR_LLAVA_3B, (2, 128, 1, 1)),
    (HOUR_LLAVA_7B, (1, 16, 4, 1)),
    (HOUR_LLAVA_7B, (1, 8, 16, 2)),
    (TINY, (1, 2, 4, 1)),
  ],
)
def test_every_device_stores_about_an_equal_part(config, sizes):
  shapes, shardings = param_shapes(config), _shardings(config, _mesh(*sizes))
  each = sum(
    np.prod(shardings[path].shard_shape(shape))
    for path, shape in shapes.items()
  )
  whole = sum(np.prod(shape) for shape in shapes.values())
  devices = np.prod(sizes[1:])  # data holds copies
  # The tower, split by fsdp alone, and norms and biases, not split.
  tower = sum(
    np.prod(s) for path, s in shapes.items() if path.startswith("vision/")
  )
  assert each < 1.02 * (whole - tower) / devices + 1.1 * tower / sizes[1] + 3e6


def test_a_dimension_that_does_not_divide():
  with pytest.raises(UserError) as error:
    _shardings(HOUR_LLAVA_3B, _mesh(1, 256, 1, 1))
  assert "vision/encoder/layers/q/kernel: tower of 1152 cannot be split" in str(
    error.value
  )
  assert "fsdp=256" in str(error.value)


def test_a_rule_that_matches_nothing(monkeypatch):
  monkeypatch.setitem(rules.PARAMETERS, "experts", ("tensor",))
  with pytest.raises(ValueError, match="rules for experts match no parameter"):
    _shardings(TINY, _mesh(1, 1, 1, 1))


def test_an_axis_without_a_rule():
  with pytest.raises(ValueError, match="no sharding rule for axis 'colour'"):
    rules.spec("rows", "colour")


def test_specs():
  assert rules.spec("rows", "memory", None) == P(("data", "fsdp"), "seq", None)
  assert rules.in_use("width", "mlp") == P(None, "tensor")


def test_without_a_mesh_nothing_is_asked_for():
  x = jax.numpy.ones((2, 3))
  assert rules.constrain(x, "rows", None) is x
  assert rules.attention_sharding("self") is None
  assert rules.parts("images") == 1


@pytest.mark.parametrize("name", ["cudnn", "triton", "tpu"])
def test_attention_that_the_devices_do_not_run_is_refused(name):
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  said = f"config.model.attention.implementation: .*'{name}' runs on .* for cpu"
  with pytest.raises(UserError, match=said):
    rules.check_attention(mesh, name, "bfloat16", 128)
  rules.check_attention(mesh, "platform", "bfloat16", 128)


def test_attention_that_a_gpu_cannot_do_is_refused(monkeypatch):
  monkeypatch.setattr(attention, "platform", lambda sharding: "gpu")
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  rules.check_attention(mesh, "cudnn", "bfloat16", 128)
  said = "not float32; choose 'triton', or none"
  with pytest.raises(UserError, match=said):
    rules.check_attention(mesh, "cudnn", "float32", 128)
  rules.check_attention(mesh, "platform", "float32", 128)
