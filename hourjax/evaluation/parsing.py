r"""The answer parser: which option an answer names, or yes or no, or words.

An answer that names no option, or several, is None; the parser never guesses.

Thinking does not count. If the answer has a container made for it (`\boxed{}`,
`<answer>`, JSON), only the container counts (see `answer_phrases`). In the
remaining text every place that names an option is a mention. A mention is
dropped if its sentence denies it, asks about it or makes it a condition. The
mentions that are left have a rank by how they name the option, and only those
of the best rank count:

    1. as final         "Final answer: B", 最终答案是B
    2. as the answer    "the answer is B", "I'd go with B", "B is correct", 选B;
                        or a clause of its own that ends a line: "So, B."
    3. as a label       "B. A blue car", "B because ...", "option B", "(B)"
    4. by its text      "It shows a blue car."

If all of them name the same option, that is the answer. Texts of options are
found before letters are, so that "Vitamin C" names no option C; a letter before
its option's text is one mention with it. After "no, wait" only the text that
follows counts.
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

  The right answer is the one that equals `expected`; for free text, the one
  that equals `normalise(expected)`.

    choice   "B", "(b)", "B. red", "The answer is B", or option B verbatim -> B
             "A man runs", "A or B", "", "E" of four options -> None
    yes_no   "Yes, it does." -> yes; "Yes and no." -> None
    match    "Option 2: ...", "2", "Sentence B" or the caption verbatim -> 2
    open     "Red ball." -> red ball

  Args:
    answer: text that the model answered.
    question: its `kind` and `options` are read; for "match" also
      `extra["symbols"]`, the letters or digits by which the question names its
      options; without it they are digits from 1.

  Returns:
    A letter; "yes" or "no"; an option's number from 1; or normalised words.
    None if the answer says nothing of the kind, or more than one thing. If
    options have the same text, the text alone gives the first of them.
  """
  text = answer_phrases.without_thinking(answer)
  if text is None:
    return None
  parts = answer_phrases.in_containers(text) or [text]
  if question.kind == "open":
    return normalise(parts[-1]) or None
  answers = [_parse_part(part, question) for part in parts]
  # The last container counts, unless one before it contradicts it.
  return answers[-1] if len({*answers} - {None}) == 1 else None


def normalise(words: str) -> str:
  """Returns words in lower case, without markup or a closing full stop.

  Args:
    words: text of an answer.
  """
  return " ".join(answer_phrases.clean(words).lower().split()).rstrip(".! ")


def right_answers(question: Question) -> set[str]:
  """Returns what `parse` returns for right answers to a question.

  That is `expected`, and the name of every other option with the same text. If
  no option is right, the set is empty.

  Args:
    question: a question with options, or of yes or no.
  """
  names = LETTERS if question.kind == "choice" else _NUMERALS
  names = [*names][: len(question.options)]
  if question.expected not in names:
    return {question.expected} - {""}
  same = same_text(question.options, names.index(question.expected))
  return {names[index] for index in same}


def same_text(options: Sequence[str], index: int) -> list[int]:
  """Returns the indices of the options with the text of one, its own included.

  Empty options do not count as the same, because they say nothing.

  Args:
    options: texts of the options.
    index: index of the one.
  """
  text = " ".join(options[index].split())
  same = [i for i, o in enumerate(options) if text == " ".join(o.split())]
  return same if text else [index]


def _parse_part(text: str, question: Question) -> str | None:
  """Returns what one container, or an answer without any, says."""
  text = answer_phrases.clean(text)
  if question.kind == "yes_no":
    return _yes_or_no(text)
  if question.kind == "choice":
    letters = LETTERS[: len(question.options)]
    return _Reader(letters, question.options).read(text)
  # The question may name its captions by letters; what is returned are numbers.
  numbers = _NUMERALS[: len(question.options)]
  symbols = "".join(question.extra.get("symbols", numbers))
  reader = _Reader(symbols, question.options)
  symbol = reader.read(_with_symbols(text, symbols))
  return None if symbol is None else numbers[symbols.index(symbol)]


def _yes_or_no(text: str) -> str | None:
  """Returns "yes" or "no" if a cleaned answer says one of them only."""
  words = re.findall(r"[a-z']+|[^\sa-z']", text.lower())
  answers = set()
  for i, word in enumerate(words):
    # The slice is empty for the first word.
    if words[i - 1 : i] in (["not"], ["neither"], ["nor"]):
      continue
    after = words[i + 1] if i + 1 < len(words) else "."
    # "There is no dog" is no answer of no; "No dogs are shown" is one.
    alone = not after.isalpha() or after in ("and", "or", "because", "since")
    if word == "yes" or (word == "no" and (alone or i == 0)):
      answers.add(word)
  return answers.pop() if len(answers) == 1 else None


