import jax
import pytest

from hourjax.errors import UserError
from hourjax.parallel.mesh import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
  "config, sizes",
  [
    (MeshConfig(), (1, 8, 1, 1)),
    (MeshConfig(fsdp=2, seq=4), (1, 2, 4, 1)),
    (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 1, 2)),
    (MeshConfig(data=8, fsdp=1), (8, 1, 1, 1)),
  ],
)
def test_sizes(config, sizes):
  assert config.sizes(8) == sizes


@pytest.mark.parametrize(
  "config, words",
  [
    (MeshConfig(fsdp=2, seq=2), r"4 devices and there are 8"),
    (MeshConfig(seq=3), r"takes 3 x n devices and there are 8"),
    (MeshConfig(seq=16), r"seq=16.* and there are 8"),
  ],
)
def test_sizes_that_do_not_fill_the_devices(config, words):
  with pytest.raises(UserError, match=words):
    config.sizes(8)


@pytest.mark.parametrize(
  "values, words",
  [
    ({"seq": 0}, "config.mesh.seq is 0"),
    ({"tensor": -1}, "config.mesh.tensor is -1"),
    ({"data": -1}, "both -1"),
    ({"slices": -2}, "config.mesh.slices is -2"),
  ],
)
def test_values_out_of_range(values, words):
  with pytest.raises(UserError, match=words):
    MeshConfig(**values)


def test_axes_of_a_mesh():
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  assert mesh.axis_names == AXES and mesh.size == 1


def test_slices_lie_along_data():
  with pytest.raises(UserError, match=r"data=1 cannot be split over 2 slices"):
    MeshConfig(slices=2).sizes(8, slices=2)
  with pytest.raises(UserError, match=r"slices is 4 .* are of 2 slices"):
    MeshConfig(data=4, slices=4).sizes(8, slices=2)
  assert MeshConfig(data=4).sizes(8, slices=2) == (4, 2, 1, 1)
