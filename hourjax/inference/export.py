"""A model's weights in a folder that other programs load.

    a workdir's checkpoint, or a published folder
         |   one parameter after the other
    shards in the official layout (weights/shards.py), config.json, tokenizer,
    generation_config.json, model card
         |   renamed when all is there
    FOLDER

It is here, beside `load`, because both know the two kinds of folders that hold
a model.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import hourjax
from hourjax import hub, schema
from hourjax.atomic_file import new_folder
from hourjax.data.tokenizer import Tokenizer
from hourjax.errors import UserError
from hourjax.inference.adapter import Adapter, Merge, read_adapter
from hourjax.inference.load import (
  find_base,
  find_folder,
  find_tokenizer,
  host_sharding,
  is_workdir,
  run_rules,
)
from hourjax.models.config import ModelConfig
from hourjax.models.params import param_shapes
from hourjax.training.checkpoint import restore_params
from hourjax.training.config import Experiment, build_experiment
from hourjax.training.metric_writer import read_metrics
from hourjax.training.workdir import read_config
from hourjax.weights import config as published
from hourjax.weights import description, peft
from hourjax.weights.checkpoint import open_params, read_entries
from hourjax.weights.names import Entry, decoder_table, key_table, tower_table
from hourjax.weights.own_keys import PublishedRules
from hourjax.weights.shards import SHARD_BYTES, ShardWriter
from hourjax.weights.tensors import MegabyteBar

PARTS = ("all", "decoder", "tower", "adapter")
DTYPES = {
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float32": np.dtype(np.float32),
}
# Writes one parameter, by path.
_Write = Callable[[str, np.ndarray], None]


class _Source(NamedTuple):
  """Describes a model whose weights are exported.

  Attributes:
    config: of the model.
    rules: how its training showed frames and conversations.
    tokenizer: folder of its tokenizer.
    read: reads the parameters whose paths have a prefix, and hands each one
      over; returns rows of the model card.
    start: what its training started from; empty if it drew its weights.
  """

  config: ModelConfig
  rules: PublishedRules
  tokenizer: str | os.PathLike
  read: Callable[[str, _Write], dict[str, str]]
  start: str


def export(
  model: str | os.PathLike,
  out: str | os.PathLike,
  *,
  part: str = "all",
  step: int | None = None,
  dtype: str = "bfloat16",
  tokenizer: str | os.PathLike | None = None,
  shard_bytes: int = SHARD_BYTES,
  adapter: str | os.PathLike | None = None,
) -> list[str]:
  """Writes a model's weights under the names of published checkpoints.

  Adapters are merged into them, or written alone. Beside the parameter that is
  being read, a few megabytes are held.

  Args:
    model: workdir of a training run, a published folder, or a name with hf://.
    out: folder to write; it must not exist, or be empty.
    part: "all" for the layout of Hour-LLaVA; "decoder" for that of Hugging
      Face's Qwen2 or Qwen3, "tower" for that of its SigLIP; "adapter" for the
      adapters alone, in PEFT's.
    step: of the run's checkpoint, if not the best or the newest.
    dtype: "bfloat16" or "float32".
    tokenizer: folder of the tokenizer, if not the model's own.
    shard_bytes: size above which a file ends.
    adapter: workdir of a run of adapters or folder in PEFT's layout, for a
      model that is no such run itself.

  Returns:
    Why the official code cannot run the model, for part "all"; empty if it can.

  Raises:
    UserError: there is no such model or step, `out` holds something, weights
      are damaged or not finite, or the layout has no words for the model.
  """
  # First of all, so that nothing is fetched or read in vain.
  with new_folder(out) as partial:
    folder = find_folder(model)
    if part == "adapter":
      _export_adapter(folder, adapter, partial, step)
      return []
    source = _source(folder, step, shard_bytes, adapter)
    config, shapes = source.config, param_shapes(source.config)
    words = None
    if part != "tower":
      words = find_tokenizer(tokenizer or source.tokenizer, folder)
    _describe(source, partial, part, dtype, words)
    table, prefix = _layout(config, part)
    dtypes = dict.fromkeys(shapes, DTYPES[dtype])
    shards = ShardWriter(
      partial, table, shapes, dtypes, shard_bytes=shard_bytes
    )
    with shards, MegabyteBar(shards.nbytes, "writing weights") as count:

      def write(path: str, value: np.ndarray) -> None:
        count(shards.write(path, value))

      facts = source.read(prefix, write)
    problems = description.official_problems(config, source.rules)
    problems = problems if part == "all" else []
    _write_card(source, partial, part, {**facts, "dtype": dtype}, problems)
  return problems


def _layout(config: ModelConfig, part: str) -> tuple[list[Entry], str]:
  """Returns the entries of a part, and the start of its parameters' paths."""
  if part == "decoder":
    return decoder_table(config), "decoder/"
  if part == "tower":
    return tower_table(config, "vision_model."), "vision/"
  return key_table(config), ""


