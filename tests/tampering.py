"""Files from a stranger: what becomes of data of which one file is changed.

  python -m tests.tampering 500

tampers 500 times with each kind of folder and counts what happens. A result
other than a UserError or the same data is printed with its seed.
"""

import collections
import dataclasses
import functools
import io
import json
import pathlib
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import demo
from hourjax.data import prepared
from hourjax.data.columns import MODALITIES, Measures
from hourjax.data.demo.tokenizer import train_tokenizer, write_tokenizer
from hourjax.data.prepared import Prepared, PreparedWriter
from hourjax.data.records.record import Record, Turn
from hourjax.data.store.features import FeatureStore
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.training import checkpoint_format
from hourjax.training.checkpoint import Checkpoints, restore_params
from hourjax.training.config import build_experiment
from hourjax.training.data_loader import UnreadSampleLog
from hourjax.training.faults import NonFiniteSteps
from hourjax.training.metric_writer import read_curve
from hourjax.training.throughput import Goodput
from hourjax.training.train_state import TrainState
from hourjax.training.workdir import read_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
ODD = (
  *(None, True, -1, 0, 2**31, 2**63, 10**30, 10**400, 1.5, 1e300),
  *(float("nan"), float("inf"), "", "x", "../x", "a\0b", "\ud800"),
  *([], {}, [[]], {"a": 1}, [None]),
)
_SHAPE = (2, 3)
_WORDS = ("the red ball is here",) * 3
_TEXT = "Hello, <|im_start|>naïve 12\n"


# --- what is tampered with ---------------------------------------------------


def make_dataset(folder: pathlib.Path) -> None:
  """Eight conversations in two files."""
  before, prepared.SHARD = prepared.SHARD, 5
  with PreparedWriter(folder, tokenizer_id="t") as writer:
    for number in range(8):
      modality = MODALITIES[number % 3]
      media = {"text": (), "video": (f"{number % 2}.mp4",), "image": ("a.png",)}
      turns = (Turn("human", f"question {number}"), Turn("gpt", "answer"))
      record = Record(
        str(number), modality, media[modality], turns, "source", {"n": number}
      )
      sizes = (1, 640, 480) if modality == "image" else (0, 0, 0)
      measures = Measures(number % 3, 20 + number, 9, 12, *sizes)
      writer.add(record, measures, duration=3.5, num_frames=100)
  prepared.SHARD = before


def read_dataset(folder: pathlib.Path) -> Any:
  data = Prepared(folder)
  columns = {
    name: value if isinstance(value, tuple) else value.tolist()
    for name, value in vars(data.columns).items()
  }
  for name in ("duration", "fps"):  # NaN differs from itself
    columns[name] = np.nan_to_num(getattr(data.columns, name)).tolist()
  return columns, list(data.records)


def make_store(folder: pathlib.Path) -> None:
  """Two videos."""
  store = FeatureStore(folder, create=True)
  store.claim("tower", _SHAPE)
  for number in range(2):
    features = np.arange(4 * 6).reshape(4, *_SHAPE) + number
    store.write(f"{number}.mp4", features, 4.0)


def read_store(folder: pathlib.Path) -> Any:
  store = FeatureStore(folder)
  store.claim("tower", _SHAPE)
  if lost := {"0.mp4", "1.mp4"} - store.videos():
    # As a training says; a kill may tear the last line of an index.
    raise UserError(f"{lost} are not in the store")
  return {
    name: _read_video(store, name).astype(int).tolist()
    for name in store.videos()
  }


def _read_video(store: FeatureStore, name: str) -> np.ndarray:
  return store.read(name, np.arange(store.stored(name).frames), _SHAPE)


def make_tokenizer(folder: pathlib.Path) -> None:
  write_tokenizer(folder, _WORDS)


@functools.cache
def _fingerprint() -> str:
  return Tokenizer(train_tokenizer(_WORDS), "made").fingerprint


def read_tokenizer(folder: pathlib.Path) -> Any:
  tokenizer = Tokenizer.from_folder(folder)
  ids = tokenizer.encode(_TEXT)
  if tokenizer.fingerprint != _fingerprint():
    raise UserError("prepared for another tokenizer")  # as a training does
  return ids, tokenizer.decode(ids)


