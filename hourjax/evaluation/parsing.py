"""From a raw answer to what it says: a letter, yes or no, a number, words.

An answer that names no option, or several, is None: nobody guesses for it.

What is thought aloud does not count, and what stands in a container made for
the answer (`\\boxed{}`, `<answer>`, JSON) counts alone (`markup`). In the rest
every place that names an option is a mention. It is dropped if the sentence
denies it, asks it or makes it a condition. Those that are left count by how
they are named, and only the first of these that occurs:

    1. as final         "Final answer: B", 最终答案是B
    2. as the answer    "the answer is B", "I'd go with B", "B is correct", 选B;
                        or a clause of its own that ends a line: "So, B."
    3. as a label       "B. A blue car", "B because ...", "option B", "(B)"
    4. by its text      "It shows a blue car."

If all that count name one option, that is what the answer says. An option's
text is found before letters are looked for, so that "Vitamin C" names no C, and
a letter before a text is one mention with it. After "no, wait" only what
follows is said.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from hourjax.evaluation import answer_phrases
from hourjax.evaluation.questions import Question

# Raised with every change to what any answer is read as.
PARSER_VERSION = 3

LETTERS = "ABCDEFGHIJ"
_NUMERALS = tuple(str(number + 1) for number in range(len(LETTERS)))


def parse(answer: str, question: Question) -> str | None:
  """Returns what an answer says, in the form of `question.expected`.

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
    if the answer says nothing of the kind, or more than one thing. Of options
    with the same text, the text alone gives the first.
  """
  text = answer_phrases.spoken(answer)
  if text is None:
    return None
  parts = answer_phrases.contained(text) or [text]
  if question.kind == "open":
    return normalise(parts[-1]) or None
  said = [_read(part, question) for part in parts]
  # The last container is the answer; one before may not contradict it.
  return said[-1] if len({*said} - {None}) == 1 else None


def normalise(words: str) -> str:
  """Lower case, single spaces, no markup, no closing full stop or "!"."""
  return " ".join(answer_phrases.clean(words).lower().split()).rstrip(".! ")


def right_answers(question: Question) -> set[str]:
  """Returns what `parse` gives for a right answer to a question with options.

  That is `expected`, and the name of every other option with the same text.
  Where nothing is expected, as no option is right, nothing is.
  """
  names = LETTERS if question.kind == "choice" else _NUMERALS
  names = [*names][: len(question.options)]
  if question.expected not in names:
    return {question.expected} - {""}
  alike = same_text(question.options, names.index(question.expected))
  return {names[index] for index in alike}


def same_text(options: Sequence[str], index: int) -> list[int]:
  """Returns the indices of the options with the text of one, itself included.

  Empty options are not the same: they say nothing.
  """
  told = " ".join(options[index].split())
  alike = [i for i, o in enumerate(options) if told == " ".join(o.split())]
  return alike if told else [index]


def _read(text: str, question: Question) -> str | None:
  text = answer_phrases.clean(text)
  if question.kind == "yes_no":
    return _yes_or_no(text)
  if question.kind == "choice":
    letters = LETTERS[: len(question.options)]
    return _Reader(letters, question.options).read(text)
  numbers = _NUMERALS[: len(question.options)]
  symbols = "".join(question.extra.get("symbols", numbers))
  found = _Reader(symbols, question.options).read(_counted(text, symbols))
  return None if found is None else numbers[symbols.index(found)]


def _yes_or_no(text: str) -> str | None:
  words = re.findall(r"[a-z']+|[^\sa-z']", text.lower())
  said = set()
  for i, word in enumerate(words):
    if words[i - 1 : i] in (["not"], ["neither"], ["nor"]):
      continue
    after = words[i + 1] if i + 1 < len(words) else "."
    # "There is no dog" says nothing of yes or no, unless it comes first.
    alone = not after.isalpha() or after in ("and", "or", "because", "since")
    if word == "yes" or (word == "no" and (alone or i == 0)):
      said.add(word)
  return said.pop() if len(said) == 1 else None


_NUMBERS = {"one": 0, "first": 0, "two": 1, "second": 1, "three": 2, "third": 2}
_NUMBER = "|".join(_NUMBERS)


def _counted(text: str, symbols: str) -> str:
  """With symbols for words: "option two", "the second caption" -> option 2."""

  def symbol(match: re.Match) -> str:
    index = _NUMBERS[(match[1] or match[2]).lower()]
    return f"option {symbols[index]}" if index < len(symbols) else match[0]

  pattern = rf"\b(?:{answer_phrases.NOUN}\s+({_NUMBER})|({_NUMBER})\s+{answer_phrases.NOUN})\b"
  return re.sub(pattern, symbol, text, flags=re.IGNORECASE)


# "U.S.", "b.jpg" and "1.5" are no symbols.
_APART = r"(?!['’\w+]|[-–]\w|\.\w\b|\.[a-z])"
_BARE = r"(?<![\w'’.–-])"
_OPTION = r"[\ue000-\ue0ff]"  # an option's text, written as one character
_SYMBOL = {
  False: rf"[(\[]\s*([A-Za-z])\s*[)\]]|{_BARE}([A-Za-z]){_APART}",
  True: rf"[(\[]\s*(\d)\s*[)\]]|{_BARE}(\d){_APART}",
}
_BETWEEN = r"[\s.):,=/\]'(–—-]*(?:\bis\b\s*)?"  # a symbol and its option's text
_NEAR = 160  # characters beside a symbol that can state, name or deny it


# --- Options -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Mention:
  """A place that names an option.

  Attributes:
    symbol: in upper case; with "~" if it is named and cannot be meant.
    rank: how it is named, 1 to 4 as above; 5 by the way.
    denied: not said of it, but the contrary.
    start, end: of the place.
  """

  symbol: str
  rank: int
  denied: bool
  start: int
  end: int


class _Reader:
  """Reads answers to one question: its symbols and its options' texts."""

  def __init__(self, symbols: str, options: Sequence[str]):
    self._symbols = symbols
    self._options = options[: len(symbols)]
    self._digits = symbols[:1].isdigit()

  def read(self, text: str) -> str | None:
    """The one symbol that a cleaned answer chooses; None if there is none."""
    lone = _lone(text, self._digits)
    if len(lone) == 1 and lone <= set(self._symbols):
      return lone.pop()
    if (found := self._verbatim(text)) is not None:
      return found or None
    if lone:
      return None
    return self._told(self._masked(text))

  def _verbatim(self, text: str) -> str | None:
    """The option with exactly this text; "" if it is one of several."""
    if not _key(text):
      return None
    found: list[int] = []
    # "The US" is rather the option "the US" than the option "US".
    for form in (
      answer_phrases.clean,
      lambda o: answer_phrases.clean(o).lower(),
      _key,
    ):
      found = [i for i, o in enumerate(self._options) if form(o) == form(text)]
      if found and (told := self._one(found)):
        return told
    return "" if found else None

  def _one(self, found: Sequence[int]) -> str:
    same = len(found) == len(same_text(self._options, found[0]))
    return self._symbols[found[0]] if len(found) == 1 or same else ""

  def _masked(self, text: str) -> str:
    """With options' texts as one character each, the longest first."""
    keys: dict[str, list[int]] = {}
    for index, option in enumerate(self._options):
      if key := _key(option):
        keys.setdefault(key, []).append(index)
    told = {}
    for key, found in keys.items():
      symbol = self._one(found)
      index = self._symbols.index(symbol) if symbol else 0xFF
      told[key] = chr(0xE000 + index)
    symbols = re.compile(r"\d" if self._digits else r"[a-z]")
    short = [key for key in keys if symbols.fullmatch(key)]
    texts = sorted(keys.keys() - short, key=len, reverse=True)
    # "5" is not in "1.5", "-5", "5%" or "5th". A text that looks like a symbol
    # is one only after a symbol: "A. b".
    apart = r"(?<!\w)(?<!\d[.,])(?<![-+])(?:(?:an?|the)\s+)?"
    labelled = r"(?<=[A-Za-z0-9][.):] )"
    for start, found in ((apart, texts), (labelled, short)):
      words = "|".join(
        r"\s+".join(map(re.escape, key.split())) for key in found
      )
      if words:
        text = re.sub(
          rf"{start}({words})(?!\w|[.,]\d|\s?[%°])",
          lambda match: told.get(_key(match[1]), match[0]),
          text,
          flags=re.IGNORECASE,
        )
    return text

  def _told(self, text: str) -> str | None:
    """What an answer in words says."""
    corrections = list(answer_phrases.CORRECTION.finditer(text))
    if corrections:
      last = corrections[-1]
      found = self._told(text[last.end() :].lstrip(" ,.:;!?…—-"))
      if found or last["hard"]:
        return found
    mentions = [m for m in self._mentions(text) if not m.denied]
    first = min((m.rank for m in mentions), default=5)
    named = {m.symbol for m in mentions if m.rank == first}
    if first == 5 or len(named) != 1:
      return None
    (symbol,) = named
    return symbol if symbol in self._symbols else None

  def _mentions(self, text: str) -> Iterator[_Mention]:
    """All mentions; those in one list, "A and B", are named and denied alike.

    "A, B and C are wrong" denies all three.
    """
    group: list[_Mention] = []
    for mention in self._each(text):
      between = text[group[-1].end : mention.start] if group else ""
      if group and _listed(between, group[-1].denied or mention.denied):
        group.append(mention)
        continue
      yield from self._alike(group)
      group = [mention]
    yield from self._alike(group)

  def _alike(self, group: Sequence[_Mention]) -> Iterator[_Mention]:
    named = {mention.symbol[-1] for mention in group}
    if len(self._symbols) > 2 and named >= {*self._symbols}:
      return  # "A, B, C or D" names none of them
    rank = min((mention.rank for mention in group), default=5)
    denied = any(mention.denied for mention in group)
    for mention in group:
      yield dataclasses.replace(mention, rank=rank, denied=denied)

  def _each(self, text: str) -> Iterator[_Mention]:
    pattern = (
      rf"(?:{_SYMBOL[self._digits]})(?:{_BETWEEN}({_OPTION}))?|{_OPTION}"
    )
    for match in re.finditer(pattern, text):
      symbol = match[1] or match[2]
      before = text[max(0, match.start() - _NEAR) : match.start()]
      after = text[match.end() : match.end() + _NEAR]
      if symbol is None:
        mention = self._text(match, before, after)
      else:
        mention = self._letter(match, symbol, before, after)
      if mention:
        yield mention

  def _text(self, match, before: str, after: str) -> _Mention | None:
    """A mention by the option's text, which must be all that is said."""
    if not answer_phrases.ENDS.match(after):
      return None
    if answer_phrases.STATED.search(before):
      rank = _first_or_second(before)
    elif answer_phrases.ALONE.search(before):
      rank = 3
    else:
      rank = 4 if answer_phrases.SHOWN.search(before) else 5
    index = ord(match[0]) - 0xE000
    symbol = self._symbols[index] if index < len(self._symbols) else "~"
    return self._mention(symbol, rank, match, before, after)

  def _letter(
    self, match, symbol: str, before: str, after: str
  ) -> _Mention | None:
    """A mention by symbol, perhaps with its option's text."""
    boxed = match[0][0] in "(["
    own = match[3] is not None and self._is_own(symbol, match[3])
    head = not before.strip(" \n([") or before.rstrip(" (").endswith("\n")
    known = (
      boxed
      or own
      or (symbol not in "Ii" and answer_phrases.LABEL.search(before))
    )
    follows = match[0][match.end(1 if boxed else 2) - match.start() :] + after
    word = symbol in "AI" or symbol.islower() or self._digits
    if word and not known and not answer_phrases.ENDS.match(follows):
      return None
    if head and not known and not answer_phrases.GOES_ON.match(follows):
      return None
    if (
      boxed
      and before[-1:].isalnum()
      and not answer_phrases.NAMED.search(before)
    ):
      return None  # "f(a)"
    labelled = (
      own or head or (boxed and bool(answer_phrases.CLOSED.match(after)))
    )
    texted = match[3] is not None
    rank = self._rank(before, after, follows, labelled, texted)
    if symbol.islower() and rank == 5 and not boxed:
      return None
    symbol = symbol.upper()
    if rank == 5 and (boxed or re.match(r"[.):]\s*\S", follows)):
      symbol, rank = f"~{symbol}", 3  # "B." of "A. hat B. red"
    if rank == 3 and answer_phrases.UNFIT.match(after):
      symbol = f"~{symbol.strip('~')}"
    if symbol[0] == "~" and symbol[1] not in self._symbols:
      return None  # "John F. Kennedy"
    return self._mention(symbol, rank, match, before, after)

  def _rank(
    self, before: str, after: str, follows: str, labelled: bool, texted: bool
  ) -> int:
    """How a symbol is named; see the head of this file."""
    if answer_phrases.STATED.search(before) or answer_phrases.RIGHT.match(
      after
    ):
      return _first_or_second(before)
    alone = answer_phrases.ALONE.search(before)
    if answer_phrases.ABBREVIATED.search(before):
      alone = None
    maybe = answer_phrases.MAYBE.search(before)
    if alone and not (texted or maybe) and answer_phrases.LAST.match(after):
      return _first_or_second(before)  # a line of its own, or its last clause
    named = answer_phrases.NAMED.search(before) or maybe
    starts = alone and answer_phrases.ENDS.match(follows)
    return 3 if labelled or named or starts else 5

  def _is_own(self, symbol: str, option: str) -> bool:
    index = ord(option) - 0xE000
    own = self._symbols[index : index + 1]
    return symbol.upper() == own

  def _mention(self, symbol, rank, match, before, after) -> _Mention:
    forced = answer_phrases.FORCED.search(before + after)  # "if I had to say"
    denied = (
      answer_phrases.NOT.search(before)
      or answer_phrases.DOUBTED.search(before)
      or answer_phrases.WRONG.match(after)
      or answer_phrases.ASKED.match(after)
      or (answer_phrases.IF.search(before) and not forced)
      or (answer_phrases.ONLY_IF.match(after) and not forced)
    )
    return _Mention(symbol, rank, bool(denied), match.start(), match.end())


