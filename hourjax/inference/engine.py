"""Rows of memories and prompts on the devices, in few different shapes."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int

from hourjax import progress
from hourjax.data.layout import Layout
from hourjax.data.repository import Repository
from hourjax.data.rows import (
  RowSpec,
  Sample,
  Size,
  Visual,
  build_row,
  stack_rows,
)
from hourjax.data.sequence_sharding import deal
from hourjax.errors import UserError
from hourjax.inference import steps
from hourjax.inference.sampling import Draw
from hourjax.models.attention import KeysValues
from hourjax.models.config import ModelConfig
from hourjax.models.params import (
  as_bits,
  narrow_dtype,
  param_axes,
  param_shapes,
)
from hourjax.parallel.rules import param_shardings
from hourjax.training.batch_sharding import BatchSharding

_SLOW = 10**9  # parameters on a CPU
_LEAST = 128  # of every capacity: whole tiles, and divided by many meshes


@dataclasses.dataclass(frozen=True)
class EncodedMemory:
  """A memory that prompts can be asked about.

  Attributes:
    arrays: on the devices; None where there is nothing to see.
    kept: memory tokens of `arrays.kept`, in that order.
    room: capacity of `arrays.kept`.
    places: for each place of `arrays.segment` its token's number in the
      memory; -1 is padding.
  """

  arrays: steps.MemoryCache | None = None
  kept: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int32)
  )
  room: int = 0
  places: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int32)
  )


class _Layers:
  """A bar over layers that have read a prompt.

  One for the process, as compiled programs know whom they call.
  """

  def __init__(self):
    self._bar = None

  def __call__(self) -> None:
    if self._bar is not None:
      self._bar.update(1)

  @contextlib.contextmanager
  def shown(self, layers: int) -> Iterator[None]:
    with progress.bar(
      layers, unit="layer", desc="reading the question"
    ) as self._bar:
      try:
        yield
      finally:
        self._bar = None


_LAYERS = _Layers()


class Engine:
  """A model on the devices of a mesh.

  Attributes:
    config: of the model.
    params: by path; what products use is in the compute dtype. The CPU is
      given the same memory as bits (`models.params.as_bits`).
    mesh: memory is split over `seq` and heads over `tensor`.
    slow: a layer takes seconds: progress is told layer by layer, and words one
      by one.
  """

  def __init__(
    self,
    params: Mapping[str, jax.Array | np.ndarray],
    config: ModelConfig,
    mesh: Mesh,
  ):
    """Puts the parameters on the mesh.

    Raises:
      UserError: a mesh with `data` or `fsdp`, or one that divides no sizes.
    """
    check_mesh(mesh, config)
    self.config, self.mesh = config, mesh
    shardings = param_shardings(mesh, param_shapes(config), param_axes(config))
    self.params = {
      path: _put(value, narrow_dtype(path, config), shardings[path])
      for path, value in params.items()
    }
    self._given = as_bits(self.params, config)
    self._compiled: set[tuple] = set()
    numbers = sum(value.size for value in self.params.values())
    cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    self.slow = cpu and numbers >= _SLOW

  def encode_memory(
    self,
    repository: Repository,
    kind: Visual,
    visual: np.ndarray,
    kept: Int[np.ndarray, "X"],
  ) -> EncodedMemory:
    """Projects a memory, and what MemAug reads of it.

    Args:
      repository: where memory tokens come from.
      kind: of the visual input.
      visual: as in `Sample`.
      kept: memory tokens that prompts will show the decoder.
    """
    none = np.zeros(0, np.int32)
    minus = np.full(len(kept), -1, np.int32)
    layout = Layout(repository, minus, kept, minus, none, none, none)
    sample = Sample("memory", layout, kind, visual)
    size = sample.size
    images = {kind: _rounded_frames(size, kind, self._frame_tokens)}
    spec = self._spec(
      Size(
        **images,
        blends=rounded(size.blends),
        memory=rounded(size.memory),
        queries=rounded(size.queries),
      )
    )
    batch = stack_rows([build_row([sample], spec)])
    with jax.set_mesh(self.mesh), self._compiling("the memory", spec):
      arrays = steps.encode_memory(
        self._given, self._placed(batch, spec), config=self.config
      )
    numbers = np.arange(size.memory, dtype=np.int32)
    padding = np.full(spec.capacity.memory - size.memory, -1, np.int32)
    numbered = batch._replace(memory_position=np.append(numbers, padding)[None])
    places = deal(numbered, spec, self._devices).memory_position[0]
    return EncodedMemory(
      arrays, np.asarray(kept), spec.capacity.queries, places
    )

  def begin(
    self,
    known: EncodedMemory,
    layouts: Sequence[Layout],
    *,
    room: int,
    watched: Int[np.ndarray, "W"] | None = None,
  ) -> tuple[steps.DecodeState, Float32[np.ndarray, "blocks S"] | None]:
    """Reads prompts about one memory; answers can then be written.

    Args:
      known: the memory.
      layouts: of prompts; queries and decoder positions are used.
      room: tokens that an answer may have.
      watched: queries of the first prompt whose attention is looked at.

    Returns:
      Answers to be written, in rows rounded up to a power of two, and the
      attention of the watched queries by block and place of the memory.
    """
    samples = [
      Sample(f"prompt {n}", _of_kept(layout, known.kept), shares=True)
      for n, layout in enumerate(layouts)
    ]
    lengths = [len(layout.decoder_token) for layout in layouts]
    total = sum((sample.size for sample in samples), Size())
    spec = self._spec(
      Size(
        memory=known.room,  # stands for the kept tokens, dealt as they are
        queries=rounded(total.queries),
        decoder=rounded(total.decoder),
      )
    )
    placed = self._placed(stack_rows([build_row(samples, spec)]), spec)
    rows = padded_rows(len(layouts))
    last, start, length = (np.zeros(rows, np.int32) for _ in range(3))
    start[: len(layouts)] = np.cumsum([0, *lengths[:-1]])
    length[: len(layouts)] = lengths
    last[: len(layouts)] = [layout.decoder_token[-1] for layout in layouts]
    told = _LAYERS if self.slow else None
    with jax.set_mesh(self.mesh), self._layers(known.arrays is not None, spec):
      augmented, shares = None, None
      if known.arrays is not None:
        augmented, shares = steps.read_memory(
          self._given,
          known.arrays,
          placed,
          None if watched is None else self._watched(watched, spec),
          config=self.config,
          told=told,
        )
      cache = steps.prefill(
        self._given,
        augmented,
        placed,
        jnp.asarray(start),
        config=self.config,
        capacity=rounded(max(lengths) + room),
        told=told,
      )
      if told is not None:
        jax.block_until_ready(cache)
        jax.effects_barrier()
    # The last token of a prompt is written once more, which tells what
    # comes after it.
    writing = steps.DecodeState(
      cache=cache,
      length=jnp.asarray(np.maximum(length - 1, 0)),
      token=jnp.asarray(last),
      written=jnp.full((rows, rounded(room, 16)), -1, jnp.int32),
      count=jnp.zeros(rows, jnp.int32),
      done=jnp.arange(rows) >= len(layouts),
    )
    return writing, None if shares is None else np.asarray(shares)[:, 0]

  def write(
    self,
    writing: steps.DecodeState,
    how: Draw,
    *,
    stop: Sequence[int],
    limit: int,
    tokens: int,
  ) -> steps.DecodeState:
    """Up to so many tokens more; see `steps.write`."""
    shapes = writing.cache.k.shape, writing.written.shape
    with jax.set_mesh(self.mesh), self._compiling("the answer", shapes):
      return steps.write(
        self._given,
        writing,
        how,
        jnp.asarray(stop, jnp.int32),
        jnp.int32(limit),
        jnp.int32(tokens),
        config=self.config,
      )

  def extend(
    self, writing: steps.DecodeState, tokens: Sequence[int], *, room: int
  ) -> steps.DecodeState:
    """The next turn of the one answer being written.

    Args:
      writing: of one row; used up.
      tokens: of the turn, after what is cached.
      room: tokens that the next answer may have.
    """
    needed = int(writing.length[0]) + len(tokens) + room
    writing = _grown(writing, rounded(needed), rounded(room, 16))
    padded = np.zeros((1, rounded(len(tokens), 32)), np.int32)
    padded[0, : len(tokens)] = tokens
    shapes = writing.cache.k.shape, padded.shape
    with jax.set_mesh(self.mesh), self._compiling("the next turn", shapes):
      return steps.extend(
        self._given,
        writing,
        jnp.asarray(padded),
        jnp.asarray([len(tokens)], jnp.int32),
        config=self.config,
      )

  def _compiling(self, what: str, shapes: Any):
    """Says so if it takes long; what has run once does not compile again."""
    if (what, shapes) in self._compiled:
      return contextlib.nullcontext()
    self._compiled.add((what, shapes))
    return progress.step(f"compiling the model for {what}")

  def _layers(self, memory: bool, spec: RowSpec):
    """Tells of the layers of a prompt, or only that they are compiled."""
    if not self.slow:
      return self._compiling("the question", spec)
    config = self.config
    return _LAYERS.shown(config.decoder.layers + memory * config.memaug_layers)

  @property
  def _frame_tokens(self) -> int:
    return self.config.pool_side**2

  @property
  def _devices(self) -> int:
    return self.mesh.shape["seq"]

  def _spec(self, capacity: Size) -> RowSpec:
    return row_spec(self.config, capacity)

  def _placed(self, batch, spec):
    return BatchSharding(self.mesh, spec, 1)(batch)

  def _watched(self, queries, spec):
    """Queries in the order in which the devices hold them, padded."""
    each = spec.capacity.queries // self._devices
    queries = np.asarray(queries)
    places = queries % self._devices * each + queries // self._devices
    padded = np.full((1, rounded(len(queries))), -1, np.int32)
    padded[0, : len(queries)] = places
    return jnp.asarray(padded)


def check_mesh(mesh: Mesh, config: ModelConfig) -> None:
  """Refuses a mesh that an engine cannot use.

  Raises:
    UserError: it has `data` or `fsdp`, or divides no sizes.
  """
  heads, tensor = config.decoder.kv_heads, mesh.shape["tensor"]
  if heads % tensor:
    raise UserError(
      f"the model's {heads} KV heads cannot be split over tensor = {tensor}"
      " devices; choose a divisor, and split memory over seq"
    )
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  if rows != 1:
    raise UserError(
      f"answers are split over seq and tensor, and the mesh has data x fsdp ="
      f" {rows}; set these to 1, and start a process for each share of the"
      " questions"
    )


def row_spec(config: ModelConfig, capacity: Size) -> RowSpec:
  """Static shapes of rows of a model."""
  return RowSpec(
    capacity=capacity,
    frame_tokens=config.pool_side**2,
    tile_tokens=config.vision.side**2,
    width=config.vision.width,
    image_size=config.vision.image_size,
  )


def padded_rows(rows: int) -> int:
  """The next power of two, so that few batches have to be compiled."""
  return 1 << (rows - 1).bit_length()


def rounded(length: int, least: int = _LEAST) -> int:
  """The next of 1, 2, 3, 4, 6, 8, 12, ... times `least`; 0 stays 0.

  So that few shapes have to be compiled.
  """
  if not length:
    return 0
  size = least
  while size < length:
    if size + size // 2 >= length and size > least:
      return size + size // 2
    size *= 2
  return size


def _rounded_frames(size: Size, kind: Visual, tokens: int) -> int:
  count = getattr(size, kind)
  if kind == "features":
    return rounded(count // tokens) * tokens
  return rounded(count, 1)


def _of_kept(layout: Layout, kept: np.ndarray) -> Layout:
  """Query sources as numbers among the kept tokens."""
  if not len(kept):
    return layout
  order = np.argsort(kept, kind="stable")
  source = layout.query_source
  place = order[np.searchsorted(kept[order], np.maximum(source, kept.min()))]
  return dataclasses.replace(
    layout, query_source=np.where(source < 0, -1, place).astype(np.int32)
  )


def _put(value, dtype: np.dtype, sharding) -> jax.Array:
  """Where it shall lie, in its dtype; as it is, if that is so already."""
  if not isinstance(value, jax.Array) or value.dtype != dtype:
    value = np.asarray(value).astype(dtype, copy=False)
  return jax.device_put(value, sharding)


def _grown(writing, capacity: int, room: int):
  """With at least that much room in the cache and for the answer."""
  extra = max(0, capacity - writing.cache.k.shape[2])
  width = ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))
  cache = KeysValues(*(jnp.pad(x, width) for x in writing.cache))
  room = max(room, writing.written.shape[1])
  written = jnp.full((len(writing.length), room), -1, jnp.int32)
  return writing._replace(cache=cache, written=written)
