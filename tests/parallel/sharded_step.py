"""A train step on the virtual devices of this process, beside one device.

  python -m tests.parallel.sharded_step '[{"mesh": {"seq": 8}}, ...]'

prints, for each case, the largest difference of the loss and of every
gradient, relative to the norm of that gradient, as JSON.
"""

import dataclasses
import functools
import json
import os
import sys

from tests.xla_flags import xla_flags

if __name__ == "__main__":
  os.environ["XLA_FLAGS"] = xla_flags(8)

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from hourjax.batch import IGNORE, Batch
from hourjax.data import repository, rows
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.forgetting import Forgetting
from hourjax.data.layout import build_layout
from hourjax.data.media.images import anyres_geometry
from hourjax.models.config import TINY, DecoderConfig, VisionConfig
from hourjax.models.params import param_axes, param_shapes
from hourjax.parallel import vocabulary
from hourjax.parallel.mesh import AXES, MeshConfig, make_mesh
from hourjax.parallel.rules import param_shardings
from hourjax.parallel.rules import spec as partition
from hourjax.training.batch_sharding import BatchSharding
from hourjax.training.train_step import Sums, accumulate, zero_sums

jax.config.update("jax_numpy_rank_promotion", "raise")
SIDE, PIXELS, ROWS = 4, 8, 8
CONFIG = dataclasses.replace(
  TINY,
  vision=VisionConfig(
    image_size=PIXELS, patch_size=2, width=24, layers=1, heads=2, mlp=32
  ),
  decoder=DecoderConfig(
    vocab=96, width=32, layers=2, heads=4, kv_heads=2, mlp=48, tied=True
  ),
  pool_side=SIDE,
  memaug_layers=2,
  dtype="float32",
  remat="full",
)
SPEC = rows.RowSpec(
  capacity=rows.Size(
    features=16 * 300,
    frames=5,
    tiles=7,
    blends=64,
    memory=8 * 600,
    queries=8 * 50,
    decoder=8 * 54,
  ),
  frame_tokens=SIDE**2,
  tile_tokens=CONFIG.vision.side**2,
  width=CONFIG.vision.width,
  image_size=PIXELS,
  loss="samples",
)


# It adds the same to all scores of a query, so its exact gradient is zero and
# what is computed is rounding. It is held to the norm of the gradient of the
# kernel, where the same terms do not cancel; all others to their own.
_NOTHING = "vision/encoder/layers/k/bias"


def main(cases: list[dict]) -> None:
  """Prints a JSON list of the differences of the cases."""
  print(json.dumps([differences(**case) for case in cases]))


def differences(
  mesh: dict, model: dict | None = None, stored: bool = True
) -> dict[str, float]:
  """Of loss, weights, labels and gradients between a mesh and one device."""
  config = dataclasses.replace(CONFIG, **_nested(model or {}))
  batch, spec = packed_batch(stored)
  params, expected = on_one_device(config, stored)
  got = on_mesh(MeshConfig(**mesh), config, params, batch, spec)
  found = {
    "loss": abs(float(got.loss) / float(expected.loss) - 1),
    "weight": abs(float(got.weight) / float(expected.weight) - 1),
    "tokens": abs(int(got.tokens) - int(expected.tokens)),
  }
  for path, grad in expected.grads.items():
    reference = np.asarray(grad, np.float64)
    terms = path.replace("bias", "kernel") if path == _NOTHING else path
    scale = np.linalg.norm(np.asarray(expected.grads[terms], np.float64))
    difference = np.linalg.norm(np.asarray(got.grads[path]) - reference)
    # What the loss does not read (the tower's last norm) is zero on both.
    found[path] = float(difference / scale) if difference else 0.0
  return found | scores_differ(MeshConfig(**mesh), config.decoder.width)


def scores_differ(mesh_config, width: int) -> dict[str, float]:
  """Of losses and of the most likely word, without the model."""
  rng = np.random.default_rng(1)
  words, length = CONFIG.decoder.vocab, SPEC.capacity.decoder
  hidden = rng.normal(size=(ROWS, length, width)).astype(np.float32)
  table = rng.normal(size=(words, width)).astype(np.float32)
  table[11] = table[70]  # of equal words the first counts, on another device
  logits = hidden.astype(np.float64) @ table.astype(np.float64).T
  best = logits.argmax(-1)
  drawn = rng.integers(0, words, best.shape)
  target = np.where(rng.random(best.shape) < 0.5, best, drawn)
  target[best == 11] = rng.choice([11, 70], (best == 11).sum())
  target[rng.random(best.shape) < 0.3] = IGNORE
  there = target != IGNORE
  losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
    logits, np.maximum(target, 0)[..., None], -1
  )[..., 0]  # fmt: skip
  mesh = make_mesh(mesh_config)
  placed = [
    jax.device_put(array, NamedSharding(mesh, partition(*axes)))
    for array, axes in (
      (hidden, ("rows", "positions", None)),
      (table, ("words", "table")),
      (target.astype(np.int32), ("rows",)),
    )
  ]
  with jax.set_mesh(mesh):
    scores = [vocabulary.token_losses, vocabulary.most_likely]
    got, right = jax.jit(lambda *x: [score(*x) for score in scores])(*placed)
  assert (best == 11).sum() > 5 and 0.3 < right.mean() < 0.5
  return {
    "token losses": float(
      abs(np.where(there, losses, 0) - got).max() / losses[there].max()
    ),
    "most likely": int((np.asarray(right) != (there & (best == target))).sum()),
  }