def make_workdir(folder: pathlib.Path) -> None:
  """A checkpoint and the small files of a run."""
  folder.mkdir(parents=True)
  experiment = build_experiment(demo.get_config("stage=3").to_dict())
  config = dataclasses.asdict(experiment)
  made = Checkpoints(folder)
  made.save(_state(), 7, "plan", config)
  made.finish()
  made.close()
  lines = {
    "metrics.jsonl": [{"step": 1, "loss": 2.5, "grad_norm": "NaN"}] * 2,
    "goodput.jsonl": [
      {"began": 1.0, "at": 1.0, "lost": {"compile": 2.0}},
      {"step": 1, "at": 2.0, "kept": 0.5},
      {"lost": "save", "seconds": 0.25, "at": 3.0},
    ],
    "nonfinite.jsonl": [{"step": 1, "loss": "NaN", "grad_norm": 1.0}],
    "unread.jsonl": [{"step": 1, "id": "a", "kind": "size", "reason": "b"}],
  }
  for name, rows in lines.items():
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text)
  (folder / "config.json").write_text(json.dumps(config))


def read_workdir(folder: pathlib.Path) -> Any:
  """The arrays; what else there is must open, but may be other numbers."""
  build_experiment(read_config(folder))
  read_curve(folder)
  NonFiniteSteps(folder, start=1, max_in_a_row=2, primary=False)
  UnreadSampleLog(folder, start=1, max_share=0.5)
  Goodput(folder, start=1).close()
  state, _ = Checkpoints(folder).restore(_state(), plan="plan")
  params = restore_params(folder).params
  arrays = {**state.trained, **state.frozen}
  assert all((arrays[name] == params[name]).all() for name in arrays)
  return {name: x.tolist() for name, x in arrays.items()}


def _state() -> TrainState:
  trained = {"memaug/a": jnp.arange(12.0).reshape(3, 4)}
  frozen = {"vision/c": jnp.arange(6, dtype=jnp.bfloat16)}
  return TrainState(jnp.int32(3), trained, frozen, {"m": jnp.zeros(5)})


KINDS: dict[str, tuple[Callable, Callable]] = {
  "dataset": (make_dataset, read_dataset),
  "store": (make_store, read_store),
  "tokenizer": (make_tokenizer, read_tokenizer),
  "workdir": (make_workdir, read_workdir),
}


# --- how ---------------------------------------------------------------------


def tamper(folder: pathlib.Path, rng: random.Random) -> str:
  """Changes one file in a folder; returns which, and how."""
  path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
  ways = [_truncate, _flip, _replace]
  if path.suffix in (".json", ".jsonl") or path.name == "metadata":
    ways += [_json] * 6
  elif path.suffix == ".npz":
    ways += [_npz] * 8
  way = rng.choice(ways)
  change = way(path, rng)
  return f"{path.relative_to(folder)}: {way.__name__[1:]} {change}"


def _truncate(path: pathlib.Path, rng: random.Random) -> str:
  content = path.read_bytes()
  keep = rng.randrange(max(len(content), 1))
  path.write_bytes(content[:keep])
  return str(keep)


def _flip(path: pathlib.Path, rng: random.Random) -> str:
  content = bytearray(path.read_bytes())
  # In a file of JSON lines a digit may change into another digit, which nobody
  # can notice. So bytes there become bytes that are no text.
  low = 128 if path.suffix in (".json", ".jsonl") else 0
  # Nor that of a feature into another one: a store has no checksums.
  end = 100 if path.suffix == ".npy" else len(content)
  for _ in range(rng.randrange(1, 4)):
    content[rng.randrange(end)] = rng.randrange(low, 256)
  path.write_bytes(bytes(content))
  return ""


def _replace(path: pathlib.Path, rng: random.Random) -> str:
  way = rng.choice(("folder", "pointer", "empty", "null", "nested", "gone"))
  path.unlink()
  if way == "folder":
    path.mkdir()
  elif way != "gone":
    nested = b"[" * 20_000 + b"]" * 20_000
    content = {"pointer": POINTER, "empty": b"", "null": b"null"}
    path.write_bytes(content.get(way, nested))
  return way


