import concurrent.futures
import datetime
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from hourjax.data.media import parquet_images
from hourjax.data.media.images import load_image
from hourjax.data.prepare.build import build
from hourjax.data.prepare.lists import Item, Options, read_list
from hourjax.data.prepared import Prepared
from hourjax.errors import UserError

PART = "ai2d(cauldron,llava_format)"  # as LLaVA-OneVision's folders are named


def _pixels(number):
  rng = np.random.default_rng(number)
  return rng.integers(0, 255, (30 + number, 40, 3), np.uint8)


def _encoded(number, form="PNG"):
  content = io.BytesIO()
  Image.fromarray(_pixels(number)).save(content, form)
  return content.getvalue()


def _row(number, **fields):
  talk = [
    {"from": "human", "value": f"<image>\nWhat is {number}?"},
    {"from": "gpt", "value": "A cat."},
  ]
  row = {"id": f"r{number}", "conversations": talk, "data_source": PART}
  row["image"] = {"bytes": _encoded(number), "path": f"{number}.png"}
  return row | fields


def _save(path, rows, group=3):
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, path, row_group_size=group)
  return path


@pytest.fixture
def download(tmp_path):
  """A media folder with a download of two parts, eight images and a text."""
  text = _row(8, image=None)
  text["conversations"] = [
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello."},
  ]
  root = tmp_path / "media"
  rows = [_row(i) for i in range(7)]
  _save(root / "ov" / PART / "train-00000-of-00002.parquet", rows[:5])
  _save(root / "ov" / PART / "train-00001-of-00002.parquet", rows[5:])
  other = _row(7, data_source=None)
  _save(root / "ov" / "other" / "train-00000-of-00001.parquet", [other, text])
  (root / "ov" / ".cache").mkdir()
  (root / "ov" / ".cache" / "x.parquet").write_bytes(b"not one")
  return root


def _options(tokenizer_folder, paths, **more):
  items = tuple(Item.of_files([str(path)]) for path in paths)
  return Options(items=items, tokenizer=str(tokenizer_folder), **more)


@pytest.mark.parametrize("how", ["unpack", "keep"])
def test_a_download_is_read_as_it_lies(
  tmp_path, tokenizer_folder, download, how
):
  options = _options(
    tokenizer_folder,
    [download / "ov"],
    media=str(download),
    parquet_images=how,
  )
  summary, _ = build(tmp_path / "d", options)
  assert summary["dropped"] == {}
  assert {k: n["conversations"] for k, n in summary["sources"].items()} == {
    PART: 7 + 1,
    "other": 1,
  }
  data = Prepared(tmp_path / "d")
  assert len(data) == 9
  seen = {}
  for i, record in enumerate(data.records):
    number = int(record.id[1:])
    if record.modality == "text":
      assert number == 8
      continue
    (name,) = record.media
    pixels = _pixels(number)
    np.testing.assert_array_equal(load_image(download / name), pixels)
    assert data.columns.height[i] == 30 + number
    assert (how == "unpack") == (download / name).is_file()
    seen[number] = name
  assert len(set(seen.values())) == 8


def test_a_second_run_finds_what_the_first_unpacked(
  tmp_path, tokenizer_folder, download
):
  options = _options(tokenizer_folder, [download / "ov"], media=str(download))
  build(tmp_path / "d", options)
  files = [p for p in (download / "unpacked").rglob("*") if p.is_file()]
  assert len(files) == 8
  before = {path: path.stat().st_mtime_ns for path in files}
  files[0].write_bytes(b"cut")  # as by a full disk
  build(tmp_path / "e", options)
  after = {
    path: path.stat().st_mtime_ns
    for path in (download / "unpacked").rglob("*")
    if path.is_file()
  }
  assert after.keys() == before.keys()
  assert {p for p in after if after[p] != before[p]} == {files[0]}
  assert load_image(files[0]).shape[1] == 40


def test_only_what_is_chosen_is_unpacked(tmp_path, tokenizer_folder, download):
  (tmp_path / "mix.yaml").write_text(
    f"datasets: [{{json_path: 'media/ov/{PART}', sampling_strategy: 'end:2'}}]"
  )
  items = tuple(read_list(tmp_path / "mix.yaml"))
  options = Options(
    items=items, tokenizer=str(tokenizer_folder), media=str(download)
  )
  build(tmp_path / "d", options)
  assert [r.id for r in Prepared(tmp_path / "d").records] == ["r5", "r6"]
  files = [p for p in (download / "unpacked").rglob("*") if p.is_file()]
  assert len(files) == 2


