import itertools
import math
import random

import numpy as np
import pytest

from hourjax.data.prepare import build
from hourjax.data.prepare.lists import (
  Item,
  Options,
  Rule,
  parse_rule,
  read_list,
  report_elsewhere,
)
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError


def _chosen(text, total, seed=0, name="a"):
  chosen = parse_rule(text, "here").chosen(total, seed=seed, name=name)
  return np.flatnonzero(chosen).tolist()


def test_rules_take_what_llava_takes():
  for _ in range(50):
    total, percent = random.randrange(1, 200), random.randrange(1, 101)
    count = math.ceil(total * percent / 100)
    everything = list(range(total))
    assert _chosen("all", total) == everything
    assert _chosen(f"first:{percent}%", total) == everything[:count]
    assert _chosen(f"end:{percent}%", total) == everything[-count:]
    assert len(_chosen(f"random:{percent}%", total)) == count


def test_counts_and_fractions():
  assert _chosen("first:3", 10) == [0, 1, 2]
  assert _chosen("end:3", 2) == [0, 1]
  assert _chosen("first:0.1%", 3000) == [0, 1, 2]
  # Exact: 7 percent of 100 is 7, though 100 * 0.07 > 7 in floats.
  assert len(_chosen("first:7%", 100)) == 7
  assert _chosen("random:5", 0) == []


def test_random_depends_on_seed_and_file():
  one = _chosen("random:10%", 1000)
  assert one == _chosen("random:10%", 1000)
  assert one != _chosen("random:10%", 1000, seed=1)
  assert one != _chosen("random:10%", 1000, name="b")
  # Every conversation has the same chance.
  hits = np.zeros(20)
  for seed in range(400):
    hits[_chosen("random:25%", 20, seed=seed)] += 1
  assert abs(hits / 400 - 0.25).max() < 0.1


BAD = "some first first: first:0 first:0% first:101% end:-1 end:1.5 end:x%"


@pytest.mark.parametrize("text", [*BAD.split(), None, 3])
def test_bad_rules(text):
  with pytest.raises(UserError, match=r"^here: sampling_strategy .*first:N%"):
    parse_rule(text, "here")


def test_a_list_of_files(tmp_path):
  path = tmp_path / "mix.yaml"
  path.write_text("""
datasets:
  - json_path: sub/a.json
    sampling_strategy: "random:10%"
  - json_path: /abs/b.parquet
    format: questions
    stream: long
    media_prefix: b/videos
""")
  first, second = read_list(path)
  assert first == Item(
    paths=(tmp_path / "sub" / "a.json",),
    rule=parse_rule("random:10%", ""),
    name="sub/a.json",
  )
  assert (first.format, first.stream, first.media_prefix) == (
    "records",
    "default",
    "",
  )
  assert str(second.paths[0]) == "/abs/b.parquet"
  assert (second.format, second.stream) == ("questions", "long")
  assert (second.media_prefix, second.rule) == ("b/videos", Rule())


@pytest.mark.parametrize(
  "text, message",
  [
    ("datasets: [", "is not valid YAML"),
    ("datasets: !!python/name:os.system", "is not valid YAML"),
    ("datasets: " + "[" * 1500, "is nested too deep"),
    ("a: &a [*a]\ndatasets: *a", "more than 100,000 values"),
    (
      "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
      + "".join(
        f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi")
      )
      + "datasets: *i",
      "more than 100,000 values",
    ),
    ("# " + "x" * (1 << 20), "has more than 1048576 bytes"),
    (
      "datasets: [{local_path: data/shards}]",
      r"datasets\[0\]: local_path names MosaicML shards.*give the JSON lists",
    ),
    ("datasets: [{shard_path: a, choose: 9}]", "MosaicML shards"),
    (
      "datasets: [{json_path: a, media_root: /}]",
      "media_root '/' needs the media folder; give --media",
    ),
    ("", "expected 'datasets:' .* found None"),
    ("datasets: []", "expected 'datasets:'"),
    ("datasets: [a.json]", r"datasets\[0\]: expected keys"),
    ("datasets: [{json_path: a}]\nseed: 1", "unknown key 'seed'"),
    (
      "datasets: [{json_path: a}, {json_path: a, sampling: all}]",
      r"datasets\[1\]: unknown key 'sampling'; known are json_path, samp",
    ),
    ("datasets: [{stream: a}]", r"datasets\[0\]: no json_path"),
    ("datasets: [{json_path: 3}]", "json_path must be text, found 3"),
    ("datasets: [{json_path: a, format: x}]", "'x'; write one of records, q"),
    (
      "datasets: [{json_path: a, sampling_strategy: first}]",
      r"datasets\[0\]: sampling_strategy 'first'",
    ),
  ],
)
def test_broken_lists(tmp_path, text, message):
  path = tmp_path / "mix.yaml"
  path.write_text(text)
  with pytest.raises(UserError, match=message) as error:
    read_list(path)
  assert str(path) in str(error.value)


def test_a_list_that_is_no_file():
  for path in ("/dev/zero", "/dev/null", "/"):
    with pytest.raises(UserError, match=r"no regular file|a folder"):
      read_list(path)