# Index of the option that a word names.
_NUMBERS = {"one": 0, "first": 0, "two": 1, "second": 1, "three": 2, "third": 2}
_NUMBER = "|".join(_NUMBERS)


def _with_symbols(text: str, symbols: str) -> str:
  """Replaces words: "option two", "the second caption" -> "option 2"."""

  def symbol(match: re.Match) -> str:
    index = _NUMBERS[(match[1] or match[2]).lower()]
    return f"option {symbols[index]}" if index < len(symbols) else match[0]

  noun = answer_phrases.NOUN
  pattern = rf"\b(?:{noun}\s+({_NUMBER})|({_NUMBER})\s+{noun})\b"
  return re.sub(pattern, symbol, text, flags=re.IGNORECASE)


# What may not follow or precede a symbol without brackets, so that the letters
# and digits of "U.S.", "b.jpg", "A-frame", "D'Artagnan" and "1.5" are none.
_APART = r"(?!['’\w+]|[-–]\w|\.\w\b|\.[a-z])"
_BARE = r"(?<![\w'’.–-])"
# An option's text is replaced by one character of Unicode's private use area,
# U+E000 plus the option's index, which no pattern takes for a letter or a
# digit. U+E0FF is a text that several options have.
_OPTION = r"[\ue000-\ue0ff]"
_FIRST_OPTION, _AMBIGUOUS = 0xE000, 0xFF
# By whether symbols are digits: group 1 is a symbol in brackets, group 2 a bare
# one. Group 3 of the pattern in `_Reader._each` is its option's text.
_SYMBOL = {
  False: rf"[(\[]\s*([A-Za-z])\s*[)\]]|{_BARE}([A-Za-z]){_APART}",
  True: rf"[(\[]\s*(\d)\s*[)\]]|{_BARE}(\d){_APART}",
}
# What may stand between a symbol and its option's text: "B. red", "B is red".
_BETWEEN = r"[\s.):,=/\]'(–—-]*(?:\bis\b\s*)?"
# Characters beside a mention that are searched for phrases. The bound keeps the
# time in proportion to the length of an answer.
_CONTEXT = 160


# --- Options -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Mention:
  """Holds a place that names an option.

  Attributes:
    symbol: symbol of the option in upper case. It begins with "~" if the option
      is named but cannot be the answer.
    rank: how it is named, 1 to 4 as at the head of this file; 5 in passing.
    denied: whether the sentence denies it.
    start: index of the first character of the place.
    end: index after its last character.
  """

  symbol: str
  rank: int
  denied: bool
  start: int
  end: int


