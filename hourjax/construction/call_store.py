"""What models answered, in SQLite, so that no call is ever made twice.

A call is found by a digest of all that it depends on. Its answer is written
before anyone sees it: whenever the process is killed, the next one reads it
from here. A file has one writer; the workers of one folder have a file each and
read those of the others.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import filelock

from hourjax.errors import UserError

_VERSION = 1
_SCHEMA = """
CREATE TABLE videos(
  id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL,
  size INTEGER, mtime INTEGER, stamp TEXT, info TEXT,
  plan TEXT, state TEXT, result BLOB);
CREATE TABLE answers(
  video INTEGER NOT NULL, key BLOB NOT NULL, stage TEXT NOT NULL,
  answer BLOB NOT NULL, PRIMARY KEY(video, key)) WITHOUT ROWID;
CREATE TABLE spent(
  stage TEXT NOT NULL, model TEXT NOT NULL, calls INTEGER NOT NULL,
  tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL,
  seconds REAL NOT NULL, PRIMARY KEY(stage, model)) WITHOUT ROWID;
"""
# States of a video, and which of several workers' counts.
_RANK = {"": 0, "failed": 1, "dropped": 2, "partial": 3, "done": 4}
# Texts of fewer bytes do not become smaller.
_PACKED = 200


@dataclasses.dataclass(frozen=True)
class Reply:
  """Holds what a model wrote.

  Attributes:
    text: of the answer.
    cut: whether it ended at the limit of tokens.
    tokens_in: of the prompt, as the endpoint counted them.
    tokens_out: of the answer, likewise.
    seconds: until the answer was there.
  """

  text: str
  cut: bool = False
  tokens_in: int = 0
  tokens_out: int = 0
  seconds: float = 0.0


@dataclasses.dataclass
class Spent:
  """Counts calls and what they took, or means of such counts."""

  calls: float = 0
  tokens_in: float = 0
  tokens_out: float = 0
  seconds: float = 0.0

  def add(self, other: "Spent") -> None:
    """Adds another count."""
    self.calls += other.calls
    self.tokens_in += other.tokens_in
    self.tokens_out += other.tokens_out
    self.seconds += other.seconds


@dataclasses.dataclass(frozen=True)
class VideoRow:
  """Holds what is known of a video file.

  Attributes:
    number: of the video in its store.
    size: of the file, in bytes.
    mtime: of the file, in nanoseconds.
    stamp: that tells its content from others'.
    info: about the video, JSON values.
    plan: of the construction that its state is of.
    state: "done", "dropped", "partial" (done, but for calls that were refused)
      or "failed"; "" before.
  """

  number: int
  size: int
  mtime: int
  stamp: str
  info: dict[str, Any]
  plan: str
  state: str


class CallStore:
  """Reads and writes one SQLite file, and reads those beside it."""

  def __init__(self, folder: str | os.PathLike, label: str = "calls"):
    """Opens or creates LABEL.sqlite.

    Args:
      folder: existing folder of the construction.
      label: of the file, different for each worker.

    Raises:
      UserError: another process writes the file, or it is none of ours.
    """
    self.folder = pathlib.Path(folder)
    self.path = self.folder / f"{label}.sqlite"
    self._lock = filelock.FileLock(self.path.with_suffix(".lock"))
    try:
      self._lock.acquire(timeout=0)
    except filelock.Timeout:
      raise UserError(
        f"another process is constructing into {self.path}; wait for it, or"
        " give each process its own --worker=i/n"
      ) from None
    try:
      self._open()
    except BaseException:
      self._lock.release()
      raise

  def _open(self) -> None:
    """Opens the file, and those of other workers."""
    try:
      # One thread writes, so that the event loop never waits for the disk.
      self._writer = sqlite3.connect(self.path, check_same_thread=False)
      self._writer.execute("PRAGMA journal_mode=WAL")
      self._writer.execute("PRAGMA synchronous=FULL")
      (version,) = self._writer.execute("PRAGMA user_version").fetchone()
      if version == 0:
        with self._writer:
          self._writer.executescript(_SCHEMA)
          self._writer.execute(f"PRAGMA user_version={_VERSION}")
      elif version != _VERSION:
        raise UserError(
          f"{self.path} is of version {version}, this program writes"
          f" {_VERSION}; give another --out"
        )
      self._reader = sqlite3.connect(self.path)
      self._reader.execute("SELECT 1 FROM videos LIMIT 1")
    except sqlite3.Error as error:
      raise UserError(
        f"{self.path} cannot be read ({error}); give another --out"
      ) from None
    self._others: dict[pathlib.Path, sqlite3.Connection] = {}
    self._open_others()
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "calls")
    self._waiting: list[tuple[tuple, asyncio.Future]] = []
    self._flushing: asyncio.Task | None = None

  def _open_others(self) -> None:
    """Opens the files that other workers have begun since."""
    for path in sorted(self.folder.glob("calls*.sqlite")):
      if path != self.path and path not in self._others:
        other = _read_only(path)
        if other is not None:
          self._others[path] = other

  def __enter__(self) -> "CallStore":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the files; what was put is in them."""
    self._pool.shutdown(wait=True)
    for each in (self._writer, self._reader, *self._others.values()):
      each.close()
    self._lock.release()

  def videos(self) -> dict[str, VideoRow]:
    """Returns the videos of this file by name."""
    return _videos(self._reader)

  def others(self) -> dict[str, VideoRow]:
    """Returns the videos of other workers' files by name."""
    found: dict[str, VideoRow] = {}
    for other in self._others.values():
      for name, row in _videos(other).items():
        before = found.get(name)
        if before is None or _RANK[row.state] > _RANK[before.state]:
          found[name] = row
    return found

  async def add_video(
    self, name: str, size: int, mtime: int, stamp: str, info: Mapping[str, Any]
  ) -> int:
    """Writes what is known of a video's file; returns its number."""
    row = (name, size, mtime, stamp, json.dumps(info))
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(self._pool, self._add_video, row)

  def _add_video(self, row: tuple) -> int:
    """Writes a video in a transaction of its own."""
    with self._writing():
      (number,) = self._writer.execute(
        "INSERT INTO videos(name, size, mtime, stamp, info) VALUES(?,?,?,?,?)"
        " ON CONFLICT(name) DO UPDATE SET size=excluded.size,"
        " mtime=excluded.mtime, stamp=excluded.stamp, info=excluded.info"
        " RETURNING id",
        row,
      ).fetchone()
    return number

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Runs a transaction; says which file cannot be written."""
    try:
      with self._writer:
        yield
    except sqlite3.OperationalError as error:
      raise OSError(f"cannot write {self.path}: {error}") from error

  def answers(self, name: str) -> dict[bytes, Reply]:
    """Returns all answers about a video, of all workers, by their keys."""
    found: dict[bytes, Reply] = {}
    for each in (*self._others.values(), self._reader):
      rows = each.execute(
        "SELECT key, answer FROM answers JOIN videos ON videos.id=video"
        " WHERE videos.name=?",
        (name,),
      )
      found.update((key, _unpack_reply(answer)) for key, answer in rows)
    return found

  async def put_answer(
    self, video: int, key: bytes, stage: str, model: str, reply: Reply
  ) -> None:
    """Writes an answer; it is on the disk when this returns."""
    packed = _pack_reply(reply)
    counts = (stage, model, reply.tokens_in, reply.tokens_out, reply.seconds)
    await self._put(("answer", (video, key, stage, packed), counts))

  async def put_result(
    self, video: int, plan: str, state: str, result: Mapping[str, Any]
  ) -> None:
    """Writes how a video ended; it is on the disk when this returns."""
    packed = _pack(json.dumps(result, ensure_ascii=False))
    await self._put(("result", (plan, state, packed, video)))

  async def _put(self, item: tuple) -> None:
    """Hands an item to the writer, which commits several at a time."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    self._waiting.append((item, done))
    if self._flushing is None or self._flushing.done():
      self._flushing = loop.create_task(self._flush())
    # A task that is cancelled must not take the others' commit with it.
    await asyncio.shield(done)

  async def flush(self) -> None:
    """Waits until all that was put is on the disk."""
    while self._flushing is not None and not self._flushing.done():
      await asyncio.wait([self._flushing])

  async def _flush(self) -> None:
    """Commits what waits, until nothing does."""
    loop = asyncio.get_running_loop()
    while self._waiting:
      batch, self._waiting = self._waiting, []
      items = [item for item, _ in batch]
      try:
        await loop.run_in_executor(self._pool, self._commit, items)
      except BaseException as error:
        for _, done in batch:
          if not done.done():
            done.set_exception(error)
            done.exception()  # a cancelled task no longer asks for it
        if not isinstance(error, Exception):
          raise
        continue
      for _, done in batch:
        if not done.done():
          done.set_result(None)

  def _commit(self, items: list[tuple]) -> None:
    """Writes items in one transaction."""
    answers = [item for item in items if item[0] == "answer"]
    results = [item[1] for item in items if item[0] == "result"]
    with self._writing():
      self._writer.executemany(
        "INSERT OR REPLACE INTO answers VALUES(?,?,?,?)",
        [item[1] for item in answers],
      )
      self._writer.executemany(
        "INSERT INTO spent VALUES(?,?,1,?,?,?) ON CONFLICT DO UPDATE SET"
        " calls=calls+1, tokens_in=tokens_in+excluded.tokens_in,"
        " tokens_out=tokens_out+excluded.tokens_out,"
        " seconds=seconds+excluded.seconds",
        [item[2] for item in answers],
      )
      self._writer.executemany(
        "UPDATE videos SET plan=?, state=?, result=? WHERE id=?", results
      )

  def spent(self) -> dict[tuple[str, str], Spent]:
    """Returns what this file's calls took, by stage and model."""
    return _spent(self._reader)

  def spent_by_others(self) -> dict[tuple[str, str], Spent]:
    """Returns what the calls of other workers took, by stage and model."""
    self._open_others()
    total: dict[tuple[str, str], Spent] = {}
    for other in self._others.values():
      for key, spent in _spent(other).items():
        total.setdefault(key, Spent()).add(spent)
    return total

  def spent_by_all(self) -> dict[tuple[str, str], Spent]:
    """Returns what the calls of all workers took, by stage and model."""
    total = self.spent_by_others()
    for key, spent in self.spent().items():
      total.setdefault(key, Spent()).add(spent)
    return total

  def results(self, plan: str) -> Iterator[tuple[str, str, VideoRow, dict]]:
    """Yields name, state, row and result of all workers' videos, sorted.

    Args:
      plan: of the construction; results of others are left out.
    """
    self._open_others()
    places: dict[str, tuple[sqlite3.Connection, VideoRow]] = {}
    for each in (*self._others.values(), self._reader):
      for name, row in _videos(each).items():
        if row.plan != plan or not row.state:
          continue
        # What one worker could not do, another one may have done.
        before = places.get(name)
        if before is None or _RANK[row.state] >= _RANK[before[1].state]:
          places[name] = each, row
    for name in sorted(places):
      each, row = places[name]
      (packed,) = each.execute(
        "SELECT result FROM videos WHERE id=?", (row.number,)
      ).fetchone()
      yield name, row.state, row, json.loads(_unpack(packed))


