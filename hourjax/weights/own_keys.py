"""Keys of `config.json` that are ours: what has no official word.

They stand in an entry of their own, `hourjax`, which other readers ignore, so
that an export answers as the workdir does that it was made of.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from hourjax import schema
from hourjax.errors import UserError
from hourjax.models.config import ModelConfig


class OwnKeys(schema.Schema, extra="forbid"):
  """Describes the entry `hourjax`, which only exports of ours have.

  Attributes:
    forgetting: fields of `Forgetting` but `spatial`, which has an official key.
    max_length: most tokens of a conversation in the decoder.
    seed: of random forgetting.
    dtype: of the computation.
    model: fields of ModelConfig that have no official key.
  """

  forgetting: dict[str, str | int | float | bool] = Field(default_factory=dict)
  max_length: Annotated[int, Field(ge=1, le=2**24)] = 32_768
  seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
  dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
  model: dict[str, str | int | float | bool] = Field(default_factory=dict)


class PublishedRules(NamedTuple):
  """Holds what config.json says of how frames and conversations are shown.

  Attributes:
    forgetting: fields of `data.forgetting.Forgetting`, not checked.
    max_length: most tokens of a conversation in the decoder.
    single_image: "tiled" or "plain".
    seed: of random forgetting.
  """

  forgetting: dict[str, Any]
  max_length: int
  single_image: Literal["tiled", "plain"]
  seed: int


# Fields of ModelConfig that have an official key, or change no result.
_ELSEWHERE = ("vision", "decoder", "pool_side", "memaug_layers", "dtype",
              "remat", "attention", "memaug_init")  # fmt: skip


def more_fields(config: ModelConfig | type[ModelConfig]) -> dict[str, Any]:
  """Returns the fields of a model that no official key describes.

  Args:
    config: of the model; of the class, all such fields with their defaults.
  """
  return {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _ELSEWHERE
  }


def check_known(
  given: Mapping[str, Any], known: Mapping[str, Any], where: str
) -> Mapping[str, Any]:
  """Returns fields that another version may have written, checked.

  Args:
    given: the fields.
    known: all that there are, with values of the right types.
    where: file and group, for the message.

  Raises:
    UserError: this version does not know one of them.
  """
  wrong = [
    f"{key}={value!r}"
    for key, value in given.items()
    if key not in known or type(value) is not type(known[key])
  ]
  if wrong:
    raise UserError(
      f"{where} has {', '.join(wrong)}, which this version does not know; use"
      " the version of hourjax that wrote it"
    )
  return given
