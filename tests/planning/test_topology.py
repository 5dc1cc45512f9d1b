"""Topologies by name."""

import types

import pytest

from hourjax.errors import UserError
from hourjax.parallel.chips import CHIPS
from hourjax.planning.topology import (
  parse_topologies,
  parse_topology,
  topology_of,
)


@pytest.mark.parametrize(
  ("name", "slices", "chips", "devices", "hosts"),
  [
    ("v5e:16x16", 1, 256, 256, 64),
    ("v5e:1x1", 1, 1, 1, 1),
    ("v5e:2x4", 2, 16, 16, 4),
    ("v5p:4x8x8", 1, 256, 256, 64),
    ("tpu7x:2x2x1", 1, 4, 8, 1),
    ("v6e:4x4", 4, 64, 64, 16),
    ("h100:2", 1, 2, 2, 1),
    ("h200:32", 1, 32, 32, 4),
  ],
)
def test_sizes(name, slices, chips, devices, hosts):
  found = parse_topology(name, slices)
  assert (found.name, found.chips, found.devices, found.hosts) == (
    name,
    chips,
    devices,
    hosts,
  )


def test_a_slice_below_a_host_says_so():
  bounds = parse_topology("v5e:1x1").bounds
  assert bounds == {"chips_per_host_bounds": (1, 1, 1)}
  assert parse_topology("v5e:2x2").bounds == {}


@pytest.mark.parametrize(
  ("name", "message"),
  [
    (
      "v9:2x2",
      "no GPU that is known; known are v4, v5e",
    ),
    ("v5e", "give its chips, such as v5e:4x4"),
    ("v5e:4", "give its chips, such as v5e:4x4"),
    ("v5p:4x4", "v5p has 3 dimensions, not 2; write it as v5p:4x4x4"),
    ("v5e:32x16", "there is no such slice"),
    ("v5e:3x4", "there is no such slice"),
    ("v5e:0x4", "there is no such slice"),
    ("v5p:20x20x20", "up to 16x20x28"),
    ("h100", "give how many there are, 1, 2, 4 or a multiple of 8 up to 4096"),
    ("h100:2x4", "such as h100:8"),
    ("h100:12", "such as h100:8"),
    ("h100:0", "such as h100:8"),
  ],
)
def test_what_does_not_exist(name, message):
  with pytest.raises(UserError, match=f"--topology={name}: .*") as error:
    parse_topology(name)
  assert message in str(error.value)


def test_slices_are_at_least_one():
  with pytest.raises(UserError, match="--num_slices=0"):
    parse_topology("v5e:4x4", 0)


def test_gpus_have_no_slices():
  with pytest.raises(UserError, match="such as --topology=h100:16"):
    parse_topology("h100:8", 2)


def test_doubling_goes_on_until_the_largest():
  sizes, topology = [], parse_topology("v5p:2x2x1")
  while topology is not None:
    sizes.append(topology.chips)
    topology = topology.doubled()
  assert sizes[:3] == [4, 8, 16]
  assert parse_topology("v5e:8x8").doubled().name == "v5e:8x16"
  assert parse_topology("v5p:2x2x4").doubled().name == "v5p:2x4x4"
  assert sizes == [4 * 2**i for i in range(len(sizes))]
  assert parse_topology("v5e:16x16").doubled() is None
  assert parse_topology("v5e:8x16").doubled().name == "v5e:16x16"


def test_devices_say_what_they_belong_to():
  """Two slices of 2 x 4 chips, whose coordinates need not begin at 0."""
  devices = [
    types.SimpleNamespace(coords=(x + 2, y, 0), slice_index=number)
    for number in range(2)
    for x in range(2)
    for y in range(4)
  ]
  found = topology_of(devices, CHIPS["v5e"])
  assert found == parse_topology("v5e:2x4", 2)


def test_several_slices_and_any():
  names = [t.name for t in parse_topologies("v5e:any")]
  assert names[:4] == ["v5e:1x1", "v5e:1x2", "v5e:2x2", "v5e:2x4"]
  assert names[-1] == "v5e:16x16"
  assert [t.chips for t in parse_topologies("v5p:any")][-1] <= 256
  names = [t.name for t in parse_topologies("h100:any")]
  assert names[:5] == ["h100:1", "h100:2", "h100:4", "h100:8", "h100:16"]
  both = parse_topologies("v5e:4x4,v6e:2x4", 2)
  assert [(t.name, t.slices) for t in both] == [("v5e:4x4", 2), ("v6e:2x4", 2)]
  with pytest.raises(UserError, match="'x' is no generation"):
    parse_topologies("v5e:4x4,x:any")
