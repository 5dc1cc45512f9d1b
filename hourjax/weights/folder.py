"""Which tensors a folder holds, as people have them on their disks.

Weights come with other things: buffers that older libraries saved, optimizer
states, the same weights once more, adapters; and under names that a wrapper
has prefixed. What cannot change the model is left out, what only renames is
read, and what would be another model is refused by its name.
"""

import pathlib
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from hourjax import schema
from hourjax.errors import UserError
from hourjax.weights.tensors import Tensor, read_header

INDEX = "model.safetensors.index.json"
# Frequencies and numbers that every model computes for itself.
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


class _Index(schema.Schema):
  """Of a checkpoint in shards: which file holds which tensor."""

  weight_map: dict[str, str]


def find_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  """Tensors of a checkpoint folder by official name.

  Those that the index or `model.safetensors` names; without either of all
  safetensors files that are not known to be something else.

  Raises:
    UserError: there are none, a file is damaged or missing, a name is there
      twice, or it is an adapter.
  """
  return _renamed(folder, _without_buffers(_find(folder)))


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files whose tensors `find_tensors` takes."""
  return sorted({tensor.file for tensor in _find(folder).values()})


def _find(folder: pathlib.Path) -> dict[str, Tensor]:
  """All tensors of the model's files, under the names they have there."""
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
  """Name of a tensor to the file that holds it.

  Raises:
    UserError: it is broken, or names files outside its folder.
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
  """The first few names, and how many more there are."""
  names = list(names)
  more = len(names) - most
  return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def folded(names: Iterable[str]) -> list[str]:
  """Names that differ in the number of a layer only, as one each.

  layers.0.x, layers.1.x, layers.3.x, norm -> layers.{0..1,3}.x, norm
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
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return ",".join(f"{a}..{b}" if a < b else str(a) for a, b in runs)


def _below(folder: pathlib.Path, path: pathlib.Path) -> str:
  return path.relative_to(folder).as_posix()


def _without_index(folder: pathlib.Path) -> list[pathlib.Path]:
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


def _no_weights(folder, others) -> str:
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
  try:
    raw: Any = schema.read_json(path, remedy="copy it again")
  except UserError:
    return "its base model"
  base = raw.get("base_model_name_or_path") if isinstance(raw, dict) else None
  return schema.shorten(base) if base else "its base model"


def _without_buffers(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
  return {n: t for n, t in found.items() if not _BUFFERS.search(n)}


def _renamed(folder, found: dict[str, Tensor]) -> dict[str, Tensor]:
  """With the official names; says on stderr what was read as what."""
  parts = [name for name in found if _ADAPTER.search(name)]
  if parts:
    raise UserError(
      f"{folder} holds {len(parts)} tensors of an adapter"
      f" ({shortened(folded(parts), 3)}); merge it into its base model with the"
      " library that trained it (peft: model.merge_and_unload(), then"
      " save_pretrained)"
    )
  told = []
  while found and (prefix := _wrapper(found)):
    found = {name.removeprefix(prefix): t for name, t in found.items()}
    told.append(f"{prefix}* as *")
  for there, here in _DECODER:
    names = [name for name in found if name.startswith(there)]
    if names:
      renamed = {name: here + name.removeprefix(there) for name in names}
      twice = sorted(set(renamed.values()) & set(found))
      if twice:
        raise UserError(
          f"{folder} holds both {shortened(folded(twice), 3)} and the same"
          f" behind {there}; keep the model's own"
        )
      found = {renamed.get(name, name): t for name, t in found.items()}
      told.append(f"{there}* as {here}*")
  if told:
    print(f"{folder}: tensors are read {', '.join(told)}", file=sys.stderr)
  return found


def _wrapper(found: Mapping[str, Tensor]) -> str:
  """A wrapper's prefix that all names have."""
  for prefix in _WRAPPERS:
    if all(name.startswith(prefix) for name in found):
      return prefix
  return ""
