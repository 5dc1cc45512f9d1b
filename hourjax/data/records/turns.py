"""Turns and `<image>` markers of a record, read as the official loaders do.

The official loaders are `preprocess_multimodal`, `preprocess_qwen` and
`sharding_*_data.py` of Hour-LLaVA (those of LLaVA-NeXT are the same). A reading
that alters a record is counted as a repair. A record that the official code
cannot read is repaired or refused, as this table says.

| in the record | official code | here |
|---|---|---|
| one image, no marker | marker and newline in front of all | the same |
| several images, no marker | stops | as many markers in front |
| one marker, not in front | moved to the front of its turn | the same |
| one image, several markers | stops | one, in the first turn that has any |
| as many markers as images in a turn | stay where they are | the same |
| another number of markers than images | stops | refused |
| video, any markers | removed; one before the time instruction | the same |
| video, `<video>` or `<Image>` instead | stays as words | read as the marker |
| text, `<image>` within a sentence | words, no slot | the same |
| text, marker in front or alone on a line | words | refused: its image lacks |
| marker in an answer | slot without image | refused; in a text, words |
| answer first | dropped | the same |
| question last | kept, with nothing but markup to learn | dropped |
| two turns of one side in a row | two turns | the same |
| `role` and `content`, user and assistant | stops | read |
| system turn in front | stops | refused, but for the usual words |
| number, null or list for text | stops | refused |
| all answers empty | learns to say nothing | refused |
| `QA_GT_caption_based_noisy` | removed | the same |
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from hourjax.errors import UserError
from hourjax.schema import shorten

MARKER = "<image>"  # stands in the text where the video or image belongs
SYSTEM = "You are a helpful assistant."  # written before every conversation

CHOSEN, REJECTED = "chosen", "rejected"
_QUESTIONS = ("prompt", "question")
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_NOISE = "QA_GT_caption_based_noisy"
_OTHER_FORMS = {
  "image": re.compile(r"<\s*image\s*/?\s*>", re.IGNORECASE),
  "video": re.compile(r"<\s*(?:image|video)\s*/?\s*>", re.IGNORECASE),
}
# A marker that is a whole line, or `<image>` at the start of a text, refers to
# visual input; within a sentence it is a word like any other.
_ALONE = re.compile(r"^\s*<(?:image|video)>\s*$", re.IGNORECASE | re.MULTILINE)
_FOREIGN = re.compile(
  r"<\|(?:image|video|audio)(?:_pad)?\|>|<\|vision_start\|>|<ImageHere>"
  r"|<(?:image|video)_placeholder>|^\s*<(?:audio|speech|sound)>\s*$",
  re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Turn:
  """Holds one turn of a conversation."""

  role: Literal["human", "gpt"]
  text: str


def read_turns(
  raw: Any, at: str, *, require_answer: bool
) -> tuple[list[Turn], list[str]]:
  """Reads the turns of a record, human first.

  Args:
    raw: a list of {"from", "value"} or {"role", "content"}.
    at: file, place and record, for messages.
    require_answer: whether turns without an answer are refused, as they are in
      training and not in inference.

  Returns:
    The turns with their markers as written, and the kinds of repairs.

  Raises:
    UserError: `raw` is no such list, has a system turn, or has no answer.
  """
  if not isinstance(raw, list) or not raw:
    raise UserError(
      f"{at}: 'conversations' must be a non-empty list, found {shorten(raw)}"
    )
  repairs = []
  spoken = [_turn(part, f"{at}: turn {i}") for i, part in enumerate(raw)]
  if any("from" not in part for part in raw):
    repairs.append("turns by role and content")
  elif any(part["from"] != role for part, (role, _) in zip(raw, spoken)):
    repairs.append("roles of another name")
  role, text = spoken[0]
  if role == "system":
    if text.strip() != SYSTEM:
      raise UserError(
        f"{at}: turn 0 is from 'system', expected 'human': the model is always"
        f" told {SYSTEM!r}; remove the turn, or put its words into the question"
      )
    spoken, repairs = spoken[1:], [*repairs, "usual system turn left out"]
  turns: list[Turn] = []
  for i, (role, text) in enumerate(spoken):
    if role != "human" and role != "gpt":
      raise UserError(
        f"{at}: turn {i} is from {role!r}, expected human or gpt; remove it or"
        " name who speaks"
      )
    turns.append(Turn(role, text))
  if turns and turns[0].role == "gpt":
    turns, repairs = turns[1:], [*repairs, "answer before the first question"]
  if not turns:
    raise UserError(f"{at}: only one gpt turn; a human turn must come first")
  if turns[0].role == "gpt":
    raise UserError(
      f"{at}: turns 0 and 1 are from gpt; a human turn must come first"
    )
  if require_answer:
    turns, repairs = _answered(turns, repairs, at)
  if any(a.role == b.role for a, b in itertools.pairwise(turns)):
    repairs.append("turns of one side in a row")
  return turns, repairs


def place_markers(
  turns: list[Turn], modality: str, count: int, at: str
) -> tuple[list[Turn], list[str]]:
  r"""Places every image's marker where the official loaders place it.

    one image     "What is this?\n<image>"  ->  "<image>\nWhat is this?"
                  "What is this?"           ->  "<image>\nWhat is this?"

  A video's turns stay as they are: `encode_conversation` removes their markers
  and writes one before the time instruction. See the table above for the rest.

  Args:
    turns: of the record; the first is of human.
    modality: video, image or text.
    count: number of images or videos.
    at: file, place and record, for messages.

  Returns:
    The turns, and the kinds of repairs.

  Raises:
    UserError: there are markers without an image or video.
  """
  foreign = _first(_FOREIGN, turns)
  if foreign:
    raise UserError(
      f"{at}: {foreign.strip()!r} is another model's marker; write {MARKER}"
    )
  if modality == "text":
    return turns, _check_words(turns, at)
  turns, repairs = _known_forms(turns, modality)
  if any(MARKER in t.text for t in turns if t.role == "gpt"):
    raise UserError(f"{at}: {MARKER} in a gpt answer; only questions may see")
  found = sum(t.text.count(MARKER) for t in turns)
  if not found:
    repairs.append("no marker: put in front")
  elif found > 1 and count == 1:
    repairs.append("several markers for one")
  elif found != count:
    raise UserError(
      f"{at}: {found} {MARKER} marker(s) but {count} image(s); give every one"
      " of them exactly one marker in a human turn, or none at all"
    )
  if modality == "video":
    if found == 1 and not turns[0].text.startswith(MARKER):
      repairs.append("marker moved to the front")
    return turns, repairs
  if not found:
    first = Turn("human", f"{MARKER}\n" * count + turns[0].text)
    return [first, *turns[1:]], repairs
  if count == 1:
    turns = _joined(turns)
  moved = [Turn(t.role, _marker_first(t.text)) for t in turns]
  if moved != turns:
    repairs.append("marker moved to the front")
  return moved, repairs


def _turn(raw: Any, where: str) -> tuple[str, str]:
  """Reads the role of a turn, in hourjax's names if known, and its text."""
  keys = ("from", "value") if isinstance(raw, dict) else ()
  if keys and "from" not in raw and "role" in raw:
    keys = ("role", "content")
  role, text = (raw.get(key) for key in keys) if keys else (None, None)
  if not isinstance(text, str) or not isinstance(role, str):
    raise UserError(
      f"{where} must be {{'from': ..., 'value': text}}, found {shorten(raw)}"
    )
  return _ROLES.get(role.strip().lower(), role), text.replace(_NOISE, "")


