"""What holds for all benchmarks: errors, versions, ids, videos."""

import dataclasses
import itertools
import json
import re

import pytest

from hourjax.errors import UserError
from hourjax.evaluation import benchmarks
from hourjax.evaluation.benchmarks.benchmark import FRAMES
from tests.evaluation.benchmarks import layouts

# A change here changes what a score means. Code that asks differently without
# changing a rule's text raises the benchmark's `revision`.
VERSIONS = {
  "videomme": "2-d09dc86e",
  "longvideobench": "2-ae2c9afa",
  "lvbench": "2-582717d5",
  "tempcompass": "2-09c58f1b",
  "mlvu": "2-19fe05c5",
  "records": "2-f4276ef4",
}


@pytest.fixture
def folders(tmp_path):
  return layouts.write_all(tmp_path)


def test_versions():
  assert {s.name: s.version for s in benchmarks.BENCHMARKS.values()} == VERSIONS


@pytest.mark.parametrize(
  "change",
  [
    {"revision": 99},
    {"prompts": {"choice": "{question}"}},
    {"subtitles": "none"},
    {"frames": "32 frames"},
    {"max_tokens": 17},
  ],
)
def test_every_rule_is_in_the_version(change):
  benchmark = benchmarks.BENCHMARKS["videomme"]
  assert dataclasses.replace(benchmark, **change).version != benchmark.version


def test_rules_are_stated():
  for benchmark in benchmarks.BENCHMARKS.values():
    assert benchmark.frames == FRAMES
    assert all("{question}" in p for n, p in benchmark.prompts.items()
               if n != "subtitles")  # fmt: skip
  with_subtitles = {
    s.name for s in benchmarks.BENCHMARKS.values() if s.subtitles
  }
  assert with_subtitles == {"videomme", "longvideobench"}


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_reads_a_folder(name, folders):
  loaded = benchmarks.read(name, folders[name])
  assert loaded.benchmark is benchmarks.BENCHMARKS[name]
  assert len(loaded.questions) == (3 if name == "tempcompass" else 1)
  assert len({q.id for q in loaded.questions}) == len(loaded.questions)
  for question in loaded.questions:
    assert question.video.endswith(".mp4")
    assert 0 < question.chance <= 0.5
    assert question.tasks or name == "records"
  assert benchmarks.read(name, folders[name]) == loaded


@pytest.mark.parametrize("name", ["videomme", "lvbench", "mlvu", "records"])
def test_reads_a_file(name, folders):
  whole = benchmarks.read(name, folders[name])
  pattern = "*.parquet" if name == "videomme" else "*.json*"
  (path,) = (p for p in folders[name].rglob(pattern))
  one = benchmarks.read(name, path)
  assert one.questions == whole.questions
  assert one.videos == whole.videos


@pytest.mark.parametrize(
  ("wanted", "given"), list(itertools.permutations(benchmarks.BENCHMARKS, 2))
)
def test_another_benchmark(wanted, given, folders):
  message = (
    f"looks like {benchmarks.BENCHMARKS[given].title}, not like"
    f" {benchmarks.BENCHMARKS[wanted].title}; use --benchmark={given}"
  )
  with pytest.raises(UserError, match=re.escape(message)):
    benchmarks.read(wanted, folders[given])


def test_another_benchmark_under_this_ones_name(tmp_path):
  path = tmp_path / "videomme/test-0.parquet"
  layouts.write_parquet(path, [layouts.LVBENCH_QA | {"key": "x"}])
  with pytest.raises(UserError, match=r"test-0.*LVBench.*Video-MME"):
    benchmarks.read("videomme", tmp_path)


def test_unknown_benchmark(tmp_path):
  with pytest.raises(UserError, match=r"'mvbench'.*longvideobench, lvbench"):
    benchmarks.read("mvbench", tmp_path)


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_empty_folder(name, tmp_path):
  (tmp_path / "readme.md").touch()
  title = re.escape(benchmarks.BENCHMARKS[name].title)
  first = re.escape(benchmarks.BENCHMARKS[name].annotations[0].split()[0])
  with pytest.raises(UserError, match=rf"{title}.*{first}.*readme\.md"):
    benchmarks.read(name, tmp_path)


def test_no_folder(tmp_path):
  with pytest.raises(UserError, match=r"nowhere does not exist"):
    benchmarks.read("mlvu", tmp_path / "nowhere")