def _first_or_second(before: str) -> int:
  return 1 if answer_phrases.FINAL.search(before) else 2


def _listed(between: str, denied: bool) -> bool:
  """Whether two mentions belong to one list, by what stands between them.

  In "A. B" and "A -> B" the one is not said without the other. In "not A, B"
  and "not A. B" the second is free of the first's denial.
  """
  listed = bool(answer_phrases.LIST.fullmatch(between))
  if denied:
    return listed and between.strip(" )]([") != ","
  return listed or bool(answer_phrases.NEXT.fullmatch(between))


def _lone(text: str, digits: bool = False) -> set[str]:
  """The symbols of an answer that holds nothing else: "(b).", "A and B"."""
  match = (_LONE_DIGITS if digits else _LONE_LETTERS).fullmatch(text)
  return (
    {s.upper() for s in re.findall(r"\b\w\b", match[1])} if match else set()
  )


def _lone_pattern(symbol: str) -> re.Pattern:
  joint = r"\s*(?:[,/&]|\band\b|\bor\b)+\s*(?:(?:and|or)\s+)?"
  following = rf"(?:{joint}[(\[]?{symbol}[)\]]?)"
  edge = r"[^\w+]*"
  return re.compile(rf"{edge}({symbol}[)\]]?{following}*){edge}")


_LONE_LETTERS, _LONE_DIGITS = _lone_pattern("[A-Za-z]"), _lone_pattern(r"\d")


def _key(text: str) -> str:
  words = " ".join(answer_phrases.clean(text).lower().split())
  return re.sub(r"^(?:an?|the) ", "", words.strip(" .,:;!?'\"()[]"))