def _answered(
  turns: list[Turn], repairs: list[str], at: str
) -> tuple[list[Turn], list[str]]:
  """Returns the turns up to the last answer, and the kinds of repairs."""
  last = max((i for i, t in enumerate(turns) if t.role == "gpt"), default=-1)
  if last < 0:
    raise UserError(f"{at}: the last turn is from human; add its gpt answer")
  if last + 1 < len(turns):
    repairs = [*repairs, "last question without answer"]
  turns = turns[: last + 1]
  answers = [t.text for t in turns if t.role == "gpt"]
  if not any(map(str.strip, answers)):
    raise UserError(f"{at}: all {len(answers)} gpt answers are empty")
  return turns, repairs


def _check_words(turns: list[Turn], at: str) -> list[str]:
  """Returns the repairs of a text with markers; refuses those of an image."""
  asked = [turn for turn in turns if turn.role == "human"]
  found = sum(turn.text.count(MARKER) for turn in turns)
  first = any(turn.text.lstrip().startswith(MARKER) for turn in asked)
  if first or _first(_ALONE, asked):
    raise UserError(
      f"{at}: {max(found, 1)} {MARKER} marker(s) but 0 media; name the image or"
      " video under 'image' or 'video', or take the marker out"
    )
  return [f"{MARKER} in a text: words"] if found else []


def _known_forms(
  turns: list[Turn], modality: str
) -> tuple[list[Turn], list[str]]:
  """Replaces other spellings of the marker, if `<image>` occurs nowhere."""
  if any(MARKER in turn.text for turn in turns):
    return turns, []
  form = _OTHER_FORMS[modality]
  new = [
    Turn(t.role, form.sub(MARKER, t.text)) if t.role == "human" else t
    for t in turns
  ]
  return new, ["marker of another form"] if new != turns else []


