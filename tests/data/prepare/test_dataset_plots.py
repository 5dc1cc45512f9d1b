import numpy as np
import pytest
from PIL import Image

from hourjax.data.prepare import dataset_plots

NAMES = {"sources.png", "topics.png", "durations.png", "tasks.png"}


def _summary(count=22, **more):
  names = [f"a_rather_long_name_of_a_task_{i}" for i in range(count)]
  counts = {name: 3 * i + 1 for i, name in enumerate(names)}
  kept = {"conversations": 9, "questions": 99, "videos": 5, "hours": 2.5}
  return {
    "kept": {**kept, "videos_of_unknown_duration": 1},
    "sources": {
      "a $x$ b": {"videos": 3, "conversations": 6},
      "": {"videos": 2, "conversations": 3},
    },
    "topics": {"object": 60, "": 39},
    "tasks": counts,
    "topic_of_task": {name: f"topic {i % 6}" for i, name in enumerate(names)},
    "videos_per_5_minutes": [3, 0, 2],
    **more,
  }


def test_four_pictures(tmp_path):
  done = dataset_plots.draw_plots(tmp_path, _summary())
  assert done == dict.fromkeys(NAMES, "drawn")
  for name in NAMES:
    pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    assert pixels.shape[0] > 250
    assert pixels.shape[1] > 700
    assert len(np.unique(pixels @ (1, 256, 65536))) > 10
    # Nothing touches the edge.
    edge = [pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]]
    assert all((part == 255).all() for part in edge), name


def test_what_is_not_known_is_left_out_and_said(tmp_path):
  summary = _summary(topics={"": 99}, tasks={}, videos_per_5_minutes=[])
  done = dataset_plots.draw_plots(tmp_path, summary)
  assert {path.name for path in tmp_path.iterdir()} == {"sources.png"}
  assert done["sources.png"] == "drawn"
  assert done["topics.png"].startswith("left out: no record tells the topics")
  assert done["tasks.png"].startswith("left out: no record tells the tasks")
  assert "give --media or --features" in done["durations.png"]


@pytest.mark.parametrize("tasks", [1, 300])
def test_any_number_of_bars(tmp_path, tasks):
  dataset_plots.draw_plots(
    tmp_path, _summary(tasks, videos_per_5_minutes=[1] * 90)
  )
  with Image.open(tmp_path / "tasks.png") as picture:
    assert picture.height < 3000


def test_text_alone(tmp_path):
  kept = {"conversations": 9, "questions": 9, "videos": 0, "hours": 0.0}
  kept["videos_of_unknown_duration"] = 0
  sources = {"a": {"videos": 0, "conversations": 9}}
  dataset_plots.draw_plots(tmp_path, _summary(kept=kept, sources=sources))


def test_another_datasets_shares_are_marked(tmp_path):
  """Ticks lie where bars of the same share would end."""
  shares = {
    "name": "theirs",
    "topics": {"object": 50.0},
    "sources": {"other": 10.0},
    "videos_per_5_minutes": [1.0, 3.0, 0.0, 4.0],
  }
  plain, marked = tmp_path / "plain", tmp_path / "marked"
  for folder, reference in ((plain, None), (marked, shares)):
    folder.mkdir()
    dataset_plots.draw_plots(folder, _summary(), reference)
  changed = {
    name
    for name in NAMES
    if (plain / name).read_bytes() != (marked / name).read_bytes()
  }
  assert changed == {"topics.png", "durations.png"}
  figure = dataset_plots._questions(_summary(), "topics", {}, shares)
  axes = figure.axes[0]
  (line,) = [line for line in axes.lines if line.get_xdata()[0] == 49.5]
  assert line.get_label() == "theirs" and list(line.get_ydata()) == [
    -0.45,
    0.45,
  ]
