"""From a folder of videos and a file of questions to a model and a report.

    questions, checked and split     OUT/data/records.json, held_out.json, ...
    prepare                          OUT/data/dataset
    forecast
    extract                          OUT/data/features
    ask the model before             OUT/before
    train                            OUT/model
    ask the model after              OUT/after
    report                           OUT/report.md

Each stage is what the command of its name does. All are in this process, since
only one process can hold the devices.
"""

import dataclasses
import hashlib
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import hourjax
from hourjax import progress
from hourjax.atomic_file import write_file
from hourjax.data.prepare import build, lists
from hourjax.data.prepare.convert import VideoFact
from hourjax.data.prepare.question_tables import Columns
from hourjax.data.store.features import FeatureStore
from hourjax.errors import UserError
from hourjax.evaluation import run as evaluation
from hourjax.evaluation.task import open_task
from hourjax.extraction.encoder import tower_params
from hourjax.extraction.video_list import find_videos
from hourjax.extraction.worker import extract_videos
from hourjax.finetuning import (
  forecast,
  questions,
  report,
  settings,
  table_rows,
)
from hourjax.finetuning.questions import Questions, Skip
from hourjax.finetuning.stages import Stages
from hourjax.finetuning.video_names import VideoNames
from hourjax.training.config import DataConfig, Experiment
from hourjax.training.loop import train

