"""The golden full-model cases, rebuilt with the code under test.

A case is an .npz file with `out_inputs_embeds`. Its modality, sizes and
configuration come from its arrays and from META.json, never from its name, so
that another folder of the same make needs no other code.
"""

import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hourjax.batch import IGNORE, Batch
from hourjax.data import forgetting, repository, rows
from hourjax.data.conversations import IMAGE, Conversation
from hourjax.data.layout import build_layout
from hourjax.data.media import images
from hourjax.models.config import ModelConfig
from hourjax.models.params import param_shapes
from hourjax.weights.checkpoint import load_params
from hourjax.weights.config import read_config
from tests import golden_files

_RECIPE = re.compile(
  r"np\.random\.RandomState\((\d+)\)\.standard_normal\(\(([\d, ]+)\)\)"
  r"\.astype\(np\.float32\)"
)
_PROJECTOR = "model.mm_projector.0.weight"


@dataclasses.dataclass(frozen=True)
class Case:
  """One golden case: what it gave and what we make of its inputs.

  Attributes:
    name: file stem.
    arrays: of the .npz file.
    meta: its entry in META.json.
    samples: one for each row of the official batch.
    batch: each sample in a row of its own; float32 features.
    config: float32, nothing rematerialised.
    params: imported from the official state dict.
  """

  name: str
  arrays: dict[str, np.ndarray]
  meta: dict
  samples: tuple[rows.Sample, ...]
  batch: Batch
  config: ModelConfig
  params: dict[str, np.ndarray]

  @property
  def lengths(self) -> list[int]:
    """Decoder positions of each sample."""
    return [len(sample.layout.labels) for sample in self.samples]

  def gradients(self) -> dict[str, np.ndarray] | None:
    """Official gradients by official name, if the folder has them."""
    path = golden_files.golden_path(f"{self.name}.grads.safetensors")
    return load_file(path) if path else None


def names() -> list[str]:
  """All cases of the folder."""
  return [
    name.removesuffix(".npz")
    for name, entry in _entries().items()
    if "out_inputs_embeds" in entry.get("arrays", {})
    and golden_files.golden_path(name)
  ]


def kind(name: str) -> str:
  """inference, text, video, frames, image, images or tiled."""
  entry = _entries()[f"{name}.npz"]
  if "greedy_tokens" in entry["arrays"]:
    return "inference"
  modality, shape = entry["modalities"][0], entry["image_shapes"][0]
  if modality == "text":
    return "text"
  if modality == "video":
    return "frames" if _are_pixels(shape) else "video"
  if len(shape) == 4:
    return "tiled"
  return "images" if len(entry["image_shapes"]) > 1 else "image"


def has_gradients(name: str) -> bool:
  return golden_files.golden_path(f"{name}.grads.safetensors") is not None


def lightest(wanted: str, gradients: bool = False) -> str | None:
  """The case of that kind with the shortest sequences."""
  found = [
    name
    for name in names()
    if kind(name) == wanted and (has_gradients(name) or not gradients)
  ]
  return min(found, key=_weight, default=None)


def quick() -> set[str]:
  """What `--quick` runs: one case of each of four kinds."""
  chosen = {
    lightest("video", gradients=True),
    *(lightest(wanted) for wanted in ("tiled", "text", "inference")),
  }
  return chosen - {None}


@functools.cache
def load(name: str) -> Case:
  """Rebuilds a case."""
  arrays = golden_files.npz(f"{name}.npz")
  entry = golden_files.meta_of(f"{name}.npz")
  visuals, modalities = _visuals(name, arrays, entry)
  width = _feature_width(visuals)
  config, params = checkpoint(width)
  samples = tuple(_samples(name, arrays, entry, visuals, modalities, config))
  spec = row_spec(samples, config, width)
  batch = stack([[sample] for sample in samples], spec)
  return Case(name, arrays, entry, samples, batch, config, params)


def row_spec(samples, config: ModelConfig, width=None) -> rows.RowSpec:
  """Returns rows that are just large enough for each sample alone."""
  sizes = np.array(
    [rows.Size().astuple(), *(s.size.astuple() for s in samples)]
  )
  return rows.RowSpec(
    capacity=rows.Size(*(int(n) for n in sizes.max(0))),
    frame_tokens=config.pool_side**2,
    tile_tokens=config.vision.side**2,
    width=width or config.vision.width,
    image_size=config.vision.image_size,
  )


