"""Models from disk, and asking them by the command."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import hourjax
from hourjax.data.media.frame_rules import extraction_frames, video_file_frames
from hourjax.data.media.video import probe
from hourjax.data.pipeline import ReadOptions
from hourjax.data.rows import Size
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.models.params import narrow_dtype, param_shapes
from hourjax.parallel.mesh import MeshConfig
from hourjax.training.checkpoint import Checkpoints
from hourjax.training.train_state import TrainState
from hourjax.weights.checkpoint import load_params
from hourjax.weights.shards import save_params
from tests import videos
from tests.drawn_params import draw_params
from tests.inference import models
from tests.training import runs

QUESTION = models.QUESTIONS[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A published folder."""
  path = tmp_path_factory.mktemp("published")
  model = models.tiny(path)
  params = {p: np.asarray(x) for p, x in model.engine.params.items()}
  save_params(params, models.CONFIG, path)
  return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
  path = tmp_path_factory.mktemp("videos") / "video.mp4"
  videos.write(path, 300, rate=5, size=(32, 24))
  return path


@pytest.fixture(scope="module")
def model(folder):
  return hourjax.load(folder)


def test_a_published_folder(folder, model):
  assert model.config.decoder == models.CONFIG.decoder
  assert model.name.startswith("/".join(folder.parts[-2:]) + " ")
  assert hourjax.load(folder).name == model.name
  text = model.empty_memory().ask(QUESTION, max_tokens=4).text
  assert isinstance(text, str)


def test_a_published_folder_is_read_once_as_it_is_used(folder, model):
  """In the dtype it is used in, stacks and all."""
  for path, value in model.engine.params.items():
    assert value.dtype == narrow_dtype(path, model.config)
  kernels = [p for p in model.engine.params if p.endswith("kernel")]
  assert model.config.dtype == "bfloat16" and kernels
  params = load_params(folder, model.config, param_shapes(model.config))
  for path, value in params.items():
    narrow = value.astype(narrow_dtype(path, model.config))
    np.testing.assert_array_equal(model.engine.params[path], narrow)


def test_mistakes_are_found_before_weights_are_read(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "model")
  (weights,) = (tmp_path / "model").glob("*.safetensors")
  weights.write_text("damaged")
  with pytest.raises(UserError, match="the tokenizer of"):
    hourjax.load(tmp_path / "model", tokenizer=tmp_path / "nothing")
  with pytest.raises(UserError, match="devices and there are"):
    hourjax.load(tmp_path / "model", mesh=MeshConfig(fsdp=1, tensor=3))
  with pytest.raises(UserError, match="not a readable safetensors"):
    hourjax.load(tmp_path / "model")


def test_weights_of_a_run_that_are_not_finite(tmp_path):
  """Its checkpoint is sound: it says what was trained."""
  config = dataclasses.asdict(models.CONFIG)
  raw = run_of(config)
  models.tokenizer(tmp_path / "words")
  raw["data"] = {"tokenizer": str(tmp_path / "words")}
  params = draw_params(models.CONFIG, 3)
  name = "decoder/layers/layers/gate/kernel"
  for number in (0.5, np.nan):
    params[name][1, 2, 3] = number
    run = tmp_path / str(number)
    made = Checkpoints(run)
    made.save(
      TrainState(jnp.int32(1), jax.tree.map(jnp.asarray, params), {}, ()),
      1,
      "plan",
      raw,
    )
    made.finish()
    made.close()
    (run / "config.json").write_text(json.dumps(raw))
    if np.isfinite(number):
      got = hourjax.load(run).engine.params
      assert float(got[name][1, 2, 3]) == 0.5
      assert got.keys() == params.keys()
  with pytest.raises(UserError, match=rf"{name} .* that are not finite"):
    hourjax.load(run)


def run_of(model: dict) -> dict:
  """A run's configuration of a model."""
  read = dataclasses.asdict(ReadOptions())
  rows = dataclasses.asdict(Size())
  parts = {"forgetting": {}, "data": {}, "optimizer": {}}
  return {"model": model, "rows": rows, "read": read, **parts}


def test_the_name_tells_weights_apart(folder, tmp_path):
  other = tmp_path / folder.parent.name / folder.name
  other.mkdir(parents=True)
  for path in folder.iterdir():
    (other / path.name).write_bytes(path.read_bytes())
  assert hourjax.load(other).name == hourjax.load(folder).name
  (weights,) = other.glob("*.safetensors")
  data = bytearray(weights.read_bytes())
  data[-5] ^= 1  # of an exponent: another one could make it infinite
  weights.write_bytes(data)
  assert hourjax.load(other).name != hourjax.load(folder).name