def _describe(
  source: _Source,
  folder: pathlib.Path,
  part: str,
  dtype: str,
  words: pathlib.Path | None,
) -> None:
  """Writes all files but weights and model card."""
  config, rules = source.config, source.rules
  if words is None:
    description.write_tower_config(config.vision, folder, dtype=dtype)
    return
  vocabulary = Tokenizer.from_folder(words)
  if vocabulary.vocab_size > config.decoder.vocab:
    raise UserError(
      f"{words} has {vocabulary.vocab_size} tokens and the model knows"
      f" {config.decoder.vocab}; give the tokenizer that it was trained with"
    )
  tokens = description.Tokens(vocabulary.im_end, vocabulary.pad)
  if part == "decoder":
    description.write_decoder_config(
      config.decoder,
      folder,
      tokens=tokens,
      dtype=dtype,
      max_length=rules.max_length,
    )
  else:
    description.write_config(
      config, folder, rules=rules, tokens=tokens, dtype=dtype
    )
  description.write_generation_config(folder, tokens)
  for name in hub.TOKENIZER:
    if (words / name).is_file():
      shutil.copyfile(words / name, folder / name)


def _source(
  folder: pathlib.Path,
  step: int | None,
  shard_bytes: int,
  adapter: str | os.PathLike | None = None,
) -> _Source:
  """Describes a model, with its adapters merged if it has any."""
  own, base = find_base(folder)
  if own or adapter:
    below = _source(base, step if adapter else None, shard_bytes)
    found = read_adapter(
      str(adapter or folder), below.config, None if adapter else step
    )
    return _merged(below, found, str(base), folder if own else None)
  if is_workdir(folder):
    return _of_run(folder, step, shard_bytes)
  if step is not None:
    raise UserError(
      f"--step={step} is given, and {folder} is no workdir of a training run:"
      " a published folder holds one state; leave --step out"
    )
  return _of_published(folder)


def _merged(
  below: _Source, adapter: Adapter, base: str, run: pathlib.Path | None
) -> _Source:
  """Describes a model with adapters merged into it.

  Args:
    below: the model without them.
    adapter: to be merged.
    base: name of the model without them.
    run: workdir of the adapters' run, whose settings then count.
  """

  def read(prefix: str, write: _Write) -> dict[str, str]:
    merge = Merge(adapter)
    facts = below.read(
      prefix, lambda path, value: write(path, merge(path, value))
    )
    merge.check(base, whole=not prefix)
    return facts | {"adapter": adapter.name, "base": base}

  source = below._replace(read=read)
  if run is not None:
    experiment = build_experiment(read_config(run))
    source = source._replace(
      rules=_published_rules(experiment), tokenizer=experiment.data.tokenizer
    )
  return source