def stack(row_samples, spec: rows.RowSpec) -> Batch:
  """Rows of samples as one batch, features kept in float32.

  Rows hold bfloat16 features; the official ones here are float32.
  """
  batch = rows.stack_rows([rows.build_row(row, spec) for row in row_samples])
  features = np.zeros(batch.features.shape, np.float32)
  for b, row in enumerate(row_samples):
    parts = [
      sample.visual.reshape(-1, spec.width)
      for sample in row
      if sample.kind == "features" and sample.visual is not None
    ]
    if parts:
      stored = np.concatenate(parts)
      features[b, : len(stored)] = stored
  if features.size:
    rounded = np.asarray(batch.features, np.float32)
    np.testing.assert_allclose(rounded, features, rtol=2**-8)
  return batch._replace(features=features)


@functools.cache
def checkpoint(width: int | None = None):
  """(config, params) of the official model, through the real importer.

  Args:
    width: of stored features, where it is not the tower's.
  """
  path, entry = official_weights()
  raw = dict(entry["config"])
  raw["vision_config"] = entry.get("vision_config") or _tower_config(raw)
  tensors = load_file(path)
  if width not in (None, tensors[_PROJECTOR].shape[1]):
    tensors[_PROJECTOR] = _projector(width)
  with tempfile.TemporaryDirectory() as folder:
    Path(folder, "config.json").write_text(json.dumps(raw))
    save_file(tensors, Path(folder, "model.safetensors"))
    config = dataclasses.replace(
      read_config(folder), dtype="float32", remat="none"
    )
    shapes = param_shapes(config)
    shapes["projector/fc1/kernel"] = tensors[_PROJECTOR].shape[::-1]
    params = load_params(folder, config, shapes)
  return config, params


def official_weights() -> tuple[Path, dict]:
  """The file of the whole model's state dict, and its entry in META.json."""
  return next(
    (golden_files.golden_path(name), entry)
    for name, entry in _entries().items()
    if name.endswith(".weights.safetensors")
    and "model_type" in entry.get("config", {})
  )


def _entries() -> dict[str, dict]:
  return golden_files.meta().get("files", {})


def _tower_config(raw: dict) -> dict:
  """The tower beside which the model's own entry says nothing of it."""
  size = min(raw["image_grid_pinpoints"])[0]
  return next(
    entry["config"]
    for name, entry in _entries().items()
    if name.endswith(".npz")
    and entry.get("config", {}).get("image_size") == size
  )


def _projector(width: int) -> np.ndarray:
  for name in _entries():
    if name.endswith(".projector.safetensors"):
      with safe_open(golden_files.golden_path(name), framework="np") as file:
        keys = file.keys()  # the handle itself is no mapping
        for key in keys:
          if tuple(file.get_slice(key).get_shape())[1] == width:
            return file.get_tensor(key)
  raise AssertionError(f"no projector for features of width {width}")


def _weight(name: str) -> int:
  shape = _entries()[f"{name}.npz"]["arrays"]["out_inputs_embeds"][1]
  return shape[0] * shape[1]


def _are_pixels(shape) -> bool:
  return shape[-3] == 3 and shape[-1] == shape[-2]


def _visuals(name, arrays, entry):
  """Visual inputs in collator order, and their modalities."""
  found = _numbered(arrays)
  if "features" in entry:
    found = [_generated(entry["features"])]
  if found:
    return found, entry["modalities"]
  source = _source_of(name, entry)
  return (
    _numbered(golden_files.npz(f"{source}.npz")),
    golden_files.meta_of(f"{source}.npz")["modalities"],
  )


def _numbered(arrays):
  count = sum(key.startswith("image.") for key in arrays)
  return [arrays[f"image.{n}"] for n in range(count)]


def _generated(features):
  seed, shape = _RECIPE.fullmatch(features["recipe"]).groups()
  shape = tuple(int(n) for n in shape.split(","))
  drawn = np.random.RandomState(int(seed)).standard_normal(shape)
  drawn = drawn.astype(np.float32)
  digest = hashlib.sha256(drawn.tobytes()).hexdigest()
  assert digest == features["sha256_float32"]
  return drawn