def _json(path: pathlib.Path, rng: random.Random) -> str:
  lines = path.read_text().split("\n") if path.suffix == ".jsonl" else None
  at = rng.randrange(len(lines) - 1) if lines else 0
  value = json.loads(lines[at] if lines else path.read_text())
  odd = rng.choice(ODD)
  places = list(_places(value))
  holder, key = rng.choice(places)
  what = "removed" if rng.random() < 0.2 else "set"
  if what == "removed":
    del holder[key]
  else:
    holder[key] = odd
  if path.name == "metadata" and isinstance(value, dict):
    # As one who knows how a checkpoint is checked would.
    value.pop("crc", None)
    value["crc"] = checkpoint_format._crc(value)
  text = json.dumps(value)
  if rng.random() < 0.1 and not lines:
    text = text.replace("{", '{"deep": ' + "[" * 9000 + "]" * 9000 + ",", 1)
  path.write_text("\n".join([*lines[:at], text, *lines[at + 1 :]])
                  if lines else text)  # fmt: skip
  return f"{what} {key!r} {repr(odd)[:40]}"


def _places(value: Any):
  """(holder, key) of every value inside."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, inner in list(items):
    yield value, key
    if isinstance(inner, dict | list):
      yield from _places(inner)


def _npz(path: pathlib.Path, rng: random.Random) -> str:
  with np.load(path) as file:
    arrays = dict(file)
  name = rng.choice(sorted(arrays))
  old = arrays[name]
  ways = {
    # 99 frames or seconds are possible values.
    "out of range": lambda: np.full_like(
      old, -9 if name in ("pictures", "duration") else 99
    ),
    "negative": lambda: (old.astype(np.int64) - 99).astype(np.int32),
    "huge": lambda: old.astype(np.float64) * 1e300 + 1e300,
    "number": lambda: np.array(3),
    "square": lambda: old[None],
    "objects": lambda: np.array([{"a": 1}] * len(old), object),
    "shorter": lambda: old[:-1],
    "text": lambda: np.frombuffer(b'["a", 1]', np.uint8),
    "nested": lambda: np.frombuffer(b"[" * 9000, np.uint8),
  }
  way = rng.choice([*ways, "claims", "compressed", "gone"])
  content = io.BytesIO()
  if way in ways:
    arrays[name] = ways[way]()
  if way == "compressed":
    np.savez_compressed(content, **arrays)
  elif way == "gone":
    del arrays[name]
  if not content.tell():
    np.savez(content, **arrays)
  path.write_bytes(content.getvalue())
  if way == "claims":
    claim_more(path, name)
  return f"{name} {way}"


def claim_more(path: pathlib.Path, name: str, count: int = 2**33) -> None:
  """Lets the header of an array in an .npz claim `count` values."""
  with zipfile.ZipFile(path) as archive:
    members = {item: archive.read(item) for item in archive.namelist()}
  with np.load(path) as file:
    dtype = file[name].dtype
  header = io.BytesIO()
  about = {
    "descr": np.lib.format.dtype_to_descr(dtype),
    "fortran_order": False,
    "shape": (count,),
  }
  np.lib.format.write_array_header_1_0(header, about)
  members[f"{name}.npy"] = header.getvalue() + bytes(16)
  with zipfile.ZipFile(path, "w") as archive:
    for item, content in members.items():
      archive.writestr(item, content)


# --- and what becomes of it --------------------------------------------------


def outcomes(
  kind: str, made: pathlib.Path, scratch: pathlib.Path, seeds: range
) -> tuple[collections.Counter, list[str]]:
  """Tampers with copies of a folder, once a seed.

  Args:
    kind: of KINDS.
    made: what was made.
    scratch: does not exist yet.
    seeds: one of every try.

  Returns:
    How many were "refused", the "same" and anything else, and what these did.
  """
  read = KINDS[kind][1]
  expected, counts, wrong = None, collections.Counter(), []
  for seed in seeds:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(made, scratch)
    if expected is None:
      expected = read(scratch)
      shutil.rmtree(scratch)
      shutil.copytree(made, scratch)
    change = tamper(scratch, random.Random(seed))
    try:
      outcome = "same" if read(scratch) == expected else "different"
    except UserError:
      outcome = "refused"
    except BaseException as error:
      outcome = f"{type(error).__name__}: {error}"[:200]
    counts[outcome if outcome in ("same", "refused") else "wrong"] += 1
    if outcome not in ("same", "refused"):
      wrong.append(f"seed {seed}, {change}: {outcome}")
  return counts, wrong


def main() -> None:
  count = int(sys.argv[1])
  for kind, (make, _) in KINDS.items():
    with tempfile.TemporaryDirectory() as folder:
      made = pathlib.Path(folder) / "made"
      make(made)
      counts, wrong = outcomes(
        kind, made, pathlib.Path(folder) / "tampered", range(count)
      )
    print(kind, dict(counts), *wrong, sep="\n  ", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