def _export_adapter(
  folder: pathlib.Path,
  adapter: str | os.PathLike | None,
  out: pathlib.Path,
  step: int | None,
) -> None:
  """Writes the adapters of a run alone, in PEFT's layout, with a model card.

  Raises:
    UserError: the folder is no run of adapters.
  """
  own, base = find_base(folder)
  if not own or adapter:
    raise UserError(
      f"--part=adapter writes the adapters of a run, and {folder} holds"
      f" {'a whole model' if not own else 'its own'}; give the workdir of a run"
      " with config.lora.rank as --model, without --adapter"
    )
  experiment = build_experiment(read_config(folder))
  found = read_adapter(str(folder), experiment.model, step)
  layers = {
    path: {name: np.asarray(x) for name, x in values.items()}
    for path, values in found.layers.items()
  }
  peft.write_adapters(
    out,
    layers,
    experiment.model,
    experiment.lora,
    base=hub.short_name(base) or base.name,
    fingerprint=found.base,
  )
  description.write_card(
    out,
    title="Adapter of Hour-LLaVA",
    library="peft",
    paragraphs=[
      "Answers together with its base:"
      ' `hourjax.load("BASE", adapter="FOLDER")`, or `python -m hourjax.ask'
      " --model=BASE --adapter=FOLDER`. `peft.PeftModel.from_pretrained` loads"
      " it into the official model, or into its decoder.",
      description.licence_note(experiment.model.decoder, experiment.init),
    ],
    facts={
      "exported by": f"hourjax {hourjax.__version__}",
      "adapter": found.name,
      "base": f"{base} (weights {found.base})",
      "rank, alpha": f"{experiment.lora.rank}, {experiment.lora.alpha:g}",
      "layers": f"{len(layers)} (stacked)",
    },
  )


def _published_rules(experiment: Experiment) -> PublishedRules:
  """Returns how a run showed frames and conversations."""
  rules = run_rules(experiment)
  return PublishedRules(
    dataclasses.asdict(rules.forgetting),
    rules.max_length,
    rules.single_image,
    rules.seed,
  )


def _of_run(
  folder: pathlib.Path, step: int | None, shard_bytes: int
) -> _Source:
  """Describes the model of a training run."""
  experiment = build_experiment(read_config(folder))

  def read(prefix: str, write: _Write) -> dict[str, str]:
    """Reads the best or newest sound checkpoint, or that of the step."""
    found = restore_params(
      folder,
      host_sharding(),
      prefix=prefix,
      each=lambda path, value: write(path, np.asarray(value)),
      step=step,
      most=shard_bytes,
    )
    for path in param_shapes(experiment.model):
      if path.startswith(prefix) and path not in found.params:
        raise UserError(
          f"{path} is missing in {folder}/checkpoints/{found.step}, and"
          f" {folder}/config.json describes a model that has it; use the"
          " config.json of that training"
        )
    return _run_facts(experiment, folder, found.step)

  return _Source(
    experiment.model,
    _published_rules(experiment),
    experiment.data.tokenizer,
    read,
    experiment.init,
  )


def _of_published(folder: pathlib.Path) -> _Source:
  """Describes the model of a published folder."""
  config = published.read_config(folder)
  shapes = param_shapes(config)
  name = hub.short_name(folder) or folder.absolute().name

  def read(prefix: str, write: _Write) -> dict[str, str]:
    """Reads the safetensors, an entry at a time."""
    with open_params(folder, config, shapes) as (entries, reader):
      for entry in entries:
        if not entry.paths[0].startswith(prefix):
          continue
        params = read_entries([entry], shapes, reader, np.float32)
        for path in list(params):
          write(path, params.pop(path))
    return {"converted from": name}

  return _Source(config, published.read_rules(folder), folder, read, name)


class _About(schema.Schema):
  """Describes what the model card says of a prepared dataset."""

  conversations: int


class _Rows(schema.Schema):
  """Describes what the model card says of a run's plan."""

  rows: int