@functools.cache
def on_one_device(config, stored: bool) -> tuple[dict, Sums]:
  """Parameters, and loss and gradients of the micro-batch with them."""
  params = _params(config)
  batch = Batch(*map(jnp.asarray, packed_batch(stored)[0]))
  # Without rematerialisation the program is shorter, and the function the same.
  config = dataclasses.replace(config, remat="none")
  return params, _step(config)(params, batch)


def _params(config) -> dict[str, np.ndarray]:
  """Parameters of ordinary size; drawn by numpy, which compiles nothing."""
  rng, params = np.random.default_rng(0), {}
  for path, shape in param_shapes(config).items():
    noise = rng.normal(size=shape).astype(np.float32)
    if path.endswith("scale"):
      params[path] = 1 + 0.1 * noise
    elif path.endswith("kernel"):
      params[path] = noise * shape[-2] ** -0.5
    else:  # biases, embeddings, the newline token
      params[path] = 0.2 * noise
  return params


def _step(config):
  """A function from parameters and a batch to loss and gradients."""
  return jax.jit(lambda p, b: accumulate(zero_sums(p), p, {}, b, config=config))


def on_mesh(mesh_config, config, params, batch, spec) -> Sums:
  """Loss and gradients of a micro-batch on a mesh."""
  mesh = make_mesh(mesh_config)
  shardings = param_shardings(mesh, param_shapes(config), param_axes(config))
  params = jax.device_put(params, shardings)
  placed = BatchSharding(mesh, spec, ROWS)(batch)
  with jax.set_mesh(mesh):
    return _step(config)(params, placed)


def packed_batch(stored: bool = True) -> tuple[Batch, rows.RowSpec]:
  """Rows of several samples: videos, frames, tiles, images and text.

  Args:
    stored: whether rows hold stored features, which stages 1 and 2 have none
      of; without, there are texts instead.
  """
  kinds = [
    ("video:150", "text", "video:20"),
    ("frames:3", "tiled", "video:130"),
    ("images:2", "video:40", "text"),
    ("text",),
    ("video:180",),
    ("frames:5", "images:1", "video:130"),
    ("tiled", "text", "video:128"),
    ("video:1", "video:129", "text"),
  ]
  spec = SPEC
  if not stored:
    capacity = dataclasses.replace(SPEC.capacity, features=0)
    spec = dataclasses.replace(SPEC, capacity=capacity)
    kinds = [
      ["text" if kind.startswith("video") else kind for kind in row]
      for row in kinds
    ]
  made = [
    rows.build_row(
      [_sample(kind, 10 * i + k) for k, kind in enumerate(row)], spec
    )
    for i, row in enumerate(kinds)
  ]
  return rows.stack_rows(made), spec


def _sample(kind: str, seed: int) -> rows.Sample:
  rng = np.random.default_rng(seed)
  kind, _, count = kind.partition(":")
  count = int(count or 0)
  words = rng.integers(1, CONFIG.decoder.vocab, 24).astype(np.int32)
  memory, source, visual = repository.empty_repository(), "features", None
  side = CONFIG.vision.side
  if kind in ("video", "frames"):
    memory = repository.video_repository(count, SIDE)
  if kind == "video":
    shape = (count, SIDE**2, CONFIG.vision.width)
    visual = rng.normal(size=shape).astype(ml_dtypes.bfloat16)
  elif kind == "frames":
    source, visual = "frames", _pixels(rng, count)
  elif kind == "images":
    memory = repository.images_repository(count, side)
    source, visual = "tiles", _pixels(rng, count)
  elif kind == "tiled":
    geometry = anyres_geometry(20, 14, tile=PIXELS, side=side)
    memory = repository.tiled_repository(geometry, side)
    source, visual = "tiles", _pixels(rng, geometry.tiles)
  slots = len(memory.slots)
  words[3 : 3 + slots] = IMAGE
  # From 8 to 13 labels, so that labels of samples weigh differently.
  labels = np.where(np.arange(24) < 11 + seed % 6, np.int32(IGNORE), words)
  layout = build_layout(
    Conversation(words, labels), memory, Forgetting().kept_tokens(memory, rng)
  )
  return rows.Sample(f"{kind} {seed}", layout, source, visual)


def _pixels(rng, count: int) -> np.ndarray:
  return rng.integers(0, 256, (count, PIXELS, PIXELS, 3)).astype(np.uint8)


def _nested(changes: dict) -> dict:
  decoder = changes.pop("decoder", None)
  if decoder:
    changes["decoder"] = dataclasses.replace(CONFIG.decoder, **decoder)
  return changes


if __name__ == "__main__":
  assert len(jax.devices()) == 8 and AXES
  main(json.loads(sys.argv[1]))