def test_paths_from_the_working_directory(tmp_path, monkeypatch, capsys):
  """The official lists name ./data/..., seen from the checkout."""
  lists, here = tmp_path / "experiments", tmp_path / "run"
  (here / "data").mkdir(parents=True)
  lists.mkdir()
  mix = lists / "mix.yaml"
  mix.write_text("datasets: [{json_path: ./data/a.json}, {json_path: b.json}]")
  (here / "data" / "a.json").write_text("[]")
  (lists / "b.json").write_text("[]")
  monkeypatch.chdir(here)
  items = read_list(mix)
  assert [item.paths for item in items] == [
    (here / "data" / "a.json",),
    (lists / "b.json",),
  ]
  report_elsewhere(mix, items)
  told = capsys.readouterr().err
  assert "1 of 2 files are not beside the list" in told
  assert str(here / "data" / "a.json") in told
  (lists / "data").mkdir()
  (lists / "data" / "a.json").write_text("[1]")
  with pytest.raises(UserError, match=r"is both .*experiments.* and .*run"):
    read_list(mix)
  (lists / "data" / "a.json").unlink()
  (lists / "data" / "a.json").symlink_to(here / "data" / "a.json")
  assert read_list(mix)[0].paths == (lists / "data" / "a.json",)


def test_prefixes_and_roots(tmp_path, monkeypatch):
  media = tmp_path / "media"
  for name in ("coco", "ocr/x", "films"):
    (media / name).mkdir(parents=True)
  (tmp_path / "link").symlink_to(media / "coco")
  mix = tmp_path / "mix.yaml"
  mix.write_text(f"""
datasets:
  - json_path: a
  - {{json_path: a, media_prefix: own}}
  - {{json_path: a, media_prefix: ""}}
  - {{json_path: a, media_root: {media}/coco}}
  - {{json_path: a, media_root: media/ocr/x/}}
  - {{json_path: a, media_root: {media}}}
  - {{json_path: a, media_root: "media/films/{{data_source}}"}}
  - {{json_path: a, media_root: "{media}/{{data_source}}/b"}}
  - {{json_path: a, image_folder: media/coco, video_folder: media/films}}
  - {{json_path: a, image_folder: media/coco}}
  - {{json_path: a, media_root: link}}
  - {{json_path: a, media_root: ocr/x}}
""")
  items = read_list(mix, media=media, media_prefix="all/{data_source}")
  assert [
    [item.prefix(kind, "ego") for kind in ("image", "video")] for item in items
  ] == [
    ["all/ego", "all/ego"],
    ["own", "own"],
    ["", ""],
    ["coco", "coco"],
    ["ocr/x", "ocr/x"],
    ["", ""],
    ["films/ego", "films/ego"],
    ["ego/b", "ego/b"],
    ["coco", "films"],
    ["coco", "all/ego"],
    ["coco", "coco"],
    ["ocr/x", "ocr/x"],
  ]
  for entry, message in (
    (f"media_root: {tmp_path}", "lies outside the media folder"),
    ("media_root: none", r"none is no folder"),
    ("media_root: media, media_prefix: a", "both media_root"),
  ):
    mix.write_text(f"datasets: [{{json_path: a, {entry}}}]")
    with pytest.raises(UserError, match=message):
      read_list(mix, media=media)


def test_folders_stand_for_their_parquet_files(tmp_path):
  for name in ("b/2.parquet", "b/1.parquet", "a/3.parquet", ".c/4.parquet"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  paths = Item.of_files([str(tmp_path)]).paths
  names = [path.relative_to(tmp_path).as_posix() for path in paths]
  assert names == ["a/3.parquet", "b/1.parquet", "b/2.parquet"]
  (tmp_path / "d").mkdir()
  (tmp_path / "d" / "train.jsonl").touch()
  with pytest.raises(UserError, match=r"without .parquet files.*train\.jsonl"):
    Item.of_files([str(tmp_path / "d")])


@pytest.mark.parametrize("name", ["", "index.json", "shard.00000.mds"])
def test_shards_are_refused_by_name(tmp_path, name):
  index = '{"version": 2, "shards": [{"format": "mds", "raw_data": {}}]}'
  (tmp_path / "index.json").write_text(index)
  (tmp_path / "shard.00000.mds").touch()
  with pytest.raises(UserError, match=r"MosaicML shards.*StreamingDataset"):
    Item.of_files([str(tmp_path / name)])


def test_a_missing_list(tmp_path):
  with pytest.raises(UserError, match=r"cannot read .*mix\.yaml: No such"):
    read_list(tmp_path / "mix.yaml")


def test_datasets_of_other_roots_are_not_the_same(tmp_path, tokenizer_folder):
  """Else the second is not prepared, and the first is trained on."""
  (tmp_path / "media" / "p").mkdir(parents=True)
  (tmp_path / "a").touch()
  tokenizer, found = Tokenizer.from_folder(tokenizer_folder), []
  for more in (
    "media_prefix: p",
    "media_prefix: p, image_folder: media",
    "media_prefix: p, image_folder: media/p",
    "media_prefix: p, video_folder: media/p",
  ):
    mix = tmp_path / "mix.yaml"
    mix.write_text(f"datasets: [{{json_path: a, {more}}}]")
    items = tuple(read_list(mix, media=tmp_path / "media"))
    found.append(build.describe(Options(items, "t"), tokenizer, None))
  assert all(a != b for a, b in itertools.combinations(found, 2))