def _joined(turns: list[Turn]) -> list[Turn]:
  """Leaves one marker of one image, in the first turn that has any."""
  joined, seen = [], False
  for turn in turns:
    text = turn.text
    if text.count(MARKER) > 1 or (seen and MARKER in text):
      text = text.replace(MARKER, "").strip()
      text = text if seen else f"{MARKER}\n{text}".strip()
    seen = seen or MARKER in turn.text
    joined.append(Turn(turn.role, text))
  return joined


def _marker_first(text: str) -> str:
  """Moves the only marker of a turn to its front."""
  if text.count(MARKER) != 1 or text.startswith(MARKER):
    return text
  # Stripped as a whole, so that an empty question leaves no newline.
  return f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()


def _first(pattern: re.Pattern, turns: list[Turn]) -> str:
  """Returns the first match in the human turns, "" if there is none."""
  found = (pattern.search(t.text) for t in turns if t.role == "human")
  return next((match[0] for match in found if match), "")


def joined_pair(
  raw: Mapping[str, Any], talks: Collection[str], at: str
) -> dict[str, Any]:
  """Returns a raw record with its rejected answer as text, if it has one.

  However a record writes a pair, the usual turns end with the chosen answer:

    turns       {"from": "gpt", "value": "red", "rejected": "I think red"}
    beside      "conversations": [...], "rejected": "I think red"
    messages    "chosen": [..., {"role": "assistant", "content": "red"}],
                "rejected": [..., {"role": "assistant", ...}]
    texts       "prompt": "What colour?", "chosen": "red", "rejected": "..."
    last turns  "conversations": [..., the question],
                "chosen": {"from": "gpt", ...}, "rejected": {...}

  Args:
    raw: as read; a record that is no pair is returned as it is.
    talks: keys under which turns may lie.
    at: file, place and record, for messages.

  Raises:
    UserError: one answer of the pair lacks, is empty, or they are the same.
  """
  result = dict(raw)
  talk = next((key for key in talks if raw.get(key) is not None), None)
  turns = raw.get(talk) if talk else None
  chosen, rejected = raw.get(CHOSEN), raw.get(REJECTED)
  if isinstance(chosen, str | list | Mapping):
    if rejected is None:
      raise UserError(
        f"{at}: 'chosen' is {shorten(chosen)} and there is no 'rejected';"
        " add the answer that it is preferred to, or write it as a usual turn"
      )
    result.pop(CHOSEN)
    if isinstance(chosen, list):
      _check_same_question(chosen, rejected, at)
      turns = chosen
    else:
      question = next((k for k in _QUESTIONS if raw.get(k) is not None), None)
      if turns is None and question is not None:
        turns = [{"from": "human", "value": result.pop(question)}]
      last = {"from": "gpt", "value": _answer_text(chosen, CHOSEN, at)}
      turns = [*(turns if isinstance(turns, list) else []), last]
    result[talk or "conversations"] = turns
  listed: list[Any] = turns if isinstance(turns, list) else []
  own = [
    (number, turn)
    for number, turn in enumerate(listed)
    if isinstance(turn, Mapping) and REJECTED in turn
  ]
  if own:
    number, turn = own[0]
    if number != len(listed) - 1:
      raise UserError(
        f"{at}: turn {number} of {len(listed)} has a rejected answer; only the"
        " last turn may: end the record there"
      )
    rejected = turn[REJECTED]
    if rejected is None:
      raise UserError(
        f"{at}: turn {number} has a rejected answer that is null; write it, or"
        " take the key out"
      )
  if not isinstance(rejected, str | list | Mapping):
    return result
  text = _answer_text(rejected, REJECTED, at)
  if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
    said = turns[-1].get("value", turns[-1].get("content"))
    if isinstance(said, str) and said.strip() == text.strip():
      raise UserError(
        f"{at}: the chosen answer and the rejected one are both"
        f" {shorten(text)}; drop the record, or correct one of them"
      )
  result[REJECTED] = text
  return result


def _answer_text(answer: Any, name: str, at: str) -> str:
  """Returns the words of an answer: a text, a turn, or the last of turns."""
  last = answer[-1] if isinstance(answer, list) and answer else answer
  if isinstance(last, Mapping):
    last = last.get("value", last.get("content"))
  if not isinstance(last, str) or not last.strip():
    raise UserError(
      f"{at}: the {name} answer is {shorten(answer)}; it must be text that is"
      " not empty"
    )
  return last


def _check_same_question(chosen: list, rejected: Any, at: str) -> None:
  """Raises a UserError unless two conversations differ only in their end."""
  if isinstance(rejected, list) and chosen[:-1] != rejected[:-1]:
    raise UserError(
      f"{at}: 'chosen' asks {shorten(chosen[:-1])} and 'rejected'"
      f" {shorten(rejected[:-1])}; a pair answers one question: make these the"
      " same"
    )