def test_columns_of_no_benchmark(tmp_path):
  path = layouts.write_parquet(tmp_path / "test-0.parquet", [{"a": 1, "b": 2}])
  with pytest.raises(UserError, match=r"columns are a, b, expected.*videoID"):
    benchmarks.read("videomme", path)


@pytest.mark.parametrize("name", ["longvideobench", "lvbench", "tempcompass"])
@pytest.mark.parametrize("text", ["", '[{"id": ', "no json", "[]", '["a"]'])
def test_damaged_json(name, text, folders):
  path = sorted(folders[name].rglob("*.json*"))[0]
  path.write_text(text)
  with pytest.raises(UserError, match=re.escape(str(path))):
    benchmarks.read(name, folders[name])


def test_one_damaged_line(tmp_path):
  good = json.dumps(layouts.LVBENCH)
  path = tmp_path / "video_info.meta.jsonl"
  path.write_text(f"{good}\n{good[:50]}\n")
  with pytest.raises(UserError, match=r"meta\.jsonl: row 2 is damaged"):
    benchmarks.read("lvbench", tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_damaged_parquet(keep, tmp_path):
  path = tmp_path / "videomme/test-0.parquet"
  layouts.write_parquet(path, [layouts.VIDEOMME])
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(UserError, match=re.escape(str(path))):
    benchmarks.read("videomme", tmp_path)


def test_pointer_instead_of_a_file(tmp_path):
  path = tmp_path / "videomme/test-0.parquet"
  path.parent.mkdir()
  path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:9\n")
  with pytest.raises(UserError, match=r"test-0.parquet cannot be read"):
    benchmarks.read("videomme", tmp_path)


def test_ids_twice(tmp_path):
  layouts.write_parquet(
    tmp_path / "videomme/test-0.parquet", [layouts.VIDEOMME] * 2
  )
  with pytest.raises(UserError, match=r"Video-MME.*several.*'001-1'"):
    benchmarks.read("videomme", tmp_path)


def test_subtitles_where_there_are_none(folders):
  message = r"LVBench has no subtitles.*longvideobench and videomme"
  with pytest.raises(UserError, match=message):
    benchmarks.read("lvbench", folders["lvbench"], subtitles=True)


def test_videos_are_found_by_any_extension(folders):
  layouts.touch(folders["videomme"], "data/fFjv93ACGo8.MKV", "data/other.mp4")
  loaded = benchmarks.read("videomme", folders["videomme"])
  assert loaded.videos == folders["videomme"] / "data"
  assert loaded.questions[0].video == "fFjv93ACGo8.MKV"


def test_videos_are_where_there_are_some(folders):
  layouts.touch(folders["videomme"], "data/notes.txt", "videos/x.mp4")
  loaded = benchmarks.read("videomme", folders["videomme"])
  assert loaded.videos == folders["videomme"] / "videos"
  assert loaded.questions[0].video == "fFjv93ACGo8.mp4"


def test_videos_in_a_folder_of_their_own(folders, tmp_path):
  layouts.touch(tmp_path, "films/part2/fFjv93ACGo8.webm")
  loaded = benchmarks.read(
    "videomme", folders["videomme"], videos=tmp_path / "films"
  )
  assert loaded.videos == tmp_path / "films"
  assert loaded.questions[0].video == "part2/fFjv93ACGo8.webm"


def test_videos_beside_the_annotations(folders):
  layouts.touch(folders["records"], "film.mp4")
  loaded = benchmarks.read("records", folders["records"])
  assert loaded.videos == folders["records"]
  assert loaded.questions[0].video == "film.mp4"


def test_stored_videos(folders):
  stored = ["plotQA/movie101_66.mkv"]
  loaded = benchmarks.read("mlvu", folders["mlvu"], stored=stored)
  assert loaded.questions[0].video == "plotQA/movie101_66.mkv"
  stored = ["0_other/movie101_66.mkv", "1_plotQA/movie101_66.mkv"]
  loaded = benchmarks.read("mlvu", folders["mlvu"], stored=stored)
  assert loaded.questions[0].video == "1_plotQA/movie101_66.mkv"
  loaded = benchmarks.read("mlvu", folders["mlvu"], stored=[])
  assert loaded.questions[0].video == "1_plotQA/movie101_66.mp4"


def test_lacking_files_are_told(folders):
  (folders["tempcompass"] / "questions/yes_no.json").unlink()
  loaded = benchmarks.read("tempcompass", folders["tempcompass"])
  assert len(loaded.questions) == 2
  assert loaded.notes == (
    "Not asked, as the file is missing: questions/yes_no.json.",
  )
