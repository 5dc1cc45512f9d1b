"""The vision tower alone, compiled for one batch over all devices."""
# MERGED hourjax.inference.tower_params:
# Which tower extracts: a folder's, or the one that training starts from.

import functools
import hashlib
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from hourjax import progress
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig
from hourjax.models.params import (
  as_bits,
  init_params,
  narrow_dtype,
  param_shapes,
  with_params,
)
from hourjax.models.siglip import pool_frames
from hourjax.training.config import Experiment
from hourjax.weights.checkpoint import load_tower

TOWER = "vision/"
_FRAMES_PER_DEVICE = 32
_CPU_FLOPS = 10**12  # of a batch on a CPU, which has about 10^11 a second


class Encoder:
  """Pictures to pooled features, a fixed number at a time.

  Only the tower's parameters are put on the devices of this process, whole on
  each; the pictures of a batch are dealt out among them.

  Attributes:
    batch: pictures in a batch, a multiple of the number of devices.
    image_size: side of a picture in pixels.
    shape: (Q, V) of a picture's features.
  """

  def __init__(
    self,
    params: Mapping[str, Array | np.ndarray],
    config: ModelConfig,
    *,
    batch_frames: int | None = None,
  ):
    """Places the parameters and compiles.

    Args:
      params: by path; those of the tower are taken.
      config: of the model.
      batch_frames: pictures in a batch, rounded up to the devices; 32 a
        device if not given, of a large tower on a CPU fewer.
    """
    devices = jax.local_devices()
    wanted = batch_frames or _frames_at_once(config) * len(devices)
    self.batch = -(-wanted // len(devices)) * len(devices)
    self.image_size = config.vision.image_size
    self.shape = (config.pool_side**2, config.vision.width)
    params = {p: v for p, v in params.items() if p.startswith(TOWER)}
    self._source = params
    mesh = jax.make_mesh(
      (len(devices),), ("data",), (AxisType.Auto,), devices=devices
    )
    whole = NamedSharding(mesh, PartitionSpec())
    self._dealt = NamedSharding(mesh, PartitionSpec("data"))
    # What products use is kept cast, as they would cast it at every use.
    placed = {
      path: jax.device_put(_cast(value, narrow_dtype(path, config)), whole)
      for path, value in params.items()
    }
    self._params = as_bits(placed, config)

    def encode(params, pixels):
      model = with_params(config, params, below=TOWER)
      return pool_frames(model.encode(pixels), config.pool_side)

    side = self.image_size
    pixels = jax.ShapeDtypeStruct(
      (self.batch, side, side, 3), np.uint8, sharding=self._dealt
    )
    jitted = jax.jit(encode, out_shardings=self._dealt)
    with progress.step("compiling the vision tower"):
      self._encode = jitted.lower(self._params, pixels).compile()

  def __call__(
    self, pixels: UInt8[np.ndarray, "{self.batch} h w 3"]
  ) -> Float[Array, "{self.batch} Q V"]:
    """Starts encoding a batch and returns at once.

    Args:
      pixels: not to be changed afterwards, they may be read late.
    """
    return self._encode(self._params, jax.device_put(pixels, self._dealt))

  @functools.cached_property
  def fingerprint(self) -> str:
    """Of the parameters as they were given, 16 hex digits."""
    params, self._source = self._source, {}
    return _fingerprint(params)


def _cast(value, dtype):
  if isinstance(value, jax.Array) and value.dtype == dtype:
    return value
  return np.asarray(value).astype(dtype, copy=False)


def _frames_at_once(config: ModelConfig) -> int:
  """On a CPU as many as take it some seconds, so that progress can be told."""
  if jax.default_backend() != "cpu":
    return _FRAMES_PER_DEVICE
  vision = config.vision
  layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp
  flops = 2 * vision.layers * layer * vision.side**2
  return int(min(max(_CPU_FLOPS // flops, 1), _FRAMES_PER_DEVICE))


def _fingerprint(params: Mapping[str, Array | np.ndarray]) -> str:
  digest = hashlib.sha256()
  for path in sorted(params):
    value = np.ascontiguousarray(params[path], np.float32)
    digest.update(f"{path} {value.shape}".encode())
    digest.update(value.data.cast("B") if value.size else b"")
  return digest.hexdigest()[:16]


def tower_params(
  experiment: Experiment, folder: str | None = None
) -> dict[str, np.ndarray]:
  """The tower's parameters by path, on the host.

  Args:
    experiment: its model and, without `folder`, its `init` and `seed`.
    folder: a published SigLIP folder, an Hour-LLaVA checkpoint or the workdir
      of a training run.

  Raises:
    UserError: the folder holds no tower, or another one than the model's.
  """
  config = experiment.model
  folder = folder or experiment.init
  if not folder:
    drawn = init_params(config, experiment.seed, below=TOWER)
    return jax.tree.map(np.asarray, drawn)
  shapes = {
    path: shape
    for path, shape in param_shapes(config).items()
    if path.startswith(TOWER)
  }
  if not (pathlib.Path(folder) / "checkpoints").is_dir():
    return load_tower(folder, config, shapes)
  params = _restore(pathlib.Path(folder))
  wrong = {
    path
    for path in shapes.keys() | params.keys()
    if path not in params
    or tuple(params[path].shape) != tuple(shapes.get(path, ()))
  }
  if wrong:
    raise UserError(
      f"{folder} does not fit config.model: {', '.join(sorted(wrong))} are"
      " missing or of another shape; use the configuration it was trained with"
    )
  return params


def _restore(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The tower in a run's newest checkpoint; nothing else is read."""
  folder = (workdir / "checkpoints").absolute()
  with ocp.CheckpointManager(
    folder, item_handlers={"state": ocp.PyTreeCheckpointHandler()}
  ) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f"{folder} holds no checkpoint; train first")
    tree = manager.item_metadata(step)["state"].tree
    wanted = {}
    for group in ("frozen", "trained"):
      found = {
        path: jax.ShapeDtypeStruct(value.shape, np.float32)
        for path, value in (tree.get(group) or {}).items()
        if path.startswith(TOWER)
      }
      if found:
        wanted[group] = found
    if not wanted:
      return {}
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float32)
    state = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          item=wanted,
          restore_args=jax.tree.map(lambda _: as_numpy, wanted),
          partial_restore=True,
        )
      ),
    )["state"]
  return {p: value for group in state.values() for p, value in group.items()}
