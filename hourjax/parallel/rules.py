"""Sharding rules: the one table from logical axes to mesh axes.

Parameters name their axes where they are made (`models.layers`), activations
where they are constrained. Neither names a mesh axis.
"""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hourjax.errors import UserError
from hourjax.kernels.attention import choose_implementation
from hourjax.kernels.sharded import Sharding

Axes = Sequence[str | None]

ACTIVATIONS: dict[str, tuple[str, ...]] = {
  "rows": ("data", "fsdp"),
  "memory": ("seq",),
  "queries": ("seq",),
  "positions": ("seq",),
  "images": ("data", "fsdp", "seq", "tensor"),
}
PARAMETERS: dict[str, tuple[str, ...]] = {
  "layers": (),
  # Split in storage, and gathered layer by layer for use (FSDP): the width of
  # the decoder, and that of the tower, which few numbers divide.
  "width": ("fsdp", "seq"),
  "tower": ("fsdp",),
  "table": ("fsdp",),
  # Split in storage and in use.
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "words": ("seq", "tensor"),
}
RULES = ACTIVATIONS | PARAMETERS
# Mesh axes over which parameters stay split in a product; over all other axes
# they have been gathered.
_IN_USE = ("tensor",)


def spec(*axes: str | None) -> P:
  """Returns how an array with these logical axes is split.

  Args:
    *axes: a name of `RULES` or None for each dimension.

  Raises:
    ValueError: no rule has this name.
  """
  return P(*(_names(axis) or None for axis in axes))


def in_use(*axes: str | None) -> P:
  """Returns how a parameter is still split after it was gathered for a product.

  Args:
    *axes: its logical axes.
  """
  return P(
    *(tuple(n for n in _names(axis) if n in _IN_USE) or None for axis in axes)
  )


def _names(axis: str | None) -> tuple[str, ...]:
  """Returns the mesh axes of a logical axis."""
  if axis is not None and axis not in RULES:
    raise ValueError(
      f"no sharding rule for axis {axis!r}; known are {', '.join(RULES)}"
    )
  return () if axis is None else RULES[axis]


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Asks the compiler to split x by its logical axes, if a mesh is set."""
  if not has_mesh():
    return x
  return jax.lax.with_sharding_constraint(x, spec(*axes))


def has_mesh() -> bool:
  """Returns whether a mesh with our axes and several devices is set."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and "seq" in mesh.shape and mesh.size > 1


def parts(axis: str) -> int:
  """Returns into how many parts the mesh that is set splits a logical axis."""
  if not has_mesh():
    return 1
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[name] for name in RULES[axis])


def check_attention(
  mesh: jax.sharding.Mesh,
  implementation: str,
  dtype: jax.typing.DTypeLike,
  head_dim: int,
) -> None:
  """Checks that the devices of a mesh run an implementation of attention.

  Args:
    mesh: of the devices.
    implementation: `config.model.attention.implementation`.
    dtype: of the model's computation.
    head_dim: of its attention.

  Raises:
    UserError: the platform, the GPU or the sizes rule it out.
  """
  name = None if implementation == "platform" else implementation
  q = jax.ShapeDtypeStruct((1, 1, 1, head_dim), dtype)
  try:
    choose_implementation(name, Sharding(mesh), q)
  except ValueError as error:
    raise UserError(f"config.model.attention.implementation: {error}") from None


def attention_sharding(kind: str) -> Sharding | None:
  """Returns how the mesh that is set splits the arrays of attention.

  Args:
    kind: "self"; or "cross" for queries that attend to a memory, of which each
      device keeps its own part.
  """
  if not has_mesh():
    return None
  mesh = jax.sharding.get_abstract_mesh()
  (length,) = RULES["memory"]
  (heads,) = RULES["heads"]
  common = {"mesh": mesh, "rows": RULES["rows"], "heads": heads}
  if kind == "cross":
    return Sharding(**common, memory=length, queries=True)
  return Sharding(**common, sequence=length)


def param_shardings(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  shapes: Mapping[str, Sequence[int]],
  axes: Mapping[str, Axes],
) -> dict[str, NamedSharding]:
  """Returns how each parameter is stored.

  Args:
    mesh: with the axes of `mesh.AXES`.
    shapes: of the parameters, by path.
    axes: their logical axes, by path.

  Raises:
    UserError: a dimension that its mesh axes do not divide.
    ValueError: an axis without a rule, or a rule that no parameter uses.
  """
  used = {axis for names in axes.values() for axis in names}
  unmatched = sorted(set(PARAMETERS) - used)
  if unmatched:
    raise ValueError(
      f"the sharding rules for {', '.join(unmatched)} match no parameter;"
      " remove them or name the axes of the parameters so"
    )
  problems = []
  for path, shape in shapes.items():
    for axis, size in zip(axes[path], shape, strict=True):
      names = () if axis is None else RULES.get(axis, ())
      count = math.prod(mesh.shape[name] for name in names)
      if size % count:
        product = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
        problems.append(
          f"{path}: {axis} of {size} cannot be split over {product}"
        )
  if problems:
    shown = "\n  ".join(problems[:8])
    raise UserError(
      f"config.mesh does not divide {len(problems)} dimensions of parameters;"
      f" choose other sizes (data splits no parameter):\n  {shown}"
    )
  return {path: NamedSharding(mesh, spec(*axes[path])) for path in shapes}
