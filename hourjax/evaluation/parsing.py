"""From a raw answer to what it says: a letter, yes or no, a number, words.

An answer that names no option, or several, is None: nobody guesses for it.
What an answer states ("the answer is B") counts before what it merely names.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Sequence

from hourjax.evaluation.questions import Question

# Raised with every change to what any answer is read as.
PARSER_VERSION = 2

LETTERS = "ABCDEFGHIJ"


def parse(answer: str, question: Question) -> str | None:
  """What an answer says, in the form of `question.expected`.

  The right answer is the one that equals `expected`; for free text, what
  `normalise` makes of it.

    choice   "B", "(b)", "B. red", "The answer is B", or option B verbatim -> B
             "A man runs", "A or B", "", "E" of four options -> None
    yes_no   "Yes, it does." -> yes; "Yes and no." -> None
    match    "Option 2: ...", "2", "Sentence B" or the caption verbatim -> 2
    open     "Red ball." -> red ball

  Args:
    answer: what the model said.
    question: with `kind` and `options`; for "match" `extra["symbols"]` are the
      letters or digits that the question names its options by; digits from 1
      if left out.

  Returns:
    A letter; "yes" or "no"; an option's number from 1; normalised words. None
    if the answer says nothing of the kind, or more than one thing.
  """
  text = _clean(answer)
  if question.kind == "yes_no":
    return _yes_or_no(text)
  if question.kind == "open":
    return normalise(text) or None
  if question.kind == "choice":
    letters = LETTERS[: len(question.options)]
    return _option(text, letters, question.options)
  numbers = [str(i + 1) for i in range(len(question.options))]
  symbols = "".join(question.extra.get("symbols", numbers))
  found = _option(_counted(text, symbols), symbols, question.options)
  return None if found is None else numbers[symbols.index(found)]


def normalise(words: str) -> str:
  """Lower case, single spaces, no markup, no closing full stop or "!"."""
  return " ".join(_clean(words).lower().split()).rstrip(".! ")


def _clean(text: str) -> str:
  """Without markup, letters as they are usually written; lines remain.

  What an answer is compared with goes through it as well: "$ 5" is "5".
  """
  text = _MARKUP.sub(" ", unicodedata.normalize("NFKC", text))
  return re.sub(r"[^\S\n]+", " ", text).strip()


_MARKUP = re.compile(r"</?\w+>|\\(?:boxed|text|textbf|mathrm)\b|[*`#$_{}\"“”]")


def _yes_or_no(text: str) -> str | None:
  words = re.findall(r"[a-z']+|[^\sa-z']", text.lower())
  said = set()
  for i, word in enumerate(words):
    after = words[i + 1] if i + 1 < len(words) else "."
    # "There is no dog" says nothing of yes or no, unless it comes first.
    alone = not after.isalpha() or after in ("and", "or", "because", "since")
    if word == "yes" or (word == "no" and (alone or i == 0)):
      said.add(word)
  return said.pop() if len(said) == 1 else None


# --- Options -----------------------------------------------------------------


def _option(text: str, symbols: str, options: Sequence[str]) -> str | None:
  """The one symbol that an answer chooses; None if it is not one of them."""
  digits = symbols[:1].isdigit()
  lone = _lone(text, digits)
  if len(lone) == 1 and lone <= set(symbols):
    return lone.pop()
  told = _verbatim(text, symbols, options)
  if not told and not lone:
    told = _told(text, symbols, options, digits)
  if not told or len(told) > 1:
    return None
  (symbol,) = told
  return symbol if symbol in symbols else None


def _told(
  text: str, symbols: str, options: Sequence[str], digits: bool
) -> set[str]:
  """The symbols that an answer in words states or, failing that, names."""
  # An explanation may follow: "B\n\nA cat is not shown."
  lines = [_lone(line, digits) for line in text.splitlines()]
  if told := set().union(*(line for line in lines if len(line) == 1)):
    return told
  mentions = list(_mentions(text, digits))
  if told := {m.symbol for m in mentions if m.stated}:
    return told
  if prefix := _SAID.search(text):
    told = _verbatim(text[prefix.end() :], symbols, options)
  return told or {m.symbol for m in mentions if m.labelled}


def _lone(text: str, digits: bool = False) -> set[str]:
  """The symbols of an answer that holds nothing else: "(b).", "A and B"."""
  match = (_LONE_DIGITS if digits else _LONE_LETTERS).fullmatch(text)
  return (
    {s.upper() for s in re.findall(r"\b\w\b", match[1])} if match else set()
  )


def _lone_pattern(symbol: str) -> re.Pattern:
  joint = r"\s*(?:[,/&]|\band\b|\bor\b)+\s*(?:(?:and|or)\s+)?"
  following = rf"(?:{joint}[(\[]?{symbol}[)\]]?)"
  edge = r"[\s.,:;!?()\[\]-]*"
  return re.compile(rf"{edge}({symbol}[)\]]?{following}*){edge}")


_LONE_LETTERS, _LONE_DIGITS = _lone_pattern("[A-Za-z]"), _lone_pattern(r"\d")


def _verbatim(text: str, symbols: str, options: Sequence[str]) -> set[str]:
  """The symbols of the options with exactly this text."""
  key = _key(text)
  return {s for s, o in zip(symbols, options) if key and _key(o) == key}


def _key(text: str) -> str:
  words = " ".join(_clean(text).lower().split())
  return re.sub(r"^(?:an?|the) ", "", words.strip(" .,:;!?'\"()[]"))


_NOUN = (
  r"(?:answer|option|choice|letter|sentence|caption|description|statement)"
)
_SURELY = r"(?:\s+(?:definitely|clearly|probably|(?:most\s+)?likely))?"
_IS = r"(?:(?:is|was|(?:would|should|must|could)\s+be)\b|:|=|->|→)"
# What stands before a choice that is stated: "the best answer is: option".
_STATED = re.compile(
  rf"""(?:
    \b{_NOUN}\s*{_IS}{_SURELY}
    | \b(?:choose|chose|pick|picked|select|selected|say|think|believe|guess
        | go\s+with)(?:\s+that)?(?:\s+(?:it\s+is|it['’]s))?
  )\s*:?\s*(?:the\s+)?(?:{_NOUN}\s*:?\s*)?[(\[]?\s*$""",
  re.IGNORECASE | re.VERBOSE,
)
# "Caption A shows it", where "A" is no word; "caption: A man" is open to doubt.
_LABEL = re.compile(rf"\b{_NOUN}\s+$", re.IGNORECASE)
_NAMED = re.compile(rf"\b{_NOUN}\s*:?\s*$", re.IGNORECASE)
_NOT = re.compile(
  r"(?:\b(?:not|neither|nor|than|except)|n['’]t)\s+(?:the\s+)?"
  rf"(?:{_NOUN}\s*:?\s*)?$",
  re.IGNORECASE,
)
# What comes before a letter that ends the answer: "So it is B."
_THUS = re.compile(r"(?:[:,]|\b(?:is|be|with|so|it['’]s))\s*$", re.IGNORECASE)
_RIGHT = re.compile(
  r"[\s.)\]:,]*\b(?:is|would\s+be|seems)\s+(?:the\s+)?(?:most\s+)?"
  r"(?:correct|right|best|true|accurate|answer)",
  re.IGNORECASE,
)
_WRONG = re.compile(
  r"[\s.)\]:,]*\b(?:is|are|was)(?:n['’]t|\s+(?:not|wrong|incorrect|false))\b",
  re.IGNORECASE,
)
_LIST = re.compile(
  rf"\s*[)\]]?\s*(?:[,/&+]|\b(?:and|or)\b)*\s*(?:(?:and|or)\s+)?(?:{_NOUN}\s+)?"
  r"[(\[]?",
  re.IGNORECASE,
)
# An answer in words: "The answer is a red ball."
_SAID = re.compile(
  rf"(?:\b{_NOUN}\s*{_IS}|^(?:it\s+is|it['’]s|this\s+is))\s*:?", re.IGNORECASE
)
# "A", "I" and digits are words, too. Only before these they are symbols:
# "A because", not "A man"; and "A - a man", not "A-frame".
_JOINS = r"(?:because|since|as|for|which|is|was|and|or|but|due|given)\b"
_AFTER_WORD = re.compile(rf"\s*(?:[.,:;)\]/&\n]|[-–—]\s|$)|\s+{_JOINS}")
# "U.S." and "1.5" are no symbols.
_BOUNDARY = r"(?!['’\w+]|[-–]\w|\.\w\b)"
_LETTER = re.compile(
  rf"[(\[]\s*([A-Za-z])\s*[)\]]|(?<![\w'’.-])([A-Z]){_BOUNDARY}"
  r"|(?<![\w'’.-])([a-z])(?=\s*[.)]*\s*$)|^([a-z])(?=[.):]\s)"
)
_DIGIT = re.compile(rf"[(\[]\s*(\d)\s*[)\]]|(?<![\w'’.-])(\d){_BOUNDARY}")


@dataclasses.dataclass(frozen=True)
class _Mention:
  """A symbol that an answer names.

  Attributes:
    symbol: in upper case.
    stated: the answer calls it its choice.
    labelled: it stands where an option's name would: "B. red", "option B".
  """

  symbol: str
  stated: bool
  labelled: bool


_NEAR = 80  # characters before a symbol that can state or name it


def _mentions(text: str, digits: bool) -> Iterator[_Mention]:
  last, end = None, 0
  for match in (_DIGIT if digits else _LETTER).finditer(text):
    symbol = next(filter(None, match.groups()))
    boxed = match.group().startswith(("(", "["))
    before, after = text[: match.start()][-_NEAR:], text[match.end() :]
    known = boxed or (symbol != "I" and _LABEL.search(before))
    if symbol in "AI0123456789" and not (known or _AFTER_WORD.match(after)):
      continue
    if _NOT.search(before) or _WRONG.match(after):
      continue
    stated = bool(_STATED.search(before) or _RIGHT.match(after))
    ends = not after.strip(" .)]\n")
    labelled = (
      boxed
      or bool(_NAMED.search(before))
      or not before.strip(" \n([")
      or (before.rstrip(" ").endswith("\n") and after[:1] in tuple(".):"))
      or (ends and bool(_THUS.search(before)))
    )
    if symbol.islower() and not (boxed or labelled or stated):
      continue
    if last and _LIST.fullmatch(text[end : match.start()]):
      stated, labelled = last.stated, last.labelled
    last, end = _Mention(symbol.upper(), stated, labelled), match.end()
    yield last


_NUMBERS = {"one": 0, "first": 0, "two": 1, "second": 1, "three": 2, "third": 2}
_NUMBER = "|".join(_NUMBERS)


def _counted(text: str, symbols: str) -> str:
  """With symbols for words: "option two", "the second caption" -> option 2."""

  def symbol(match: re.Match) -> str:
    index = _NUMBERS[(match[1] or match[2]).lower()]
    return f"option {symbols[index]}" if index < len(symbols) else match[0]

  pattern = rf"\b(?:{_NOUN}\s+({_NUMBER})|({_NUMBER})\s+{_NOUN})\b"
  return re.sub(pattern, symbol, text, flags=re.IGNORECASE)
