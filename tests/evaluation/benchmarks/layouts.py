"""Small benchmarks on disk, laid out and named as published."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pyarrow
import pyarrow.parquet


def write_json(path: pathlib.Path, value: Any) -> pathlib.Path:
  """Writes JSON, or JSONL if the path says so, and makes its folders."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in value))
  else:
    path.write_text(json.dumps(value))
  return path


def write_parquet(path: pathlib.Path, rows: Sequence[dict]) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
  return path


def touch(root: pathlib.Path, *names: str) -> None:
  """Files that need only be there, such as videos."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


VIDEOMME = {
  "video_id": "001",
  "duration": "short",
  "domain": "Knowledge",
  "sub_category": "Humanity & History",
  "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
  "videoID": "fFjv93ACGo8",
  "question_id": "001-1",
  "task_type": "Counting Problem",
  "question": "Which kind of decoration has the largest number?",
  "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. All the same."],
  "answer": "C",
}

LONGVIDEOBENCH = {
  "video_id": "86CxyhFV9MI",
  "question": "Which subtitles appear with the man on stage?",
  "question_wo_referring_query": "Which subtitles appear?",
  "candidates": ["a crown", "a world of souls", "captain of the godson"],
  "correct_choice": 1,
  "position": [854],
  "topic_category": "NP-News-Programs",
  "question_category": "TOS",
  "level": "L2-Relation",
  "id": "86CxyhFV9MI_0",
  "video_path": "86CxyhFV9MI.mp4",
  "subtitle_path": "86CxyhFV9MI_en.json",
  "duration_group": 600,
  "starting_timestamp_for_subtitles": 0,
  "duration": 190.16,
  "view_count": 259852,
}

LVBENCH_QA = {
  "uid": "55",
  "question": "What year appears in the opening caption of the video?\n"
  "(A) 1636\n(B) 1366\n(C) 1363\n(D) 1633",
  "answer": "D",
  "question_type": ["key information retrieval", "entity recognition"],
  "time_reference": "00:15-00:19",
}

LVBENCH = {
  "key": "Cm73ma6Ibcs",
  "type": "cartoon",
  "video_info": {
    "duration_minutes": 47.4,
    "fps": 24.0,
    "resolution": {"width": 1280, "height": 720},
  },
  "qa": [LVBENCH_QA],
}

MLVU = {
  "video": "movie101_66.mp4",
  "duration": 246,
  "question": "What color is the main male character in the video?",
  "candidates": ["Yellow", "Red", "Green", "Blue"],
  "answer": "Yellow",
  "question_type": "plotQA",
}

TEMPCOMPASS = {
  "multi-choice": {
    "question": "What is the man doing in the video?\nA. dunking a basketball\n"
    "B. dribbling a basketball\nC. passing a basketball",
    "answer": "A. dunking a basketball",
  },
  "yes_no": {"question": "Is the man dunking?", "answer": "yes"},
  "caption_matching": {
    "question": "Which caption matches the video better?\n"
    "Caption A: A man is passing.\nCaption B: A man is dunking.",
    "answer": "Caption B: A man is dunking.",
  },
}

RECORD = {
  "id": "film-00",
  "video": "film.mp4",
  "data_source": "demo",
  "duration": 900.0,
  "conversations": [
    {
      "from": "human",
      "value": "<image>\nWhich place?\nA. hill\nB. pond\nSay a letter.",
    },
    {"from": "gpt", "value": "B"},
  ],
}


def write_all(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """A folder of each benchmark, by its name."""
  write_parquet(root / "videomme/videomme/test-0.parquet", [VIDEOMME])
  write_json(root / "longvideobench/lvb_val.json", [LONGVIDEOBENCH])
  write_json(root / "lvbench/video_info.meta.jsonl", [LVBENCH])
  for form, item in TEMPCOMPASS.items():
    aspects = {"1034419625": {"action": [item]}}
    write_json(root / f"tempcompass/questions/{form}.json", aspects)
  write_json(root / "mlvu/json/1_plotQA.json", [MLVU])
  write_json(root / "records/test.json", [RECORD])
  return {path.name: path for path in root.iterdir()}
