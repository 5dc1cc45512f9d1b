"""Training, extraction, asking and evaluating use the same frames of a file."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from hourjax.data import dataset
from hourjax.data.media import frame_rules, video_probe
from hourjax.data.prepare import build, lists
from hourjax.data.prepared import Prepared
from hourjax.data.records.record import Turn, parse_record
from hourjax.data.rows import Size
from hourjax.data.store.features import FeatureStore
from hourjax.evaluation import run
from hourjax.extraction import streaming
from hourjax.extraction.worker import extract_videos
from hourjax.inference import video_features
from hourjax.inference.engine import EncodedMemory, row_spec
from hourjax.inference.model import Model
from hourjax.inference.steps import DecodeState
from hourjax.models.params import param_shapes
from hourjax.parallel.mesh import MeshConfig, make_mesh
from tests import videos
from tests.data.media.frame_cases import CASES
from tests.evaluation import fakes
from tests.inference import models

# Few frames, a short video, long ones, and rates that are rounded, of which one
# is just below 7.5.
LATE = "1125 at 1012500000/135000001"
FILES = {
  f"{case.name.replace('/', ' by ')}.mp4": case
  for case in CASES
  if case.name
  in ("15 at 30", "300 at 30", "300 at 2", "375 at 5/2", "1125 at 15/2",
      "1875 at 25/2", LATE)
}  # fmt: skip
TALK = [
  {"from": "human", "value": "<image>\nWho?"},
  {"from": "gpt", "value": "Ann."},
]
SPARSE = "slow.mp4"  # features of one frame a second, as others extract them


class Reading:
  """Notes which frames are decoded, wherever that is asked for."""

  def __init__(self, monkeypatch):
    self.frames: list[list[int]] = []
    for module in (video_features, streaming, dataset.video):
      decode = module.decode_frames

      def noted(path, indices, *args, decode=decode, **options):
        self.frames.append(np.asarray(indices).tolist())
        return decode(path, indices, *args, **options)

      monkeypatch.setattr(module, "decode_frames", noted)


@pytest.fixture
def reading(monkeypatch):
  return Reading(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Encodes frames; nothing behind the tower is run."""
  rng = np.random.default_rng(0)
  params = {
    path: rng.normal(scale=0.05, size=shape).astype(np.float32)
    for path, shape in param_shapes(models.CONFIG).items()
  }
  tokenizer = models.tokenizer(tmp_path_factory.mktemp("tokenizer"))
  mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
  made = Model(params, models.CONFIG, tokenizer, name="tiny", mesh=mesh)
  made.engine.encode_memory = lambda *memory: EncodedMemory()
  return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("videos")
  for name, case in FILES.items():
    times, rate = None, case.rate
    if case.name == LATE:
      times = [120_000 * n + (n > 500) for n in range(case.frames)]
      rate = "15/2"
    videos.write(path / name, case.frames, rate, size=(32, 24), times=times,
                 ticks=900_000)  # fmt: skip
    assert video_probe.probe(path / name).fps == case.fps
  return path


@pytest.fixture(scope="module")
def store(model, folder, tmp_path_factory):
  """What extraction makes of the files, and sparse features beside it."""
  path = tmp_path_factory.mktemp("features")
  decoded = {}
  with pytest.MonkeyPatch.context() as patch:
    decode = streaming.decode_frames

    def noted(file, indices, *args, **options):
      decoded[file.name] = np.asarray(indices).tolist()
      return decode(file, indices, *args, **options)

    patch.setattr(streaming, "decode_frames", noted)
    failed = extract_videos(
      model.engine.params, model.config, videos=folder, out=path, threads=1
    )
  assert not failed
  # All frames that training on pixels shows of a short video, and no others.
  for name, case in FILES.items():
    assert len(decoded[name]) == case.stored
    assert case.duration >= 128 or decoded[name] == case.indices
  made = FeatureStore(path, create=True)
  made.write(SPARSE, models.features(20), 20.4)
  return made


def _sentence(token, tokenizer) -> str:
  """Returns what a prompt says of the video."""
  text = tokenizer.decode([int(i) for i in token if i >= 0])
  return text[text.index("lasts for ") : text.index(" frames are")]


def _words(seconds: str, frames: int) -> str:
  return f"lasts for {seconds} seconds, and {frames}"


def _of_memory(memory, tokenizer) -> str:
  layout = models.layout_of(memory, [Turn("human", "Who?")])
  return _sentence(layout.query_token, tokenizer)


def _dataset(model, folder, names, features=None):
  records = [
    parse_record({"id": name, "video": name, "conversations": TALK}, "test")
    for name in names
  ]
  return dataset.Dataset.from_records(
    records,
    tokenizer=model.tokenizer,
    spec=row_spec(model.config, Size(*[10**6] * 7)),
    options=dataset.SampleOptions(),
    media_root=folder,
    features=features,
  )


def test_training_on_files(model, folder, reading):
  made = _dataset(model, folder, FILES)
  for n, case in enumerate(FILES.values()):
    sample = made.sample(n)
    assert reading.frames[-1] == case.indices
    assert len(sample.visual) == made.sizes[n][1] == case.from_file
    sentence = _sentence(sample.layout.query_token, model.tokenizer)
    assert sentence == _words(case.seconds, case.from_file)


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
  """A dataset about the files."""
  path = tmp_path_factory.mktemp("prepared")
  models.tokenizer(path)
  records = [
    {"id": name, "video": name, "conversations": TALK} for name in FILES
  ]
  (path / "records.json").write_text(json.dumps(records))
  options = lists.Options(
    items=(lists.Item.of_files([str(path / "records.json")]),),
    tokenizer=str(path),
    media=str(folder),
  )
  build.build(path / "dataset", options, workers=1)
  return path / "dataset"


