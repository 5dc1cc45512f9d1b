"""The vision tower on the devices of this process, and its parameters."""

import functools
import hashlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from hourjax import hub, progress
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
from hourjax.training.checkpoint import restore_params
from hourjax.training.config import Experiment
from hourjax.weights.checkpoint import load_tower

TOWER = "vision/"
_FRAMES_PER_DEVICE = 32
# FLOPs of a batch on a CPU, which computes about 10^11 a second.
_CPU_BATCH_FLOPS = 10**12


class Encoder:
  """Computes pooled features of frames, a fixed number at a time.

  Every device of this process holds the whole tower, and nothing else of the
  model. The frames of a batch are split over the devices.

  Attributes:
    batch: number of frames in a batch, a multiple of the number of devices.
    image_size: side of a frame in pixels.
    shape: shape (Q, V) of a frame's features.
  """

  def __init__(
    self,
    params: Mapping[str, Array | np.ndarray],
    config: ModelConfig,
    *,
    batch_frames: int | None = None,
  ):
    """Puts the parameters on the devices and compiles the tower.

    Args:
      params: parameters by path; those of the tower are used.
      config: configuration of the model.
      batch_frames: number of frames in a batch, rounded up to a multiple of
        the devices. By default 32 a device, fewer for a large tower on a CPU.
    """
    devices = jax.local_devices()
    wanted = batch_frames or _default_batch(config) * len(devices)
    self.batch = -(-wanted // len(devices)) * len(devices)
    self.image_size = config.vision.image_size
    self.shape = (config.pool_side**2, config.vision.width)
    params = {p: v for p, v in params.items() if p.startswith(TOWER)}
    self._source = params
    mesh = jax.make_mesh(
      (len(devices),), ("data",), (AxisType.Auto,), devices=devices
    )
    whole = NamedSharding(mesh, PartitionSpec())
    self._batch_sharding = NamedSharding(mesh, PartitionSpec("data"))
    # Kernels are cast once here; products would cast them at every use.
    placed = {
      path: jax.device_put(_cast(value, narrow_dtype(path, config)), whole)
      for path, value in params.items()
    }
    self._params = as_bits(placed, config)

    side = self.image_size
    pixels = jax.ShapeDtypeStruct(
      (self.batch, side, side, 3), np.uint8, sharding=self._batch_sharding
    )
    with progress.step("compiling the vision tower"):
      lowered = _encode.lower(
        self._params, pixels, config=config, sharding=self._batch_sharding
      )
      self._encode = lowered.compile()

  def __call__(
    self, pixels: UInt8[np.ndarray, "{self.batch} h w 3"]
  ) -> Float[Array, "{self.batch} Q V"]:
    """Starts encoding a batch, and returns before it is done.

    Args:
      pixels: frames, uint8. They must not be changed afterwards, since the
        devices may read them later.

    Returns:
      Features in the compute dtype, on the devices.
    """
    return self._encode(
      self._params, jax.device_put(pixels, self._batch_sharding)
    )

  @functools.cached_property
  def fingerprint(self) -> str:
    """Returns a fingerprint of the given parameters, 16 hex digits."""
    params, self._source = self._source, {}
    return _fingerprint(params)


# Compiled once a process for a configuration and a batch size, not for each
# encoder.
@functools.partial(jax.jit, static_argnames=("config", "sharding"))
def _encode(
  params: Mapping[str, Array],
  pixels: Array,
  *,
  config: ModelConfig,
  sharding: NamedSharding,
) -> Array:
  """Computes the pooled features [N, Q, V] of a batch of frames."""
  model = with_params(config, params, prefix=TOWER)
  features = pool_frames(model.encode(pixels), config.pool_side)
  return jax.lax.with_sharding_constraint(features, sharding)


def _cast(value: Array | np.ndarray, dtype: np.dtype) -> Array | np.ndarray:
  """Returns an array in a dtype; copies it only if it has another one."""
  if isinstance(value, jax.Array) and value.dtype == dtype:
    return value
  return np.asarray(value).astype(dtype, copy=False)


def _default_batch(config: ModelConfig) -> int:
  """Returns the frames of a batch on one device.

  A CPU gets as many as take it some seconds, so that progress can be shown.
  """
  if jax.default_backend() != "cpu":
    return _FRAMES_PER_DEVICE
  vision = config.vision
  layer = 4 * vision.width**2 + 2 * vision.width * vision.mlp
  flops = 2 * vision.layers * layer * vision.side**2
  return int(min(max(_CPU_BATCH_FLOPS // flops, 1), _FRAMES_PER_DEVICE))


def _fingerprint(params: Mapping[str, Array | np.ndarray]) -> str:
  """Returns a fingerprint of parameters, whatever their order and dtype."""
  digest = hashlib.sha256()
  for path in sorted(params):
    value = np.ascontiguousarray(params[path], np.float32)
    digest.update(f"{path} {value.shape}".encode())
    digest.update(value.data.cast("B") if value.size else b"")
  return digest.hexdigest()[:16]


def tower_params(
  experiment: Experiment, folder: str | None = None
) -> dict[str, np.ndarray]:
  """Reads the parameters of the tower that extracts, to the host.

  Args:
    experiment: names the model. Without `folder`, its `init` names the folder,
      and without that either the tower is drawn from its `seed`, as training
      draws it.
    folder: a published SigLIP folder, an Hour-LLaVA checkpoint or the workdir
      of a training run; or a name with hf:// (see `hub`).

  Returns:
    Parameters by path, float32.

  Raises:
    UserError: the folder holds no tower, or another one than the model's.
  """
  config = experiment.model
  name = folder or experiment.init
  if not name:
    drawn = init_params(config, experiment.seed, prefix=TOWER)
    return jax.tree.map(np.asarray, drawn)
  shapes = {
    path: shape
    for path, shape in param_shapes(config).items()
    if path.startswith(TOWER)
  }
  where = hub.local_folder(name)
  if not (where / "checkpoints").is_dir():
    return load_tower(where, config, shapes)
  found = restore_params(
    where, prefix=TOWER, each=lambda _, value: np.asarray(value, np.float32)
  )
  params = {path: np.asarray(value) for path, value in found.params.items()}
  wrong = {
    path
    for path in shapes.keys() | params.keys()
    if path not in params
    or tuple(params[path].shape) != tuple(shapes.get(path, ()))
  }
  if wrong:
    raise UserError(
      f"{where} does not fit config.model: {', '.join(sorted(wrong))} are"
      " missing or of another shape; use the configuration it was trained with"
    )
  return params
