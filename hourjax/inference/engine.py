"""The engine: a model on a mesh that encodes memories and decodes answers."""

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jaxtyping import Float32, Int
from tqdm import tqdm

from hourjax import progress
from hourjax.batch import Batch
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
from hourjax.data.sequence_sharding import sequence_sharding_order
from hourjax.errors import UserError
from hourjax.inference import steps
from hourjax.inference.sampling import RowSampling
from hourjax.models.attention import KeysValues
from hourjax.models.config import ModelConfig
from hourjax.models.params import (
  as_bits,
  narrow_dtype,
  param_axes,
  param_shapes,
)
from hourjax.parallel.rules import check_attention, param_shardings
from hourjax.training.batch_sharding import BatchSharding

# On a CPU, a model of this many parameters takes seconds a layer.
_SLOW_PARAMETERS = 10**9
# Capacities are multiples of this: whole tiles, divisible by many mesh sizes.
_CAPACITY_STEP = 128


@dataclasses.dataclass(frozen=True)
class EncodedMemory:
  """Holds a memory cache, and the place of each memory token in it.

  Without arguments: the memory of a prompt of text alone, which has no tokens.

  Attributes:
    cache: arrays on the devices; None for an empty memory.
    kept: indices of the memory tokens of `cache.kept`, in its order.
    kept_capacity: length of `cache.kept`, padding included.
    token_index: index of the memory token at each place of `cache.segment`,
      which sequence sharding reorders; -1 is padding.
  """

  cache: steps.MemoryCache | None = None
  kept: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int32)
  )
  kept_capacity: int = 0
  token_index: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros(0, np.int32)
  )


class _LayerProgress:
  """Shows a progress bar over the layers through which a prompt has run.

  There is one object for the process, since a compiled program keeps the
  callback that it was traced with.
  """

  def __init__(self) -> None:
    self._bar: tqdm | None = None

  def __call__(self) -> None:
    """Counts one layer."""
    if self._bar is not None:
      self._bar.update(1)

  @contextlib.contextmanager
  def over(self, layers: int) -> Iterator[None]:
    """Shows the bar, over so many layers, while the context lasts."""
    with progress.bar(
      layers, unit="layer", desc="reading the question"
    ) as self._bar:
      try:
        yield
      finally:
        self._bar = None


_LAYER_PROGRESS = _LayerProgress()


