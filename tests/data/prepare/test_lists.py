import math
import random

import numpy as np
import pytest

from hourjax.data.prepare.lists import Item, Rule, parse_rule, read_list
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


def test_a_missing_list(tmp_path):
  with pytest.raises(UserError, match=r"cannot read .*mix\.yaml: No such"):
    read_list(tmp_path / "mix.yaml")