@pytest.mark.slow
def test_a_video_is_its_stored_features(model, video, tmp_path):
  """What extraction stores of a short video gives the answers of the video.

  Of videos of 128 seconds and more it stores other frames (`frame_rules`).
  """
  seen = []
  memory = model.encode_memory(video, progress=lambda *done: seen.append(done))
  info = probe(video)
  indices, duration = extraction_frames(info.frames, info.fps)
  assert indices.tolist() == video_file_frames(300, 60.0).tolist()
  assert (memory.duration, memory.num_frames) == (60.0, 128)
  assert seen[0] == (0, len(indices)) and seen[-1] == (128, 128)
  features = model.read_video_features(video).features
  assert features.dtype == ml_dtypes.bfloat16
  store = FeatureStore(tmp_path / "store", create=True)
  store.write("video.mp4", features, duration)
  stored = model.encode_stored_memory(store, "video.mp4")
  np.save(tmp_path / "x.npy", features)
  copied = model.encode_memory(tmp_path / "x.npy", duration=duration)
  mapped = np.load(tmp_path / "x.npy")  # two bytes without a type
  assert mapped.dtype.kind == "V"
  given = model.encode_memory(mapped, duration=duration)
  (file,) = (tmp_path / "store").glob("*.npy")
  assert model.encode_memory(file).duration == duration  # as the store knows
  expected = memory.answer(models.QUESTIONS, max_tokens=6)
  assert stored.answer(models.QUESTIONS, max_tokens=6) == expected
  assert copied.answer(models.QUESTIONS, max_tokens=6) == expected
  assert given.answer(models.QUESTIONS, max_tokens=6) == expected


def test_an_index_of_something_else(model, tmp_path):
  """Only a store's index tells the duration of features below it."""
  (tmp_path / "below").mkdir()
  path = tmp_path / "below" / "x.npy"
  np.save(path, models.features().astype(np.float32))
  (tmp_path / "index.jsonl").write_text('{"id": 1}\n')
  assert model.encode_memory(path).duration == 150
  (tmp_path / "tower.json").write_text("{}")
  with pytest.raises(UserError, match=r"index\.jsonl.*'id': 1"):
    model.encode_memory(path)


@pytest.mark.slow
def test_images(model, tmp_path):
  rng = np.random.default_rng(0)
  paths = []
  for n, size in enumerate([(40, 30), (9, 70)]):
    pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    paths.append(tmp_path / f"{n}.png")
    Image.fromarray(pixels).save(paths[-1])
  texts = [
    model.encode_images(images).ask("What differs?", max_tokens=8).text
    for images in (paths[:1], paths[1:], paths)
  ]
  assert len(set(texts)) > 1
  both = model.encode_images(paths)
  marked = both.ask("<image>\n<image>\nWhat differs?", max_tokens=8)
  assert marked.text == texts[2] and marked.attention is None
  with pytest.raises(UserError, match="no images to encode"):
    model.encode_images([])