@pytest.mark.parametrize("how", ["unpack", "keep"])
def test_other_columns_of_images(tmp_path, tokenizer_folder, how):
  media = tmp_path / "media"
  rows = [
    _row(0, image=_encoded(0, "JPEG")),
    _row(1, image=_encoded(1, "WEBP")),
  ]
  _save(media / "bare.parquet", rows)
  many = [
    {"bytes": _encoded(2), "path": None},
    {"bytes": None, "path": "j.png"},
    {"bytes": _encoded(3), "path": None},
  ]
  Image.new("RGB", (5, 5)).save(media / "j.png")
  row = _row(2, images=many, extra=b"\1\2", day=datetime.date(2024, 1, 2))
  del row["image"]
  row["conversations"][0]["value"] = "<image><image><image>Same?"
  _save(media / "many.parquet", [row])
  options = _options(
    tokenizer_folder,
    [media / "bare.parquet", media / "many.parquet"],
    media=str(media),
    parquet_images=how,
  )
  summary, _ = build(tmp_path / "d", options)
  assert summary["dropped"] == {}
  first, _, last = Prepared(tmp_path / "d").records
  assert load_image(media / first.media[0]).shape == (30, 40, 3)
  assert last.media[1] == "j.png"
  np.testing.assert_array_equal(load_image(media / last.media[2]), _pixels(3))
  assert last.extra["day"].startswith("2024-01-02")


def test_images_are_read_in_any_order_by_threads(tmp_path):
  rows = [_row(i) for i in range(40)]
  path = _save(tmp_path / "a.parquet", rows, group=7)
  numbers = np.random.default_rng(0).permutation(np.repeat(range(40), 3))

  def right(number):
    name = parquet_images.name_of(path, "image", int(number), None)
    return np.array_equal(load_image(name), _pixels(number))

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert all(pool.map(right, numbers))


def test_a_changed_file_is_read_anew(tmp_path):
  path = _save(tmp_path / "a.parquet", [_row(0), _row(1)])
  name = parquet_images.name_of(path, "image", 0, None)
  np.testing.assert_array_equal(load_image(name), _pixels(0))
  _save(path, [_row(5), _row(6), _row(7)])
  np.testing.assert_array_equal(load_image(name), _pixels(5))


@pytest.mark.parametrize(
  "name, message",
  [
    ("a.parquet/image/9", "no such image"),
    ("a.parquet/picture/0", "no such image .*no column 'picture'"),
    ("a.parquet/image/x", "no such image"),
    ("a.parquet/image/0.1", "no such image"),
    ("a.parquet/id/0", "holds no bytes"),
    ("b.parquet/image/0", "No such file|Not a directory"),
    ("bad.parquet/image/0", "cannot be read"),
  ],
)
def test_images_that_are_not_there(tmp_path, name, message):
  _save(tmp_path / "a.parquet", [_row(0)])
  (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
  with pytest.raises(UserError, match=message):
    load_image(tmp_path / name)


def _lfs(path):
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:a")


def _cut(path):
  path.write_bytes(_save(path, [_row(0)]).read_bytes()[:-20])


@pytest.mark.parametrize(
  "make, message",
  [
    (_lfs, "is a Git-LFS pointer"),
    (_cut, "cannot read .* as parquet"),
    (lambda path: path.write_bytes(b""), "cannot read .* as parquet"),
  ],
)
def test_files_that_are_no_parquet(tmp_path, tokenizer_folder, make, message):
  make(tmp_path / "a.parquet")
  options = _options(
    tokenizer_folder, [tmp_path / "a.parquet"], media=str(tmp_path)
  )
  with pytest.raises(UserError, match=message):
    build(tmp_path / "d", options)


def test_images_need_a_media_folder(tmp_path, tokenizer_folder, monkeypatch):
  path = _save(tmp_path / "a" / "a.parquet", [_row(0)])
  with pytest.raises(UserError, match="give --media"):
    build(tmp_path / "d", _options(tokenizer_folder, [path]))
  (tmp_path / "m").mkdir()
  keep = {"media": str(tmp_path / "m"), "parquet_images": "keep"}
  with pytest.raises(UserError, match="lies outside the media folder"):
    build(tmp_path / "d", _options(tokenizer_folder, [path], **keep))
  keep["media"] = str(tmp_path)
  monkeypatch.setattr(parquet_images, "MOST_GROUP", 100)
  with pytest.raises(UserError, match=r"groups of up to .*; unpack them"):
    build(tmp_path / "d", _options(tokenizer_folder, [path], **keep))


def test_a_broken_image_costs_its_record(tmp_path, tokenizer_folder):
  rows = [_row(0), _row(1), _row(2, image={"bytes": None, "path": "no.png"})]
  rows[1]["image"]["bytes"] = b"\x89PNG and no more"
  path = _save(tmp_path / "a.parquet", rows)
  options = _options(tokenizer_folder, [path], media=str(tmp_path))
  summary, _ = build(tmp_path / "d", options)
  counts = {kind: n["count"] for kind, n in summary["dropped"].items()}
  assert counts == {"unreadable image": 1, "missing file": 1}
  lines = (tmp_path / "d" / "skipped.jsonl").read_text().splitlines()
  assert json.loads(lines[0])["where"] == f"{path}[1]"
