"""What models wrap an answer in: thinking, containers, Markdown, LaTeX, JSON.

"<think>A or B?</think>So \\boxed{\\text{B}}."  -> spoken "So \\boxed{...}."
                                            -> contained ["\\text{B}"]
                                            -> clean "B"
"""

import json
import re
import unicodedata
from typing import Any

# Words that name a block of thinking, in `<think>`, `[THINK]`, `◁think▷` and
# `<|begin_of_thought|>`: the forms of DeepSeek-R1, Qwen, GLM, Magistral, Kimi,
# Seed, Command A, Sky-T1 and their relatives.
_THINK = r"(?:think|thinking|thought|thoughts)"
_OPEN = re.compile(
  rf"<\s*(?:seed:)?{_THINK}\b[^<>]*>|\[{_THINK}\]|◁\s*{_THINK}\s*▷"
  rf"|<\|(?:begin_of_|start_){_THINK}\|>"
  r"|<\|channel\|>\s*(?:analysis|commentary)|^analysis(?=[A-Z])"
  r"|here is my thought process:",
  re.IGNORECASE,
)
_CLOSE = re.compile(
  rf"<\s*/\s*(?:seed:)?{_THINK}\s*>|\[/{_THINK}\]|◁\s*/\s*{_THINK}\s*▷"
  rf"|<\|end_(?:of_)?{_THINK}\|>"
  r"|<\|channel\|>\s*final\s*<\|message\|>|assistantfinal"
  r"|here is my response:",
  re.IGNORECASE,
)
# Tagged parts that explain; what they name is not what is answered.
_ASIDE = re.compile(
  r"<(reason|reasoning|rationale|analysis|explanation|reflection|scratchpad"
  r"|summary|caption|evidence)>.*?(?:</\1>|$)",
  re.IGNORECASE | re.DOTALL,
)
_ANSWER = re.compile(
  r"<(answer|final_answer|final|conclusion|choice|option|result)>(.*?)"
  r"(?:</\1>|$)"
  r"|<\|begin_of_(box|solution)\|>(.*?)(?:<\|end_of_\3\|>|$)"
  # Backslashes get lost: "\b" is a control character elsewhere.
  r"|\\(?:boxed|fbox)\b|\x08?\b(?:boxed|oxed|fbox)(?=\{)",
  re.IGNORECASE | re.DOTALL,
)
_KEY = re.compile(
  r"(?:(?:the|my|your|final|correct|best|predicted|selected|chosen)[ _-]?)*"
  r"(?:answer|option|choice|letter|prediction|selection|response)s?"
  r"(?:[ _-]?(?:letter|choice|option|key))?",
  re.IGNORECASE,
)
_OBJECTS = 20  # of JSON that are looked for in an answer


def spoken(answer: str) -> str | None:
  """Returns what comes after the thinking; None if the thinking never ends.

  Many prompts open the block themselves, so the end alone tells that there was
  one. What comes before the last end is thinking, whatever it says.
  """
  ends = [match.end() for match in _CLOSE.finditer(answer)]
  rest = answer[ends[-1] :] if ends else answer
  if _OPEN.search(rest):
    return None
  return _ASIDE.sub(" ", rest)


def contained(text: str) -> list[str]:
  """Returns what stands in containers made for the answer, in their order.

  Containers are `\\boxed{}`, `<answer>`, `<|begin_of_box|>` and the "answer"
  of a JSON object; one that is cut off reaches to the end.
  """
  found, end = [], 0
  for match in _ANSWER.finditer(text):
    if match.start() < end:
      continue  # inside of the one before
    if not match[0].startswith("<"):
      inside, end = _braced(text, match.end())
    else:
      inside, end = match[2] or match[4] or "", match.end()
    found.append(inside)
  return found or _of_json(text)