def _opened(model, folder, path):
  """Sizes are planned from the columns, before any file is opened."""
  found = Prepared(path)
  return dataset.Dataset(
    found.records,
    found.columns,
    tokenizer=model.tokenizer,
    spec=row_spec(model.config, Size(*[10**6] * 7)),
    options=dataset.SampleOptions(),
    media_root=folder,
  )


def test_training_on_prepared_columns(model, folder, prepared, reading):
  made = _opened(model, folder, prepared)
  for n, case in enumerate(FILES.values()):
    assert made.columns.fps[n] == float(case.fps)
    assert made.sizes[n][1] == case.from_file
    sample = made.sample(n)
    assert reading.frames[-1] == case.indices
    assert sample.size == Size(*made.sizes[n].tolist())


def test_a_dataset_prepared_without_rates(
  model, folder, prepared, reading, tmp_path
):
  """Its videos have the frames that older versions used, in plan and file."""
  shutil.copytree(prepared, tmp_path / "older")
  path = tmp_path / "older" / "columns.npz"
  with np.load(path) as columns:
    kept = {name: columns[name] for name in columns if name != "fps"}
  np.savez(path, **kept)
  made = _opened(model, folder, tmp_path / "older")
  assert np.isnan(made.columns.fps).all()
  for n, case in enumerate(FILES.values()):
    sample = made.sample(n)
    assert sample.size == Size(*made.sizes[n].tolist())
    late = case.name == LATE  # taken for 7.5
    every_8th = list(range(0, case.frames, 8))
    assert reading.frames[-1] == (every_8th if late else case.indices)


def test_training_on_features(model, folder, store):
  made = _dataset(model, folder, [*FILES, SPARSE], features=store)
  for n, case in enumerate(FILES.values()):
    sample = made.sample(n)
    assert len(sample.visual) == case.from_features
    sentence = _sentence(sample.layout.query_token, model.tokenizer)
    assert sentence == _words(case.seconds, case.from_features)
  assert made.sparse == [SPARSE]


def test_asking(model, folder, store, reading):
  for name, case in FILES.items():
    memory = model.encode_memory(folder / name)
    assert reading.frames[-1] == case.indices and not memory.note
    sentence = _of_memory(memory, model.tokenizer)
    assert sentence == _words(case.seconds, case.from_file)
    assert _of_memory(
      model.encode_memory(store.path(name)), model.tokenizer
    ) == (_words(case.seconds, case.from_features))


def test_attention_to_repeated_frames_is_that_of_the_frame(model, monkeypatch):
  """Two frames fill a memory of 128: the first 127 times, the second once."""
  memory = model.encode_memory(models.features(2), duration=2.0)
  tokens = model.config.pool_side**2 + 1
  index = np.arange(128 * tokens + 5)
  index[-5:] = -1  # padding
  weights = np.where(index >= 127 * tokens, 3.0, 0.0)[None]
  weights[0, 0] = tokens
  state = DecodeState(*[None] * len(DecodeState._fields))
  monkeypatch.setattr(
    model.engine, "prefill", lambda *args, **options: (state, weights)
  )
  encoded = EncodedMemory(token_index=index)
  answering = dataclasses.replace(memory._answering, memory=encoded)
  layout = answering.layout([Turn("human", "Who?")], 1)
  _, attention = answering.prefill_with_attention(layout, 1)
  np.testing.assert_allclose(attention.attention, [0.25, 0.75])
  np.testing.assert_allclose(attention.edges, [0.0, 1.0, 2.0])


class RecordingModel:
  """A model that keeps its memories, which answer without a model."""

  def __init__(self, model):
    self.name, self._model, self.made = "recording", model, []

  def encode_memory(self, video):
    self.made.append(self._model.encode_memory(video))
    return fakes.Memory(fakes.Model(), video)

  def encode_stored_memory(self, store, video):
    self.made.append(self._model.encode_stored_memory(store, video))
    return fakes.Memory(fakes.Model(), video)


def test_evaluating(model, folder, store, reading, tmp_path):
  names = [*FILES, SPARSE]
  for features in (None, store):
    asked = names if features else names[:-1]
    task = fakes.make_task(
      [fakes.question(n, name) for n, name in enumerate(asked)],
      videos=folder,
      features=features,
    )
    recording = RecordingModel(model)
    out = tmp_path / ("features" if features else "files")
    report = run.evaluate(recording, task, out)
    for memory, case in zip(recording.made, FILES.values()):
      sentence = _of_memory(memory, model.tokenizer)
      frames = case.from_features if features else case.from_file
      assert sentence == _words(case.seconds, frames)
    if not features:
      assert reading.frames == [case.indices for case in FILES.values()]
    (name,) = report.data["runs"]
    notes = report.data["runs"][name]["notes"]
    expected = [frame_rules.sparse_note(1)] if features else []
    assert notes == expected
    again = run.gather(
      fakes.make_task(task.questions), out
    )  # without the store
    assert again.about["notes"] == expected
  assert recording.made[-1].num_frames == 20


def test_a_memory_notes_sparse_features(model, store):
  for name in (SPARSE, next(iter(FILES))):
    note = frame_rules.sparse_note(1) if name == SPARSE else ""
    assert model.encode_memory(store.path(name)).note == note