class Engine:
  """Encodes memories, prefills prompts and decodes answers on a mesh.

  Lengths are rounded up to few capacities, so that few shapes are compiled.

  Attributes:
    config: configuration of the model.
    params: parameters by path; kernels are in the compute dtype. On a CPU the
      compiled steps get the same buffers as bits (`models.params.as_bits`).
    mesh: memory is split over `seq`, heads over `tensor`.
    slow: True where one layer takes seconds. Progress is then shown layer by
      layer, and an answer is streamed token by token.
  """

  def __init__(
    self,
    params: Mapping[str, jax.Array | np.ndarray],
    config: ModelConfig,
    mesh: Mesh,
  ):
    """Puts the parameters on the mesh.

    Raises:
      UserError: the mesh has `data` or `fsdp`, or does not divide the heads.
    """
    check_mesh(mesh, config)
    self.config, self.mesh = config, mesh
    shardings = param_shardings(mesh, param_shapes(config), param_axes(config))
    self.params = {
      path: _place(value, narrow_dtype(path, config), shardings[path])
      for path, value in params.items()
    }
    self._step_params = as_bits(self.params, config)
    self._compiled: set[Hashable] = set()
    count = sum(value.size for value in self.params.values())
    on_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    self.slow = on_cpu and count >= _SLOW_PARAMETERS

  def encode_memory(
    self,
    repository: Repository,
    kind: Visual,
    visual: np.ndarray,
    kept: Int[np.ndarray, "X"],
  ) -> EncodedMemory:
    """Projects a memory to the keys and values that MemAug reads.

    Args:
      repository: where each memory token comes from.
      kind: kind of the visual input, as in `Sample`.
      visual: the visual input, as in `Sample`.
      kept: indices of the memory tokens that forgetting keeps.
    """
    empty = np.zeros(0, np.int32)
    minus = np.full(len(kept), -1, np.int32)
    layout = Layout(repository, minus, kept, minus, empty, empty, empty)
    sample = Sample("memory", layout, kind, visual)
    size = sample.size
    visual_size = {kind: _rounded_visual(size, kind, self.config.pool_side**2)}
    spec = row_spec(
      self.config,
      Size(
        **visual_size,
        blends=rounded(size.blends),
        memory=rounded(size.memory),
        queries=rounded(size.queries),
      ),
    )
    batch = stack_rows([build_row([sample], spec)])
    with jax.set_mesh(self.mesh), self._compiling("the memory", spec):
      cache = steps.encode_memory(
        self._step_params, self._on_devices(batch, spec), config=self.config
      )
    # Sequence sharding reorders `memory_position`. Given the tokens' indices
    # instead of positions, it returns which token lies at each place.
    index = np.arange(size.memory, dtype=np.int32)
    padding = np.full(spec.capacity.memory - size.memory, -1, np.int32)
    indexed = batch._replace(memory_position=np.append(index, padding)[None])
    token_index = sequence_sharding_order(
      indexed, spec, self.mesh.shape["seq"]
    ).memory_position[0]
    return EncodedMemory(
      cache, np.asarray(kept), spec.capacity.queries, token_index
    )

  def prefill(
    self,
    memory: EncodedMemory,
    layouts: Sequence[Layout],
    *,
    max_tokens: int,
    probe_queries: Int[np.ndarray, "W"] | None = None,
  ) -> tuple[steps.DecodeState, Float32[np.ndarray, "blocks S"] | None]:
    """Reads prompts about one memory, so that answers can be decoded.

    Args:
      memory: the memory that all prompts ask about.
      layouts: layouts of the prompts. Their queries and decoder positions are
        used.
      max_tokens: longest answer that the KV cache has room for.
      probe_queries: indices of the queries of the first prompt whose attention
        is returned.

    Returns:
      The state of the answers, its rows rounded up to a power of two; and the
      attention that each place of the memory cache gets from the probe queries
      in each block (None without probe queries).
    """
    samples = [
      Sample(
        f"prompt {n}", _count_kept(layout, memory.kept), reuses_memory=True
      )
      for n, layout in enumerate(layouts)
    ]
    lengths = [len(layout.decoder_token) for layout in layouts]
    total = sum((sample.size for sample in samples), Size())
    spec = row_spec(
      self.config,
      Size(
        # The row's memory stands for the kept tokens, in the order in which
        # the cache has them.
        memory=memory.kept_capacity,
        queries=rounded(total.queries),
        decoder=rounded(total.decoder),
      ),
    )
    batch = self._on_devices(stack_rows([build_row(samples, spec)]), spec)
    rows = padded_rows(len(layouts))
    last, start, length = (np.zeros(rows, np.int32) for _ in range(3))
    start[: len(layouts)] = np.cumsum([0, *lengths[:-1]])
    length[: len(layouts)] = lengths
    last[: len(layouts)] = [layout.decoder_token[-1] for layout in layouts]
    on_layer = _LAYER_PROGRESS if self.slow else None
    layers = self.config.decoder.layers
    if memory.cache is not None:
      layers += self.config.memaug_layers
    with jax.set_mesh(self.mesh), self._reading(layers, spec):
      augmented, attention = None, None
      if memory.cache is not None:
        probes = None
        if probe_queries is not None:
          probes = self._sharded_queries(probe_queries, spec)
        augmented, attention = steps.read_memory(
          self._step_params,
          memory.cache,
          batch,
          probes,
          config=self.config,
          on_layer=on_layer,
        )
      cache = steps.prefill(
        self._step_params,
        augmented,
        batch,
        jnp.asarray(start),
        config=self.config,
        capacity=rounded(max(lengths) + max_tokens),
        on_layer=on_layer,
      )
      if on_layer is not None:
        jax.block_until_ready(cache)
        jax.effects_barrier()
    # The last token of a prompt is decoded once more: that gives the logits of
    # the first token of the answer, so `prefill` needs to compute none.
    state = steps.DecodeState(
      cache=cache,
      length=jnp.asarray(np.maximum(length - 1, 0)),
      last_token=jnp.asarray(last),
      answer=jnp.full((rows, rounded(max_tokens, 16)), -1, jnp.int32),
      count=jnp.zeros(rows, jnp.int32),
      done=jnp.arange(rows) >= len(layouts),
    )
    return state, None if attention is None else np.asarray(attention)[:, 0]

  def share_params(self, params: Mapping[str, jax.Array]) -> None:
    """Answers with these arrays from now on; steps cast them as training does.

    Args:
      params: parameters by path, on the engine's mesh.
    """
    self.params = dict(params)
    self._step_params = self.params

  def repeat(
    self, states: Sequence[tuple[steps.DecodeState, int]], times: int
  ) -> steps.DecodeState:
    """Joins the states of prompts, each several times, to decode them together.

    Of states with the prompts a b and c, twice each: a a b b c c and padding.

    Args:
      states: as `prefill` returns them, with their number of prompts.
      times: answers to each prompt.
    """
    capacity = max(state.cache.k.shape[2] for state, _ in states)
    count = times * sum(prompts for _, prompts in states)
    parts = []
    with jax.set_mesh(self.mesh):
      for number, (state, prompts) in enumerate(states):
        rows = np.repeat(np.arange(prompts), times)
        if number == len(states) - 1:  # padding, which has ended
          rows = np.append(rows, np.zeros(padded_rows(count) - count, int))
        parts.append(steps.take_rows(state, jnp.asarray(rows), capacity))
      joined = steps.join(parts)
    return joined._replace(done=jnp.arange(padded_rows(count)) >= count)

  def decode(
    self,
    state: steps.DecodeState,
    sampling: RowSampling,
    *,
    stop_tokens: Sequence[int],
    max_tokens: int,
    num_steps: int,
  ) -> steps.DecodeState:
    """Decodes up to `num_steps` tokens more of each answer.

    Args:
      state: answers so far; its buffers are donated.
      sampling: how tokens are chosen.
      stop_tokens: tokens that end an answer.
      max_tokens: longest answer.
      num_steps: most tokens that this call decodes.
    """
    shapes = state.cache.k.shape, state.answer.shape
    with jax.set_mesh(self.mesh), self._compiling("the answer", shapes):
      return steps.decode(
        self._step_params,
        state,
        sampling,
        jnp.asarray(stop_tokens, jnp.int32),
        jnp.int32(max_tokens),
        jnp.int32(num_steps),
        config=self.config,
      )

  def extend(
    self, state: steps.DecodeState, tokens: Sequence[int], *, max_tokens: int
  ) -> steps.DecodeState:
    """Appends the next turn to the one conversation that is decoded.

    Args:
      state: state of one row; its buffers are donated.
      tokens: tokens of the turn, after what is in the KV cache.
      max_tokens: longest answer that the KV cache has room for.
    """
    needed = int(state.length[0]) + len(tokens) + max_tokens
    state = _enlarged(state, rounded(needed), rounded(max_tokens, 16))
    padded = np.zeros((1, rounded(len(tokens), 32)), np.int32)
    padded[0, : len(tokens)] = tokens
    shapes = state.cache.k.shape, padded.shape
    with jax.set_mesh(self.mesh), self._compiling("the next turn", shapes):
      return steps.extend(
        self._step_params,
        state,
        jnp.asarray(padded),
        jnp.asarray([len(tokens)], jnp.int32),
        config=self.config,
      )

  def _compiling(
    self, what: str, shapes: Hashable
  ) -> contextlib.AbstractContextManager[None]:
    """Reports a slow compilation, at the first call with these shapes."""
    if (what, shapes) in self._compiled:
      return contextlib.nullcontext()
    self._compiled.add((what, shapes))
    return progress.step(f"compiling the model for {what}")

  def _reading(
    self, layers: int, spec: RowSpec
  ) -> contextlib.AbstractContextManager[None]:
    """Shows the layers that a slow model has run, or reports a compilation."""
    if self.slow:
      return _LAYER_PROGRESS.over(layers)
    return self._compiling("the question", spec)

  def _on_devices(self, batch: Batch, spec: RowSpec) -> Batch:
    return BatchSharding(self.mesh, spec, 1)(batch)

  def _sharded_queries(
    self, queries: Int[np.ndarray, "W"], spec: RowSpec
  ) -> Int[jax.Array, "1 w"]:
    """Returns the places of these queries in a sharded row, padded with -1.

    Of n devices, query t lies on device t % n, there at place t // n.
    """
    devices = self.mesh.shape["seq"]
    each = spec.capacity.queries // devices
    queries = np.asarray(queries)
    places = queries % devices * each + queries // devices
    padded = np.full((1, rounded(len(queries))), -1, np.int32)
    padded[0, : len(queries)] = places
    return jnp.asarray(padded)


