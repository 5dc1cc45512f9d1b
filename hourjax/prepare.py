"""Turns downloaded records into one validated dataset.

  python -m hourjax.prepare --out=work/data/dataset --tokenizer=Qwen2.5-3B \
      --records=videomarathon.json --media_prefix={data_source} \
      --features=work/data/features

  python -m hourjax.prepare --out=work/data/dataset --tokenizer=Qwen2.5-3B \
      --questions=table.parquet --columns=video=vid,question=q,options=A+B+C+D

  python -m hourjax.prepare --out=work/data/videos_and_images/1.0.0 \
      --tokenizer=Qwen2.5-3B --mix=stage3.yaml --media=work/media

writes the conversations with their token counts, a summary (what was dropped,
what was repaired, and why) and four plots. --records, --questions and --mix
may be given several times. A dataset of the same files and options is reused.
--holdout=0.5% sets videos aside, for a loss on data that is not trained on.
"""

from absl import flags

from hourjax import command
from hourjax.data.prepare import build, lists, question_tables, report
from hourjax.data.prepare.lists import Options
from hourjax.errors import UserError

_OUT = flags.DEFINE_string("out", None, "Folder of the dataset.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "The model's tokenizer.")
_RECORDS = flags.DEFINE_multi_string(
  "records", [], "A JSON list, .jsonl, .parquet or a folder of such."
)
_QUESTIONS = flags.DEFINE_multi_string(
  "questions", [], "Files of one question table: .parquet, .csv[.gz], JSON."
)
_MIX = flags.DEFINE_multi_string("mix", [], "YAML list of files and shares.")
_MEDIA = flags.DEFINE_string("media", None, "Folder of videos and images.")
_PREFIX = flags.DEFINE_string(
  "media_prefix", "", "Folder before media paths; may hold {data_source}."
)
_FEATURES = flags.DEFINE_string("features", None, "Feature store.")
_COLUMNS = flags.DEFINE_string(
  "columns", "", "Columns of question tables: video=vid,question=q,..."
)
_CHECK_MEDIA = flags.DEFINE_bool(
  "check_media", True, "Look every file of --media up, and into videos."
)
_IMAGES = flags.DEFINE_enum(
  "parquet_images", "unpack", ["unpack", "keep"], "Below --media, or in place."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of random:N%.", 0, command.LAST_SEED
)
_HOLDOUT = flags.DEFINE_string("holdout", "", "0.5%, 100 (videos), names.txt.")
_WORKERS = flags.DEFINE_integer(
  "workers", None, "Processes; as many as cores by default.", 1, 4096
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace a dataset made of something else."
)


def _items() -> tuple[lists.Item, ...]:
  """Returns the files to read, from --records, --questions and --mix."""
  prefix = _PREFIX.value
  items = [
    lists.Item.of_files([path], "records", prefix) for path in _RECORDS.value
  ]
  if _QUESTIONS.value:
    items.append(lists.Item.of_files(_QUESTIONS.value, "questions", prefix))
  for path in _MIX.value:
    found = lists.read_list(path, media=_MEDIA.value, media_prefix=prefix)
    lists.report_elsewhere(path, found)
    items += found
  if not items:
    raise UserError("nothing to prepare; give --records, --questions or --mix")
  return tuple(items)


def main(_: list[str]) -> None:
  """Runs the command."""
  options = Options(
    items=_items(),
    tokenizer=command.given(_TOKENIZER),
    media=_MEDIA.value,
    features=_FEATURES.value,
    check_media=_CHECK_MEDIA.value,
    columns=question_tables.parse_mapping(_COLUMNS.value),
    seed=_SEED.value,
    parquet_images=_IMAGES.value,
    holdout=_HOLDOUT.value,
  )
  folder, overwrite = command.given(_OUT), _OVERWRITE.value
  summary, reused = build.build(
    folder, options, overwrite=overwrite, workers=_WORKERS.value
  )
  print(f"{'reused' if reused else 'wrote'} {_OUT.value}")
  print(report.table(summary))


if __name__ == "__main__":
  command.run(main, required=["out", "tokenizer"])