def _bad_sources(tmp_path):
  (tmp_path / "text.mp4").write_text("no video")
  np.save(tmp_path / "flat.npy", np.zeros((5, 3), np.float32))
  np.save(tmp_path / "wide.npy", np.zeros((5, 16, 99), np.float32))
  np.save(tmp_path / "none.npy", np.zeros((0, *models.SHAPE), np.float32))
  np.save(tmp_path / "ints.npy", np.zeros((5, *models.SHAPE), np.int32))
  (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
  (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04torn")
  (tmp_path / "empty.npy").write_bytes(b"")
  with open(tmp_path / "several.npy", "wb") as file:
    np.savez(file, np.zeros(3))
  nan = np.zeros((5, *models.SHAPE), np.float32)
  nan[3, 2, 1] = np.nan
  np.save(tmp_path / "nan.npy", nan)
  np.save(tmp_path / "huge.npy", np.full((5, *models.SHAPE), 1e300))
  np.save(tmp_path / "v4.npy", nan.view("V4"))
  np.save(tmp_path / "few.npy", np.zeros((128, *models.SHAPE), np.float32))
  return {
    "text.mp4": "is not a video",
    "missing.mp4": "cannot read video",
    "flat.npy": r"shape \(5, 3\), the model reads \(frames, 16, 24\)",
    "wide.npy": r"shape \(5, 16, 99\)",
    "none.npy": "has 0 frames of features",
    "ints.npy": "holds int32",
    "torn.npy": "cannot read features",
    "zip.npy": "cannot read features",
    "missing.npy": "cannot read features .*: No such file",
    "empty.npy": "cannot read features .*: No data left",
    "several.npy": "holds several arrays",
    "nan.npy": "values that are not finite",
    "huge.npy": "values that are not finite",
    "v4.npy": r"holds \|V4",
    "few.npy": "has 128 frames, .* give its duration in seconds",
  }


def test_sources_that_cannot_be_encoded(model, tmp_path):
  for name, message in _bad_sources(tmp_path).items():
    with pytest.raises(UserError, match=message):
      model.encode_memory(tmp_path / name)
  with pytest.raises(UserError, match="the array of features holds int32"):
    model.encode_memory(np.zeros((150, *models.SHAPE), np.int32))
  for seconds in (-5, 0, float("nan"), float("inf"), 3.6e6):
    with pytest.raises(UserError, match=r"the duration is .*, expected secon"):
      model.encode_memory(models.features(), duration=seconds)


def test_no_such_model(tmp_path, folder):
  with pytest.raises(UserError, match=r"model folder .* does not exist"):
    hourjax.load(tmp_path / "missing")
  with pytest.raises(UserError, match=r"config.json does not exist"):
    hourjax.load(tmp_path)
  with pytest.raises(UserError, match=r"the tokenizer of"):
    hourjax.load(folder, tokenizer=tmp_path / "nothing")


@pytest.mark.slow
def test_a_workdir_of_a_run(tmp_path):
  """Trained for two steps, asked by the command, from another directory."""
  data = runs.make_data(tmp_path / "data")
  run = runs.Training(data, tmp_path / "run", steps=2)
  status, said = run.ended()
  assert not status, said
  video = next(iter(FeatureStore(data / "features").videos()))
  loaded = hourjax.load(tmp_path / "run")
  assert loaded.name.startswith(f"{tmp_path.name}/run step 2 ")
  # A newer checkpoint that is damaged is neither read nor named.
  checkpoints = tmp_path / "run" / "checkpoints"
  shutil.copytree(checkpoints / "2", checkpoints / "3")
  (checkpoints / "3" / "about" / "metadata").write_text("torn")
  assert hourjax.load(tmp_path / "run").name == loaded.name
  shutil.rmtree(checkpoints / "3")
  stored = loaded.encode_stored_memory(FeatureStore(data / "features"), video)
  expected = stored.ask(QUESTION, max_tokens=5)
  done = _ask(
    f"--model={tmp_path}/run",
    f"--video={data}/videos/{video}",
    "--max_tokens=5",
    f"--picture={tmp_path}/attention.png",
    QUESTION,
  )
  lines = done.stdout.splitlines()
  assert not done.returncode, done.stderr
  assert lines[0].startswith(expected.text)
  assert lines[-2].startswith("most attention at ")
  assert lines[-1] == f"wrote {tmp_path}/attention.png"
  assert (tmp_path / "attention.png").exists()


def _ask(*options, given=""):
  root = pathlib.Path(__file__).parents[2]
  return subprocess.run(
    [sys.executable, "-m", "hourjax.ask", *options],
    input=given,
    capture_output=True,
    text=True,
    timeout=300,
    cwd=root,
  )


@pytest.mark.slow
def test_a_conversation_through_a_pipe(folder, tmp_path):
  np.save(tmp_path / "x.npy", models.features())
  done = _ask(
    f"--model={folder}",
    f"--features={tmp_path}/x.npy",
    "--max_tokens=3",
    given="Who?\n\nWhy so late?\n",
  )
  assert not done.returncode, done.stderr
  assert done.stdout.count("\n> ") == 2
  assert done.stdout.count("most attention at") == 1  # the second reads a cache
  assert "[cut at 3 tokens]" in done.stdout


@pytest.mark.slow
def test_mistakes_on_the_command_line(folder, tmp_path):
  cases = {
    "question in quotes": ["--video=a.mp4", "two", "words"],
    "the question is empty": ["--video=a.mp4", " "],
    "give one of --video": ["Who?"],
    "--duration is of --features": ["--video=a", "--duration=3", "Who?"],
    "temperature is -1.0": ["--video=a.mp4", "--temperature=-1", "Who?"],
    "is no folder for": ["--video=a.mp4", "--picture=no/a.png", "Who?"],
  }
  for message, options in cases.items():
    done = _ask(f"--model={folder}", *options)
    assert done.returncode == 2 and message in done.stderr, done.stderr