def check_mesh(mesh: Mesh, config: ModelConfig) -> None:
  """Checks that an engine can use a mesh.

  Raises:
    UserError: the mesh has `data` or `fsdp`, does not divide the heads, or is
      of devices that do not run the attention that is asked for.
  """
  check_attention(
    mesh,
    config.attention.implementation,
    config.dtype,
    config.decoder.head_size,
  )
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
  """Returns the static shapes of a model's rows with this capacity."""
  return RowSpec(
    capacity=capacity,
    frame_tokens=config.pool_side**2,
    tile_tokens=config.vision.side**2,
    width=config.vision.width,
    image_size=config.vision.image_size,
  )


def padded_rows(rows: int) -> int:
  """Returns the next power of two, so that few batch sizes are compiled."""
  return 1 << (rows - 1).bit_length()


def rounded(length: int, least: int = _CAPACITY_STEP) -> int:
  """Rounds a length up to a capacity, so that few shapes are compiled.

  Capacities are 1, 2, 3, 4, 6, 8, 12, ... times `least`; 0 stays 0. With
  `least` 128: 100 -> 128, 300 -> 384, 1100 -> 1536.
  """
  if not length:
    return 0
  size = least
  while size < length:
    if size + size // 2 >= length and size > least:
      return size + size // 2
    size *= 2
  return size