def _source_of(name, entry) -> str:
  """The case whose features this one shares: its note names it.

  By its stem or by what comes before the stem's first "_".
  """
  words = set(re.findall(r"\w+", entry["note"]))
  others = [other for other in names() if other != name]
  for key in (lambda stem: stem, lambda stem: stem.split("_")[0]):
    for other in others:
      found = _entries()[f"{other}.npz"]
      if key(other) not in words or "image.0" not in found["arrays"]:
        continue
      if entry.get("image_shapes") in (None, found["image_shapes"]):
        return other
  raise AssertionError(f"{name}: no image.0, and its note names no case")


def _feature_width(visuals) -> int | None:
  widths = {v.shape[-1] for v in visuals if not _are_pixels(v.shape)}
  assert len(widths) < 2
  return widths.pop() if widths else None


def _samples(name, arrays, entry, visuals, modalities, config):
  """Cuts the official batch into samples, in its order of inputs."""
  done = calls = 0
  for b in range(len(arrays["input_ids"])):
    conversation = _conversation(arrays, b)
    slots = int((conversation.ids == IMAGE).sum())
    taken = max(slots, 1)  # a text sample has a dummy image
    mine, modality = visuals[done : done + taken], modalities[done]
    size = entry["image_sizes"][done] if "image_sizes" in entry else None
    done += taken
    visual_kind, visual, memory = (
      "features",
      None,
      repository.empty_repository(),
    )
    if slots:
      visual_kind, visual, memory = _memory(mine, modality, size, config)
    kept, used = _kept(memory, arrays, calls)
    calls += used
    layout = build_layout(
      conversation,
      memory,
      kept,
      # The official code cut the whole batch here, if it did.
      max_length=arrays["out_inputs_embeds"].shape[1],
      name=f"{name}[{b}]",
    )
    yield rows.Sample(f"{name}[{b}]", layout, visual_kind, visual)


def _conversation(arrays, b) -> Conversation:
  ids = arrays["input_ids"][b]
  labels = (
    arrays["labels"][b] if "labels" in arrays else np.full_like(ids, -100)
  )
  if "attention_mask" in arrays:
    mask = arrays["attention_mask"][b].astype(bool)
    assert (labels[~mask] == IGNORE).all()
    ids, labels = ids[mask], labels[mask]
  return Conversation(ids.astype(np.int32), labels.astype(np.int32))


def _memory(visuals, modality, size, config):
  """(kind, visual input, repository) of one sample."""
  side = config.vision.side
  first = visuals[0]
  if modality == "video":
    pooled = config.pool_side
    memory = repository.video_repository(len(first), pooled)
    if _are_pixels(first.shape):
      return "frames", _pixels(first), memory
    return "features", first.reshape(len(first), pooled**2, -1), memory
  if first.ndim == 4:
    width, height = size
    geometry = images.anyres_geometry(
      width, height, tile=config.vision.image_size, side=side
    )
    assert geometry.tiles == len(first)
    memory = repository.tiled_repository(geometry, side)
    return "tiles", _pixels(first), memory
  memory = repository.images_repository(len(visuals), side)
  return "tiles", _pixels(np.stack(visuals)), memory


def _pixels(chw):
  return np.moveaxis(chw, -3, -1).astype(np.float32)


def _kept(memory, arrays, call):
  """Kept tokens by the official random choices, and the calls they took.

  The official code draws once for a video and for each grid of a tiled image,
  and once for all images of a sample (or for the dummy image of a text).
  """
  rule, kept = forgetting.Forgetting(), []
  several = len(memory.slots) > 1
  for n, slot in enumerate(memory.slots):
    grids = []
    for g, grid in enumerate(slot):
      frames = np.arange(grid.index.shape[0])
      if grid.temporal:
        frames = rule.kept_frames(len(frames), _unused_rng())
      key = f"sampling.{call + (0 if several else g)}.indices"
      if key in arrays:
        drawn = arrays[key].astype(int)
        cells = drawn[n : n + 1] if several else drawn[frames]
      else:
        uniform = forgetting.Forgetting(spatial="uniform")
        cells = uniform.kept_cells(grid, len(frames), _unused_rng())
      grids.append(forgetting.memory_indices(grid, frames, cells))
    kept.append(np.concatenate(grids))
  return kept, 1 if several or not memory.slots else len(memory.slots[0])


def _unused_rng():
  """A generator for rules that draw nothing."""
  return np.random.default_rng(0)
