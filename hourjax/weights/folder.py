"""Which tensors a folder holds, and whether they are those of a model.

Folders on people's disks hold other things beside the weights: buffers that
older libraries saved, optimizer states, the same weights once more, adapters;
and wrappers have put prefixes before all names. What cannot change the model
is left out, known prefixes are removed, and what would make another model is
refused by its name.
"""

import pathlib
import re
import sys
from collections.abc import Iterable, Mapping, Set
from typing import Any

from hourjax import schema
from hourjax.errors import UserError
from hourjax.weights.names import HEAD, MEMAUG, Entry
from hourjax.weights.tensors import DTYPES, Tensor, TensorReader, read_header

INDEX = "model.safetensors.index.json"
# Frequencies and indices that every model computes by itself.
_BUFFERS = re.compile(
  r"(^|\.)(inv_freq|position_ids|cos_cached|sin_cached|_extra_state)$"
)
_ADAPTER = re.compile(
  r"lora_(A|B|embedding_[AB]|magnitude_vector)|\.ada_ia3|\.ia3_l|\.base_layer\."
  r"|modules_to_save|(^|\.)hada_w|(^|\.)lokr_w|prompt_embeddings|\.oft_"
)
# What wrappers put in front of all names: DistributedDataParallel,
# torch.compile, FSDP, PEFT after a merge, DeepSpeed.
_WRAPPERS = (
  "module.",
  "_orig_mod.",
  "_fsdp_wrapped_module.",
  "_forward_module.",
  "base_model.model.",
)
# Names of the decoder in newer transformers, and ours.
_DECODER = (
  ("model.language_model.", "model."),
  ("language_model.model.", "model."),
  ("language_model.lm_head.", "lm_head."),
)
_OTHER_FILES = re.compile(
  r"^(adapter|consolidated|optimizer|optim|scheduler|training|ema|rng)", re.I
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LINES = 8  # shown of each kind of problem
_HINTS = {
  "multi_modal_projector.": "these are the names of transformers' own LLaVA"
  " classes; take the checkpoint under its original names",
  "qweight": "these weights are quantised; take those in bfloat16",
  "weight_scale": "these weights are quantised; take those in bfloat16",
}


class _Index(schema.Schema):
  """Describes the index of a checkpoint in shards.

  Attributes:
    weight_map: the file that holds each tensor.
  """

  weight_map: dict[str, str]


def find_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  """Finds the tensors of a checkpoint folder, by official name.

  They are those of the files that the index lists, or of `model.safetensors`;
  without either, those of all safetensors files that are not known to be
  something else.

  Args:
    folder: of the checkpoint.

  Raises:
    UserError: there are none, a file is damaged or missing, a name is there
      twice, or the folder holds an adapter.
  """
  return _renamed(folder, _without_buffers(_find(folder)))


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that `find_tensors` takes its tensors from."""
  return sorted({tensor.file for tensor in _find(folder).values()})


def check_names(
  table: list[Entry],
  shapes: Mapping[str, tuple[int, ...]],
  reader: TensorReader,
  found: Set[str],
  folder: str | pathlib.Path,
) -> None:
  """Compares names, shapes and dtypes of a table with those of tensors.

  Args:
    table: entries that are wanted.
    shapes: of our parameters by path.
    reader: of the official tensors.
    found: names of the tensors that are compared.
    folder: of the checkpoint, for the message.

  Raises:
    UserError: lists all that are missing, unexpected, misshapen or of a dtype
      that holds no weights; many of one kind as their first few.
  """
  wanted = {}
  for entry in table:
    ours = [shapes[path][1 if entry.layers else 0 :] for path in entry.paths]
    shape = entry.official_shape(ours)
    wanted.update(dict.fromkeys(entry.names(), tuple(shape)))
  missing, unexpected = set(wanted) - found, found - set(wanted)
  misshapen, untyped = {}, {}
  for name in set(wanted) & found:
    tensor = reader[name]
    if tensor.shape != wanted[name]:
      misshapen[name] = (
        f"shape of {{}}: checkpoint {tensor.shape}, model {wanted[name]}"
      )
    if tensor.dtype not in DTYPES:
      untyped[name] = (
        f"dtype of {{}}: {tensor.dtype}, read are {', '.join(DTYPES)}"
      )
  lines = [
    *_grouped(dict.fromkeys(missing, "missing: {}")),
    *_grouped(dict.fromkeys(unexpected, "unexpected: {}")),
    *_grouped(misshapen),
    *_grouped(untyped),
  ]
  if lines:
    count = sum(map(len, (missing, unexpected, misshapen, untyped)))
    hints = {
      hint for part, hint in _HINTS.items() if any(part in n for n in found)
    }
    if missing == {HEAD}:
      hints.add(
        "the output vectors are missing; where they are the embeddings,"
        ' config.json says "tie_word_embeddings": true (without it Qwen2\'s'
        " are vectors of their own)"
      )
    memaug = {name for name in wanted if name.startswith(MEMAUG)}
    if memaug and missing == memaug:
      hints.add(
        "MemAug is missing, as in LLaVA-OneVision's weights: a training that"
        " starts from them draws it (--config.draw_missing=memaug), and answers"
        " need a model that was trained with it"
      )
    why = "; ".join(
      sorted(hints) or ["is its config.json the one these weights came with?"]
    )
    raise UserError(
      f"{folder} does not fit the model ({count} problems); {why}\n  "
      + "\n  ".join(lines)
    )


def _grouped(problems: Mapping[str, str]) -> list[str]:
  """Returns a line for each problem, one for all layers that have the same.

  Args:
    problems: by the name of a tensor, texts with {} for the name.
  """
  groups: dict[str, list[str]] = {}
  for name, text in problems.items():
    groups.setdefault(text, []).append(name)
  lines = sorted(
    text.format(name)
    for text, names in groups.items()
    for name in folded(names)
  )
  more = len(lines) - _LINES
  return lines[:_LINES] + ([f"... and {more} more lines"] if more > 0 else [])


def _find(folder: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of the model's files under the names in the files."""
  _refuse_adapter(folder)
  index = folder / INDEX
  if index.exists():
    where = read_index(index)
    files = [folder / name for name in sorted(set(where.values()))]
  else:
    where, files = {}, _without_index(folder)
  missing = [path.name for path in files if not path.exists()]
  if missing:
    raise UserError(
      f"{index} lists {shortened(missing)}, which {folder} lacks; copy the"
      " missing shards"
    )
  found: dict[str, Tensor] = {}
  for path in files:
    for name, tensor in read_header(path).items():
      if where.get(name, path.name) not in (path.name, _below(folder, path)):
        continue  # the index takes it from another file
      if name in found:
        raise UserError(
          f"{name} is in {found[name].file.name} and in {path.name} of"
          f" {folder}, and no {INDEX} says which is the model's; keep one"
        )
      found[name] = tensor
  return found


def read_index(path: pathlib.Path) -> dict[str, str]:
  """Reads the index of a checkpoint in shards.

  Args:
    path: of the index.

  Returns:
    The name of the file that holds each tensor.

  Raises:
    UserError: the index is broken, or names files outside its folder.
  """
  where = schema.read_schema(
    _Index, path, remedy="copy it again from where the weights came from"
  ).weight_map
  for file in sorted(set(where.values())):
    parts = pathlib.PurePosixPath(file).parts
    odd = "\\" in file or not file.isprintable()
    if not parts or parts[0] == "/" or ".." in parts or odd:
      raise UserError(
        f"{path} names the file {schema.shorten(file)}, which is not below its"
        " folder; weights are read from their own folder only"
      )
  if not where:
    raise UserError(f"{path} lists no tensor; copy it again")
  return where


def shortened(names: Iterable[str], most: int = 6) -> str:
  """Joins the first few names, and says how many more there are."""
  names = list(names)
  more = len(names) - most
  return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def folded(names: Iterable[str]) -> list[str]:
  """Joins names that differ only in the number of a layer.

  ["layers.0.x", "layers.1.x", "layers.3.x", "norm"] becomes
  ["layers.{0..1,3}.x", "norm"].
  """
  groups: dict[tuple[str, str], list[int | None]] = {}
  for name in names:
    match = re.search(r"(?<=layers\.)\d+(?=\.)", name)
    key = (name, "")
    if match:
      key = (name[: match.start()], name[match.end() :])
    groups.setdefault(key, []).append(int(match[0]) if match else None)
  lines = []
  for (front, back), numbers in groups.items():
    known = sorted(n for n in numbers if n is not None)
    if len(known) > 1:
      lines.append(f"{front}{{{_ranges(known)}}}{back}")
    else:
      lines.append(front + "".join(map(str, known)) + back)
  return lines


def _ranges(numbers: list[int]) -> str:
  """Writes ascending numbers as "0..1,3"."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ",".join(f"{a}..{b}" if a < b else str(a) for a, b in runs)


def _below(folder: pathlib.Path, path: pathlib.Path) -> str:
  """Returns a path relative to the folder, with forward slashes."""
  return path.relative_to(folder).as_posix()


def _without_index(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the model's files in a folder that has no index."""
  single = folder / "model.safetensors"
  if single.exists():
    return [single]
  there = sorted(folder.glob("*.safetensors"))
  files = [path for path in there if not _OTHER_FILES.match(path.name)]
  if not files:
    raise UserError(_no_weights(folder, there))
  for path in files:
    match = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", path.name)
    if match and int(match[4]) <= 10_000:
      front, digits, of, count, end = match.groups()
      wanted = [
        f"{front}{n:0{len(digits)}d}{of}{count}{end}"
        for n in range(1, int(count) + 1)
      ]
      lacking = [name for name in wanted if not (folder / name).exists()]
      if lacking:
        raise UserError(
          f"{folder} lacks {shortened(lacking)} of {int(count)} shards; copy"
          " the missing shards"
        )
  return files


def _no_weights(folder: pathlib.Path, others: list[pathlib.Path]) -> str:
  """Says what is there in place of weights."""
  pickles = [p.name for kind in _PICKLES for p in sorted(folder.glob(kind))]
  if pickles:
    return (
      f"{folder} holds no safetensors file, only {shortened(pickles)}: such"
      " files can run code when they are read, and are not; convert them with"
      " the library that wrote them (transformers:"
      " model.save_pretrained(folder, safe_serialization=True))"
    )
  if others:
    names = shortened(path.name for path in others)
    return (
      f"{folder} holds no safetensors file of a model, only {names}; give the"
      " folder with model.safetensors or its shards"
    )
  return f"{folder} holds no safetensors file; give the folder of the weights"


def _refuse_adapter(folder: pathlib.Path) -> None:
  """Raises if there are an adapter's files in the folder."""
  names = ("adapter_config.json", "adapter_model.safetensors")
  there = [n for n in (*names, "adapter_model.bin") if (folder / n).exists()]
  if not there:
    return
  base = _base_of(folder / names[0])
  weights = (folder / INDEX).exists() or any(
    not _OTHER_FILES.match(p.name) for p in folder.glob("*.safetensors")
  )
  state = (
    "beside a model's weights, and answers with and without it differ"
    if weights
    else f"and not a model: it is added to {base}"
  )
  raise UserError(
    f"{folder} holds an adapter ({shortened(there)}), {state}; merge it with"
    " the library that trained it (peft: model.merge_and_unload(), then"
    " save_pretrained)" + (", or move it elsewhere" if weights else "")
  )


def _base_of(path: pathlib.Path) -> str:
  """Returns the name of the model that an adapter was trained for."""
  try:
    raw: Any = schema.read_json(path, remedy="copy it again")
  except UserError:
    return "its base model"
  base = raw.get("base_model_name_or_path") if isinstance(raw, dict) else None
  return schema.shorten(base) if base else "its base model"


def _without_buffers(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
  return {n: t for n, t in found.items() if not _BUFFERS.search(n)}


def _renamed(
  folder: pathlib.Path, found: dict[str, Tensor]
) -> dict[str, Tensor]:
  """Returns tensors by official name; says on stderr what was renamed."""
  parts = [name for name in found if _ADAPTER.search(name)]
  if parts:
    raise UserError(
      f"{folder} holds {len(parts)} tensors of an adapter"
      f" ({shortened(folded(parts), 3)}); merge it into its base model with the"
      " library that trained it (peft: model.merge_and_unload(), then"
      " save_pretrained)"
    )
  renamed_as = []
  while found and (prefix := _wrapper(found)):
    found = {name.removeprefix(prefix): t for name, t in found.items()}
    renamed_as.append(f"{prefix}* as *")
  for official, ours in _DECODER:
    names = [name for name in found if name.startswith(official)]
    if names:
      renamed = {name: ours + name.removeprefix(official) for name in names}
      twice = sorted(set(renamed.values()) & set(found))
      if twice:
        raise UserError(
          f"{folder} holds both {shortened(folded(twice), 3)} and the same"
          f" behind {official}; keep the model's own"
        )
      found = {renamed.get(name, name): t for name, t in found.items()}
      renamed_as.append(f"{official}* as {ours}*")
  if renamed_as:
    text = ", ".join(renamed_as)
    print(f"{folder}: tensors are read {text}", file=sys.stderr)
  return found


def _wrapper(found: Mapping[str, Tensor]) -> str:
  """Returns a wrapper's prefix that all names have, or an empty string."""
  for prefix in _WRAPPERS:
    if all(name.startswith(prefix) for name in found):
      return prefix
  return ""