def _rounded_visual(size: Size, kind: Visual, frame_tokens: int) -> int:
  """Returns the capacity for a sample's visual input."""
  count = getattr(size, kind)
  if kind == "features":
    return rounded(count // frame_tokens) * frame_tokens
  return rounded(count, 1)


def _count_kept(layout: Layout, kept: np.ndarray) -> Layout:
  """Returns a layout whose query sources are indices into the kept tokens.

  With kept 20 30 10, sources -1 30 10 20 become -1 1 2 0.
  """
  if not len(kept):
    return layout
  order = np.argsort(kept, kind="stable")
  source = layout.query_source
  place = order[np.searchsorted(kept[order], np.maximum(source, kept.min()))]
  return dataclasses.replace(
    layout, query_source=np.where(source < 0, -1, place).astype(np.int32)
  )


def _place(
  value: jax.Array | np.ndarray, dtype: np.dtype, sharding: Sharding
) -> jax.Array:
  """Puts an array on the devices in a dtype; copies nothing needlessly."""
  if not isinstance(value, jax.Array) or value.dtype != dtype:
    value = np.asarray(value).astype(dtype, copy=False)
  return jax.device_put(value, sharding)


def _enlarged(
  state: steps.DecodeState, capacity: int, answer: int
) -> steps.DecodeState:
  """Returns a state with at least this KV cache, and an empty answer."""
  extra = max(0, capacity - state.cache.k.shape[2])
  width = ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))
  cache = KeysValues(*(jnp.pad(x, width) for x in state.cache))
  answer = max(answer, state.answer.shape[1])
  empty = jnp.full((len(state.length), answer), -1, jnp.int32)
  return state._replace(cache=cache, answer=empty)