EXTRACT, BEFORE, TRAIN, AFTER = (
  "extract features", "ask before", "train", "ask after"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """Holds the options of the command.

  Attributes:
    videos: folder of videos.
    questions: file of questions.
    model: workdir, published folder, or a name with hf://.
    out: folder of the result.
    tokenizer: folder of the tokenizer, if not the model's own.
    columns: names of columns, by role.
    first_option: number of the first option; None finds out.
    holdout: share or number of videos to hold out; empty for the usual rule.
    overrides: of the training's configuration, as text, by key.
    dry_run: whether to end after the forecast.
  """

  videos: str
  questions: str
  model: str
  out: str
  tokenizer: str | None = None
  columns: Columns = dataclasses.field(default_factory=dict)
  first_option: int | None = None
  holdout: str = ""
  overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
  dry_run: bool = False


def finetune(options: Options) -> int | None:
  """Does all stages that are left, and writes the report.

  Args:
    options: of the command.

  Returns:
    The number of a signal that ended the training early, None otherwise.

  Raises:
    UserError: the questions, the model or the folder cannot be used.
  """
  return _Finetuning(options).run()


class _Finetuning:
  """Holds what the stages share."""

  def __init__(self, options: Options):
    """Reads and checks everything that takes seconds."""
    self._options = options
    self._out = pathlib.Path(options.out)
    self._data = self._out / "data"
    with progress.step("reading the model's configuration"):
      self._base = settings.base_experiment(options.model, options.tokenizer)
    with progress.step("reading the questions"):
      rows = table_rows.read(options.questions)
      names = VideoNames(find_videos(options.videos))
      self._found = questions.read(
        rows,
        names,
        columns=options.columns,
        first_option=options.first_option,
      )
    self._facts = forecast.probe(options.videos, self._found.videos)
    drop_unusable(self._found, self._facts)
    if not self._found.found:
      raise UserError(f"no question of {options.questions} can be used")
    self._found.notes += settings.choose_held_out(
      self._found.found, options.holdout
    )
    self._held = [item for item in self._found.found if item["held_out"]]
    self._read = report.describe_questions(self._found, self._held)
    print("\n".join(self._read), flush=True)

  def run(self) -> int | None:
    """Does all stages."""
    records = questions.conversations(self._found.found)
    text = json.dumps(records, ensure_ascii=False, indent=1)
    self._stages = Stages(self._out, self._about(text))
    self._write_data(records, text)
    experiment = self._experiment()
    self._forecast(experiment)
    if self._options.dry_run:
      return None
    self._stages.run(EXTRACT, self._extract)
    if self._held:
      self._stages.run(
        BEFORE, lambda: self._ask(self._options.model, self._out / "before")
      )
    signal: list[int] = []
    self._stages.run(TRAIN, lambda: self._train(signal))
    if signal:
      return signal[0]
    if self._held:
      self._stages.run(
        AFTER,
        lambda: self._ask(str(self._out / "model"), self._out / "after"),
      )
    self._report()
    return None

  def _about(self, records: str) -> dict[str, str]:
    """Returns what all stages depend on."""
    options = self._options
    return {
      "questions or videos": hashlib.sha256(records.encode()).hexdigest(),
      "--model": self._base.init,
      "--set": json.dumps(dict(options.overrides), sort_keys=True),
    }

  def _write_data(self, records: Sequence[dict[str, Any]], text: str) -> None:
    """Writes the records, and prepares them."""
    held = [record for record in records if record["held_out"]]
    files = {
      "records.json": text,
      "held_out.json": json.dumps(held, ensure_ascii=False, indent=1),
      "held_out.txt": "\n".join(sorted({item["video"] for item in self._held})),
      "skipped.tsv": report.skipped_rows(self._found.skipped),
    }
    self._data.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
      path = self._data / name
      # What is the same keeps its time, by which `prepare` knows it again.
      if not path.exists() or path.read_text(encoding="utf-8") != content:
        write_file(path, content)
    made = lists.Options(
      items=(lists.Item.of_files([str(self._data / "records.json")]),),
      tokenizer=self._base.data.tokenizer,
      media=self._options.videos,
      holdout=str(self._data / "held_out.txt") if held else "",
    )
    build.build(str(self._data / "dataset"), made, overwrite=True)

  def _config(self, *, features: bool) -> DataConfig:
    """Returns where the data is."""
    return dataclasses.replace(
      self._base.data,
      dataset=str((self._data / "dataset").absolute()),
      media=str(pathlib.Path(self._options.videos).absolute()),
      features=str((self._data / "features").absolute()) if features else "",
      # Videos that could not be read are reported; the others are trained on.
      max_skipped=0.5,
    )

  def _experiment(self) -> Experiment:
    """Decides the settings; before the extraction as if all went well."""
    stored = self._stages.is_done(EXTRACT)
    dataset = settings.measure(self._base, self._config(features=stored))
    self._dataset = dataset
    return settings.make_experiment(
      self._base,
      self._config(features=True),
      dataset,
      self._options.overrides,
    )

  def _forecast(self, experiment: Experiment) -> None:
    """Prints how long the stages that are left will take."""
    left = [
      name
      for name in (EXTRACT, BEFORE, TRAIN, AFTER)
      if not self._stages.is_done(name) and (self._held or "ask" not in name)
    ]
    found = []
    if EXTRACT in left:
      found.append(
        forecast.extraction(experiment, self._options.videos, self._unstored())
      )
    if left and left != [EXTRACT]:
      stage, forward = forecast.training(
        experiment, self._dataset, self._out / "model"
      )
      found += [
        stage
        if name == TRAIN
        else forecast.asking(name, self._questions(), forward)
        for name in left
        if name != EXTRACT
      ]
    for stage in found:
      self._stages.expect(stage)
    if found:
      print(forecast.table(found), flush=True)

  def _questions(self) -> int:
    """Returns how many questions are held out."""
    return sum(
      len(item["record"]["conversations"]) // 2 if "record" in item else 1
      for item in self._held
    )

  def _unstored(self) -> dict[str, VideoFact]:
    """Returns the videos whose features are not there yet."""
    store = FeatureStore(self._data / "features", create=True)
    names = self._found.videos
    return {name: self._facts[name] for name in names if name not in store}

  def _extract(self) -> None:
    """Extracts the features of all videos that questions are about."""
    names = self._data / "videos.txt"
    write_file(names, "\n".join(self._found.videos) + "\n")
    with progress.step("reading the tower"):
      params = tower_params(self._base)
    extract_videos(
      params,
      self._base.model,
      videos=self._options.videos,
      out=self._data / "features",
      names=names,
    )

  def _ask(self, model: str, out: pathlib.Path) -> None:
    """Asks a model all held-out questions."""
    task = open_task(
      "records", self._data / "held_out.json",
      features=self._data / "features",
    )  # fmt: skip
    words = self._base.data.tokenizer
    found = evaluation.evaluate_folders(
      [model],
      task,
      lambda folder: hourjax.load(folder, tokenizer=words),
      out=out,
    )
    assert found is not None  # there are no other workers
    print(found.summary(), flush=True)

  def _train(self, signal: list[int]) -> bool:
    """Trains, or goes on; fills in the signal that ended it early."""
    ended_by = train(self._experiment(), self._out / "model")
    if ended_by is not None:
      signal.append(ended_by)
    return ended_by is None

  def _report(self) -> None:
    """Writes the report, and prints it in short."""
    store = FeatureStore(self._data / "features")
    failed = [name for name in self._found.videos if name not in store]
    if failed:
      self._read.append(
        f"videos that could not be extracted ({len(failed)}):"
        f" {', '.join(failed[:20])}; why is in {store.root}/failures-*.jsonl"
      )
    example = pathlib.Path(self._options.videos) / self._found.videos[0]
    model = shlex.quote(str(self._out / "model"))
    ask = (
      f"python -m hourjax.ask --model={model}"
      f" --video={shlex.quote(str(example))} 'Your question?'"
    )
    short = report.write(
      self._out,
      command=shlex.join(["python", "-m", "hourjax.finetune", *sys.argv[1:]]),
      read=self._read,
      took=self._stages.took,
      ask=ask,
    )
    print("\n".join([*short, f"report: {self._out}/report.md", f"ask: {ask}"]))


def drop_unusable(found: Questions, facts: Mapping[str, VideoFact]) -> None:
  """Leaves out questions about videos or parts of videos that are not there.

  Args:
    found: questions, which are changed.
    facts: of their videos.
  """
  kept = []
  for item in found.found:
    fact, where = facts[item["video"]], item["where"]
    if fact.problem:
      reason = Skip(where, *fact.problem)
    elif fact.duration is not None and item["start"] > fact.duration + 1:
      reason = Skip(
        where,
        "part beyond the video",
        f"{where}: it begins at {item['start']:g} s, and {item['video']} lasts"
        f" {fact.duration:.0f} s",
      )
    else:
      kept.append(item | {"duration": fact.duration})
      continue
    found.skipped.append(reason)
  found.found = kept