def _braced(text: str, start: int) -> tuple[str, int]:
  """The {...} at a place, or the one character there as in LaTeX; its end."""
  rest = text[start:]
  skipped = len(rest) - len(rest.lstrip(" "))
  if not rest[skipped:].startswith("{"):
    return rest[skipped : skipped + 1], start + skipped + 1
  depth = 0
  for at, letter in enumerate(rest):
    depth += (letter == "{") - (letter == "}")
    if depth == 0 and at >= skipped:
      return rest[skipped + 1 : at], start + at + 1
  return rest[skipped + 1 :], len(text)


def _of_json(text: str) -> list[str]:
  """Values that JSON objects in a text have under the name of an answer."""
  decoder, found, end = json.JSONDecoder(), [], 0
  for match in list(re.finditer(r"\{", text))[:_OBJECTS]:
    if match.start() < end:
      continue
    try:
      value, end = decoder.raw_decode(text, match.start())
    except ValueError:
      continue
    except RecursionError:
      break
    found += [_text(item) for key, item in value.items() if _KEY.fullmatch(key)]
  return found


def _text(value: Any) -> str:
  """A JSON value in words; a list of several names several."""
  if isinstance(value, list):
    return " and ".join(map(_text, value))
  if isinstance(value, dict):
    return " ".join(map(_text, value.values()))
  return "" if value is None else str(value)


# Marks of other scripts that NFKC leaves as they are.
_MARKS = str.maketrans({
  "。": ". ", "、": ", ", "【": "(", "】": ")", "「": "(", "」": ")",
  "『": "(", "』": ")", "《": "(", "》": ")", "〈": "(", "〉": ")",
  "〔": "(", "〕": ")", "〖": "(", "〗": ")", "«": "(", "»": ")",
  "‘": "'", "’": "'", "\u200b": "", "\ufeff": "", "\r": "\n",
})  # fmt: skip
_CJK = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
# In the order in which they are replaced.
_MARKUP = tuple(
  (re.compile(pattern, re.MULTILINE | re.DOTALL), replacement)
  for pattern, replacement in (
    (r"~~.*?~~|<(del|strike)>.*?</\1>", " "),  # withdrawn
    (r"<\|[^|<>]*\|>", " "),  # special tokens
    (r"<([A-Za-z])>(?!.{0,99}</\1>)", r"(\1)"),  # "<B>" is no markup
    (r"</?\w+(?: [^<>]*)?/?>", " "),
    (r"\\n(?![a-z])", "\n"),  # a newline spelt out
    (r"\\([%&#$_])", r"\1"),
    (r"\\(?:text)?color *\{[^{}]*\}", " "),
    (r"\\[()\[\],;!]", " "),
    (r"\\[A-Za-z]+", " "),  # LaTeX's commands
    # Bold within a word leaves it whole: "**B**lue" is no "B".
    (r"(?<![\d*])(\*{1,3})(?=\S)([^*\n]{1,200}?)(?<=\S)\1(?![\d*])", r"\2"),
    (r"(?<!\w)_+|_+(?!\w)", " "),
    (r"`{3,}\w*", "\n"),
    (r"`", ""),
    (r"[*#$|{}\"“”]|(?<!\w)'|'(?!\w)", " "),
    (r"^[ \t]*(?:[>•·+-][ \t]*)+(?=[(A-Za-z])", ""),  # quotes and lists
    (r"^[ \t]*\[[xX✓✔]\]", ""),  # a box that is ticked
    (rf"(?<=[{_CJK}])(?=[A-Za-z0-9(])|(?<=[A-Za-z0-9)])(?=[{_CJK}])", " "),
    (r"[\ue000-\uf8ff]", " "),  # `parsing` writes options as such
    (r"[^\S\n]+", " "),
  )
)


def clean(text: str) -> str:
  """Returns a text without markup, in usual letters; its lines remain.

  What an answer is compared with goes through it as well: "$ 5" is "5".
  """
  text = unicodedata.normalize("NFKC", text).translate(_MARKS)
  for pattern, replacement in _MARKUP:
    text = pattern.sub(replacement, text)
  return text.strip()