class _Reader:
  """Reads answers to one question, by its symbols and its options' texts."""

  def __init__(self, symbols: str, options: Sequence[str]):
    self._symbols = symbols
    self._options = options[: len(symbols)]
    self._digits = symbols[:1].isdigit()

  def read(self, text: str) -> str | None:
    """Returns the symbol that a cleaned answer chooses; None if it has none.

    Args:
      text: the answer, cleaned.
    """
    # The order matters: of the options "B" and "A" the answer "A" is the first
    # by its letter; "5" among "3", "5", "7" is a text, as 5 is no symbol; only
    # what is neither is read for phrases.
    lone = answer_phrases.lone_symbols(text, self._digits)
    if len(lone) == 1 and lone <= set(self._symbols):
      return lone.pop()
    if (symbol := self._verbatim(text)) is not None:
      return symbol or None
    if lone:
      return None
    return self._read_phrases(self._mask_options(text))

  def _verbatim(self, text: str) -> str | None:
    """Returns the option with exactly this text; "" if there are several."""
    if not _key(text):
      return None
    found: list[int] = []
    # The strictest comparison that finds an option counts: "The US" is rather
    # the option "the US" than the option "US".
    for form in (
      answer_phrases.clean,
      lambda o: answer_phrases.clean(o).lower(),
      _key,
    ):
      found = [i for i, o in enumerate(self._options) if form(o) == form(text)]
      if found and (symbol := self._symbol_of(found)):
        return symbol
    return "" if found else None

  def _symbol_of(self, found: Sequence[int]) -> str:
    """Returns the symbol of options with one text; "" if texts differ."""
    same = len(found) == len(same_text(self._options, found[0]))
    return self._symbols[found[0]] if len(found) == 1 or same else ""

  def _mask_options(self, text: str) -> str:
    """Replaces options' texts by one character each, the longest first."""
    keys: dict[str, list[int]] = {}
    for index, option in enumerate(self._options):
      if key := _key(option):
        keys.setdefault(key, []).append(index)
    masks = {}
    for key, found in keys.items():
      symbol = self._symbol_of(found)
      index = self._symbols.index(symbol) if symbol else _AMBIGUOUS
      masks[key] = chr(_FIRST_OPTION + index)
    symbols = re.compile(r"\d" if self._digits else r"[a-z]")
    short = [key for key in keys if symbols.fullmatch(key)]
    texts = sorted(keys.keys() - short, key=len, reverse=True)
    # The number 5 is not in "1.5", "-5", "5%" or "5th". A text that looks like
    # a symbol is taken for a text only after a symbol: "A. b".
    apart = r"(?<!\w)(?<!\d[.,])(?<![-+])(?:(?:an?|the)\s+)?"
    labelled = r"(?<=[A-Za-z0-9][.):] )"
    for start, found in ((apart, texts), (labelled, short)):
      words = "|".join(
        r"\s+".join(map(re.escape, key.split())) for key in found
      )
      if words:
        text = re.sub(
          rf"{start}({words})(?!\w|[.,]\d|\s?[%°])",
          lambda match: masks.get(_key(match[1]), match[0]),
          text,
          flags=re.IGNORECASE,
        )
    return text

  def _read_phrases(self, text: str) -> str | None:
    """Returns the symbol that an answer in words chooses."""
    corrections = list(answer_phrases.CORRECTION.finditer(text))
    if corrections:
      last = corrections[-1]
      symbol = self._read_phrases(text[last.end() :].lstrip(" ,.:;!?…—-"))
      # After a soft correction such as "sorry," that no answer follows, what
      # was said before still counts.
      if symbol or last["hard"]:
        return symbol
    mentions = [m for m in self._mentions(text) if not m.denied]
    first = min((m.rank for m in mentions), default=5)
    named = {m.symbol for m in mentions if m.rank == first}
    if first == 5 or len(named) != 1:
      return None
    (symbol,) = named
    # It is none of them where it is marked by "~".
    return symbol if symbol in self._symbols else None

  def _mentions(self, text: str) -> Iterator[_Mention]:
    """Yields all mentions, those of one list with the same rank and denial.

    "A, B and C are wrong" denies all three.
    """
    group: list[_Mention] = []
    for mention in self._each(text):
      between = text[group[-1].end : mention.start] if group else ""
      if group and _is_list(between, group[-1].denied or mention.denied):
        group.append(mention)
        continue
      yield from self._as_one(group)
      group = [mention]
    yield from self._as_one(group)

  def _as_one(self, group: Sequence[_Mention]) -> Iterator[_Mention]:
    """Yields the mentions of one list, with its best rank, denied if one is."""
    named = {mention.symbol[-1] for mention in group}
    # "A, B, C or D" repeats the question and names none of them.
    if len(self._symbols) > 2 and named >= {*self._symbols}:
      return
    rank = min((mention.rank for mention in group), default=5)
    denied = any(mention.denied for mention in group)
    for mention in group:
      yield dataclasses.replace(mention, rank=rank, denied=denied)

  def _each(self, text: str) -> Iterator[_Mention]:
    """Yields each mention on its own, in order."""
    pattern = (
      rf"(?:{_SYMBOL[self._digits]})(?:{_BETWEEN}({_OPTION}))?|{_OPTION}"
    )
    for match in re.finditer(pattern, text):
      symbol = match[1] or match[2]
      before = text[max(0, match.start() - _CONTEXT) : match.start()]
      after = text[match.end() : match.end() + _CONTEXT]
      if symbol is None:
        mention = self._mention_by_text(match, before, after)
      else:
        mention = self._mention_by_symbol(match, symbol, before, after)
      if mention:
        yield mention

  def _mention_by_text(
    self, match: re.Match, before: str, after: str
  ) -> _Mention | None:
    """Makes the mention of an option by its text.

    The text must be the whole of what is said: nothing may follow in its
    clause.
    """
    if not answer_phrases.ENDS.match(after):
      return None
    if answer_phrases.STATED.search(before):
      rank = _first_or_second(before)
    elif answer_phrases.ALONE.search(before):
      rank = 3
    else:
      rank = 4 if answer_phrases.SHOWN.search(before) else 5
    index = ord(match[0]) - _FIRST_OPTION
    symbol = self._symbols[index] if index < len(self._symbols) else "~"
    return self._mention(symbol, rank, match, before, after)

  def _mention_by_symbol(
    self, match: re.Match, symbol: str, before: str, after: str
  ) -> _Mention | None:
    """Makes the mention of an option by its symbol, perhaps with its text.

    Returns:
      The mention; None if the character is no symbol.
    """
    in_brackets = match[0][0] in "(["
    has_text = match[3] is not None
    has_own_text = has_text and self._is_own(symbol, match[3])
    starts_line = not before.strip(" \n([") or before.rstrip(" (").endswith(
      "\n"
    )
    # Whether the character is certainly a symbol and not a word.
    is_symbol = (
      in_brackets
      or has_own_text
      or (symbol not in "Ii" and answer_phrases.LABEL.search(before))
    )
    # What follows the symbol alone, without the option's text in the match.
    end = match.end(1 if in_brackets else 2) - match.start()
    follows = match[0][end:] + after
    # "A", "I", lower case and digits are words, too: "A man", "2 dogs".
    is_word = symbol in "AI" or symbol.islower() or self._digits
    if is_word and not is_symbol and not answer_phrases.ENDS.match(follows):
      return None
    # A capital at the start may begin a name: "C major".
    if (
      starts_line
      and not is_symbol
      and not answer_phrases.GOES_ON.match(follows)
    ):
      return None
    # A bracket that follows a word directly is part of it: "f(a)".
    if (
      in_brackets
      and before[-1:].isalnum()
      and not answer_phrases.NAMED.search(before)
    ):
      return None
    labelled = (
      has_own_text
      or starts_line
      or (in_brackets and bool(answer_phrases.CLOSED.match(after)))
    )
    rank = self._rank(before, after, follows, labelled, has_text)
    if symbol.islower() and rank == 5 and not in_brackets:
      return None
    symbol = symbol.upper()
    # "B." of "A. hat B. red" is named as "A." is, so that the answer is not
    # "A".
    if rank == 5 and (in_brackets or re.match(r"[.):]\s*\S", follows)):
      symbol, rank = f"~{symbol}", 3
    if rank == 3 and answer_phrases.UNFIT.match(after):
      symbol = f"~{symbol.strip('~')}"
    # The letter of no option contradicts nothing: "John F. Kennedy".
    if symbol[0] == "~" and symbol[1] not in self._symbols:
      return None
    return self._mention(symbol, rank, match, before, after)

  def _rank(
    self, before: str, after: str, follows: str, labelled: bool, has_text: bool
  ) -> int:
    """Returns how a symbol is named; see the head of this file."""
    if answer_phrases.STATED.search(before) or answer_phrases.RIGHT.match(
      after
    ):
      return _first_or_second(before)
    alone = answer_phrases.ALONE.search(before)
    # The stop of "Dr." ends no clause.
    if answer_phrases.ABBREVIATED.search(before):
      alone = None
    maybe = answer_phrases.MAYBE.search(before)
    # A line that holds nothing but the symbol, or whose last clause does.
    if alone and not (has_text or maybe) and answer_phrases.LAST.match(after):
      return _first_or_second(before)
    named = answer_phrases.NAMED.search(before) or maybe
    starts = alone and answer_phrases.ENDS.match(follows)
    return 3 if labelled or named or starts else 5

  def _is_own(self, symbol: str, option: str) -> bool:
    """Returns whether the masked text is that of the symbol's option."""
    index = ord(option) - _FIRST_OPTION
    return symbol.upper() == self._symbols[index : index + 1]

  def _mention(
    self, symbol: str, rank: int, match: re.Match, before: str, after: str
  ) -> _Mention:
    """Makes a mention, and finds out whether its sentence denies it."""
    # "If I had to choose, B" is an answer, though it begins with "if".
    forced = answer_phrases.FORCED.search(before + after)
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
  """Returns rank 1 for a final answer, rank 2 for an answer."""
  return 1 if answer_phrases.FINAL.search(before) else 2


def _is_list(between: str, denied: bool) -> bool:
  """Returns whether two mentions are in one list, by the text between them.

  In "A. B" and "A -> B" the two belong together. In "not A, B" and "not A. B"
  the denial of the first does not extend to the second.
  """
  listed = bool(answer_phrases.LIST.fullmatch(between))
  if denied:
    return listed and between.strip(" )]([") != ","
  return listed or bool(answer_phrases.NEXT.fullmatch(between))


def _key(text: str) -> str:
  """Returns a text as options are compared: lower case, without an article."""
  words = " ".join(answer_phrases.clean(text).lower().split())
  return re.sub(r"^(?:an?|the) ", "", words.strip(" .,:;!?'\"()[]"))