def _read_only(path: pathlib.Path) -> sqlite3.Connection | None:
  """Opens another worker's file; None if it is not written yet."""
  with contextlib.suppress(sqlite3.Error):
    other = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    (version,) = other.execute("PRAGMA user_version").fetchone()
    if version == _VERSION:
      return other
    other.close()
  return None


def _videos(connection: sqlite3.Connection) -> dict[str, VideoRow]:
  """Returns the videos of a file by name."""
  rows = connection.execute(
    "SELECT name, id, size, mtime, stamp, info, plan, state FROM videos"
  )
  return {
    name: VideoRow(
      number, size, mtime, stamp, json.loads(info), plan or "", state or ""
    )
    for name, number, size, mtime, stamp, info, plan, state in rows
  }


def _spent(connection: sqlite3.Connection) -> dict[tuple[str, str], Spent]:
  """Returns what a file's calls took, by stage and model."""
  rows = connection.execute("SELECT * FROM spent")
  return {(stage, model): Spent(*rest) for stage, model, *rest in rows}


def _pack(text: str) -> bytes:
  """Returns text as bytes, compressed if that helps."""
  plain = text.encode("utf-8", "surrogatepass")
  if len(plain) < _PACKED:
    return b"\0" + plain
  return b"\1" + zlib.compress(plain, 1)


def _unpack(packed: bytes) -> str:
  """Returns the text of `_pack`."""
  plain = packed[1:] if packed[0] == 0 else zlib.decompress(packed[1:])
  return plain.decode("utf-8", "surrogatepass")


def _pack_reply(reply: Reply) -> bytes:
  """Returns a reply as bytes."""
  numbers = [reply.cut, reply.tokens_in, reply.tokens_out, reply.seconds]
  return _pack(json.dumps([*numbers, reply.text], ensure_ascii=False))


def _unpack_reply(packed: bytes) -> Reply:
  """Returns the reply of `_pack_reply`."""
  cut, tokens_in, tokens_out, seconds, text = json.loads(_unpack(packed))
  return Reply(text, bool(cut), tokens_in, tokens_out, seconds)