def _run_facts(
  experiment: Experiment, folder: pathlib.Path, step: int
) -> dict[str, str]:
  """Returns what the model card says of a training run."""
  rates = {
    name: getattr(experiment.optimizer, name)
    for name in ("vision", "projector", "memaug", "decoder")
  }
  trained = [f"{name} {rate:g}" for name, rate in rates.items() if rate]
  data = experiment.data
  facts = {
    "run": folder.absolute().name,
    "started from": experiment.init or "random weights",
    "learning rates": ", ".join(trained),
    "data set": pathlib.PurePath(data.dataset).name or "not named",
    "videos as": "stored features" if data.features else "pixels",
    "steps": f"{step}"
    + (f" of {experiment.steps}" if experiment.steps else ""),
  }
  per_step = getattr(experiment, "batch_samples", 0)
  if per_step:
    facts["samples"] = f"about {step * per_step:,} ({per_step} a step)"
  else:
    rows = step * experiment.step_rows
    facts["rows of samples"] = f"{rows:,} ({experiment.step_rows} a step)"
    size = _size_of_epoch(experiment, folder)
    if size is not None:
      epoch, conversations = size
      samples = round(rows / epoch * conversations)
      facts["samples"] = (
        f"about {samples:,}: {rows / epoch:.2f} passes over"
        f" {conversations:,} conversations"
      )
  losses = [row for row in _metrics(folder) if row["step"] <= step]
  if losses and "loss" in losses[-1]:
    facts["training loss"] = (
      f"{losses[-1]['loss']:.4f} at step {losses[-1]['step']:.0f}"
    )
  return facts


def _size_of_epoch(
  experiment: Experiment, folder: pathlib.Path
) -> tuple[int, int] | None:
  """Returns rows and conversations of an epoch, None if they are not known."""
  data = pathlib.Path(experiment.data.dataset)
  try:
    rows = schema.read_schema(_Rows, folder / "plan.json", remedy="").rows
    about = schema.read_schema(_About, data / "about.json", remedy="")
  except UserError:  # the data has been moved since
    return None
  return max(1, rows), about.conversations


def _metrics(folder: pathlib.Path) -> list[dict[str, float]]:
  """Returns the logged metrics of a run, none if they cannot be read."""
  try:
    return read_metrics(folder)
  except UserError:
    return []


_TITLES = {
  "all": "Hour-LLaVA",
  "decoder": "Decoder of Hour-LLaVA",
  "tower": "Vision tower of Hour-LLaVA",
}
_USES = {
  "all": "Answers questions about videos of an hour and more:"
  ' `hourjax.load("FOLDER").encode_memory("video.mp4").ask("...").text`, or'
  " `python -m hourjax.ask --model=FOLDER`.",
  "decoder": "The language model alone, after the training described below:"
  ' `transformers.AutoModelForCausalLM.from_pretrained("FOLDER")`.',
  "tower": "The vision tower alone:"
  ' `transformers.SiglipVisionModel.from_pretrained("FOLDER")`. Its last layer'
  " was never used and is left out, and it has no head; the features are the"
  " hidden states after the last layer, `hidden_states[-1]`, before the last"
  " norm.",
}


def _write_card(
  source: _Source,
  folder: pathlib.Path,
  part: str,
  facts: Mapping[str, str],
  problems: list[str],
) -> None:
  """Writes the model card."""
  rules, config = source.rules, source.config
  shown: dict[str, Any] = {**rules.forgetting, "image": rules.single_image}
  rows = {
    "exported by": f"hourjax {hourjax.__version__}",
    **facts,
    "parameters of the whole model": f"{_count(config):,}",
  }
  paragraphs = [_USES[part]]
  if part == "all":
    rows["forgetting"] = ", ".join(f"{k} {v}" for k, v in shown.items())
    paragraphs.append(
      "Names, layout and config.json are those of the official Hour-LLaVA code."
      if not problems
      else "Names and layout are those of the official Hour-LLaVA code, which"
      f" cannot run this model: {'; '.join(problems)}."
    )
  paragraphs.append(description.licence_note(config.decoder, source.start))
  description.write_card(
    folder,
    title=_TITLES[part],
    library="hourjax" if part == "all" else "transformers",
    paragraphs=paragraphs,
    facts=rows,
  )


def _count(config: ModelConfig) -> int:
  """Returns the number of parameters of a model."""
  return sum(int(np.prod(shape)) for shape in param_shapes(config).values())
