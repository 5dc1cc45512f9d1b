r"""Patterns for `parsing`: what wraps an answer, how phrases name an option.

The first part removes what models wrap an answer in: thinking, containers,
Markdown, LaTeX, JSON.

"<think>A or B?</think>So \boxed{\text{B}}."
    -> without_thinking "So \boxed{\text{B}}."
    -> in_containers    ["\text{B}"]
    -> clean            "B"

The second part are phrases around an option's name that show how it is meant.
They are matched without regard to case, on text that `clean` returned.
"""

import json
import re
import unicodedata
from typing import Any

# --- Thinking and containers -------------------------------------------------

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
# Tagged parts that explain; an option that they name is not the answer.
_ASIDE = re.compile(
  r"<(reason|reasoning|rationale|analysis|explanation|reflection|scratchpad"
  r"|summary|caption|evidence)>.*?(?:</\1>|$)",
  re.IGNORECASE | re.DOTALL,
)
# Group 2 is the content of a tag, group 4 that between special tokens. Of
# \\boxed only the start is matched, since braces may be nested.
_ANSWER = re.compile(
  r"<(answer|final_answer|final|conclusion|choice|option|result)>(.*?)"
  r"(?:</\1>|$)"
  r"|<\|begin_of_(box|solution)\|>(.*?)(?:<\|end_of_\3\|>|$)"
  # Backslashes get lost on the way: an unescaped "\b" is the control character
  # U+0008, so "\boxed" may arrive as U+0008 and "oxed", or as "boxed".
  r"|\\(?:boxed|fbox)\b|\x08?\b(?:boxed|oxed|fbox)(?=\{)",
  re.IGNORECASE | re.DOTALL,
)
# Names that a JSON object has for its answer: "answer", "final_answer", "The
# correct option".
_KEY = re.compile(
  r"(?:(?:the|my|your|final|correct|best|predicted|selected|chosen)[ _-]?)*"
  r"(?:answer|option|choice|letter|prediction|selection|response)s?"
  r"(?:[ _-]?(?:letter|choice|option|key))?",
  re.IGNORECASE,
)
_MAX_OBJECTS = 20  # braces of an answer at which JSON is looked for


def without_thinking(answer: str) -> str | None:
  """Returns the text after the thinking; None if the thinking never ends.

  Many prompts open the block of thinking themselves, so that an answer may hold
  its end alone. All text before the last end is thinking.

  Args:
    answer: text that the model answered.
  """
  ends = [match.end() for match in _CLOSE.finditer(answer)]
  rest = answer[ends[-1] :] if ends else answer
  if _OPEN.search(rest):
    return None
  return _ASIDE.sub(" ", rest)


def in_containers(text: str) -> list[str]:
  r"""Returns the contents of containers made for the answer, in their order.

  Containers are `\boxed{}`, `<answer>`, `<|begin_of_box|>` and the "answer" of
  a JSON object. A container that is cut off extends to the end.

  Args:
    text: an answer without thinking.
  """
  found, end = [], 0
  for match in _ANSWER.finditer(text):
    # A container within the one before is read with it.
    if match.start() < end:
      continue
    if not match[0].startswith("<"):
      inside, end = _braced(text, match.end())
    else:
      inside, end = match[2] or match[4] or "", match.end()
    found.append(inside)
  return found or _of_json(text)


def _braced(text: str, start: int) -> tuple[str, int]:
  """Returns the content of {...} at a place, and where it ends.

  Without braces it is the one character there, as in LaTeX.
  """
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
  """Returns the values that JSON objects in a text have for an answer."""
  decoder, found, end = json.JSONDecoder(), [], 0
  for match in list(re.finditer(r"\{", text))[:_MAX_OBJECTS]:
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
  """Returns a JSON value in words; a list of several names several."""
  if isinstance(value, list):
    return " and ".join(map(_text, value))
  if isinstance(value, dict):
    return " ".join(map(_text, value.values()))
  return "" if value is None else str(value)


# --- Markup ------------------------------------------------------------------

# Marks of other scripts that NFKC leaves as they are.
_MARKS = str.maketrans({
  "。": ". ", "、": ", ", "【": "(", "】": ")", "「": "(", "」": ")",
  "『": "(", "』": ")", "《": "(", "》": ")", "〈": "(", "〉": ")",
  "〔": "(", "〕": ")", "〖": "(", "〗": ")", "«": "(", "»": ")",
  "‘": "'", "’": "'", "\u200b": "", "\ufeff": "", "\r": "\n",
})  # fmt: skip
_CJK = r"\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
# Patterns and their replacements. The order matters: withdrawn text goes before
# its marks do; "<B>" becomes "(B)" before other tags go; the commands of LaTeX
# go before braces and dollar signs; spaces are joined last.
_MARKUP = tuple(
  (re.compile(pattern, re.MULTILINE | re.DOTALL), replacement)
  for pattern, replacement in (
    (r"~~.*?~~|<(del|strike)>.*?</\1>", " "),  # struck out: withdrawn
    (r"<\|[^|<>]*\|>", " "),  # special tokens
    # "<B>" that is not closed is an answer and no markup.
    (r"<([A-Za-z])>(?!.{0,99}</\1>)", r"(\1)"),
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
    (r"[\ue000-\uf8ff]", " "),  # `parsing` writes options as such characters
    (r"[^\S\n]+", " "),
  )
)


def clean(text: str) -> str:
  """Returns a text without markup, in plain letters; its lines remain.

  Texts that an answer is compared with are cleaned, too: "$ 5" becomes "5".

  Args:
    text: an answer or an option.
  """
  text = unicodedata.normalize("NFKC", text).translate(_MARKS)
  for pattern, replacement in _MARKUP:
    text = pattern.sub(replacement, text)
  return text.strip()


# --- Symbols alone -----------------------------------------------------------


def _lone_pattern(symbol: str) -> re.Pattern:
  """Compiles the pattern of an answer of symbols and nothing else."""
  joint = r"\s*(?:[,/&]|\band\b|\bor\b)+\s*(?:(?:and|or)\s+)?"
  following = rf"(?:{joint}[(\[]?{symbol}[)\]]?)"
  edge = r"[^\w+]*"
  return re.compile(rf"{edge}({symbol}[)\]]?{following}*){edge}")


_LONE_LETTERS, _LONE_DIGITS = _lone_pattern("[A-Za-z]"), _lone_pattern(r"\d")


def lone_symbols(text: str, digits: bool) -> set[str]:
  """Returns the symbols of an answer that has nothing else.

  "(b)." -> {"B"}, "A and B" -> {"A", "B"}, "A man" -> {}

  Args:
    text: a cleaned answer.
    digits: whether symbols are digits and not letters.
  """
  match = (_LONE_DIGITS if digits else _LONE_LETTERS).fullmatch(text)
  return (
    {s.upper() for s in re.findall(r"\b\w\b", match[1])} if match else set()
  )


# --- Phrases -----------------------------------------------------------------
# "Before:" is a pattern of what stands before an option's name and ends there;
# "After:" is one of what follows and starts there.


def _regex(pattern: str) -> re.Pattern:
  """Compiles a verbose pattern, without regard to case."""
  return re.compile(pattern, re.IGNORECASE | re.VERBOSE)


def _words(words: str) -> str:
  """Returns alternatives of words; "_" stands for the space within one.

  They hold no spaces, so that patterns that are not verbose can use them.
  """
  return "|".join(words.split()).replace("_", r"\s+")


# "answer", "option" and the words of other languages for them.
NOUN = (
  r"(?:\b(?:letter|"
  + _words(
    "answer option choice selection pick guess ans sentence caption description"
    " statement response respuesta opci[oó]n r[eé]ponse antwort resposta"
    " op[cç][aã]o risposta opzione antwoord svaret jawaban(?:nya)? cevap"
    " odpowied[zź] ответ вариант đáp_án câu_trả_lời_đúng الإجابة الجواب"
  )
  + ")\\b|"
  + _words("答案 选项 選項 答え 正解 回答 정답 답 옵션")
  + ")"
)
_ADJECTIVE = rf"""(?:{
  _words("the best correct right final my most likely accurate la el le il die")
})\s+"""
_SURELY = rf"""(?:\s*\b(?:{
  _words(
    "definitely clearly probably certainly obviously surely most_likely likely"
    " therefore thus indeed simply still also then either both"
  )
})\b|\s*(?:应该|應該))?"""
_IS = rf"""(?:(?:\b(?:{
  _words(
    "is was would_be should_be must_be will_be are seems_to_be appears_to_be es"
    " est ist lautet é_a é è sería är adalah là هي هو"
  )
})\b|=|->|→|⇒|:|\s[-–—]\s|{
  _words("是 为 為 は 은 는 이 选 選 就是 应该是 應該是 应为 應為 应选 應選")
})\s*:?)"""
_I = r"""(?:\b(?:i|we|let['’]?s)(?:['’](?:d|ll|ve|m))?
    (?:\s+(?:would|will|have|must|should|am|can|do|had|to|say))*
  |(?:^|[.,:;!\n])\s*(?:so|thus|therefore|hence)?,?)\s*(?:\w+ly\s+)?"""
_CHOOSE = _words(
  "choose chose chosen choosing pick picked select selected guess believe think"
  " say conclude go_with go_for going_with went_with opt_for opted_for"
  " settle_on vote vote_for answer_with"
)
_MATCHES = r"""\b(?:this|that|which|it|evidence)\s+(?:\w+ly\s+)?
    (?:corresponds?\s+to|matches|points?\s+to|leads?\s+to|indicates|suggests)"""
_IT = r"""\b(?:it|this|that|which|one|mine
      |(?:best|correct|(?<!on\ the\ )right|closest|likely)
        (?:\s+(?:match|fit|guess|candidate|description|one))?)
    (?:\s+(?:is|was|must\s+be|should\s+be|would\s+be)\b|['’]s)"""
# Between any of these and the option's symbol, up to where the symbol begins.
_ITS_NAME = rf"\s*:?\s*(?:{_ADJECTIVE})*(?:{NOUN}\s*:?\s*)?[(\[]?\s*$"

# Before: the option is called the answer.
STATED = _regex(rf"""(?:
    {NOUN}\s*(?:\([^()\n]*\)\s*|\b(?:correcta|correcte|correta|corretta)\s+)?
      {_IS}{_SURELY}
    | \b(?:answer|option|choice)\s[^.,:;!?\n]{{1,60}}?\bis{_SURELY}
    | {_I}\b(?:{_CHOOSE})\b(?:\s+that)?(?:\s*{_IT})?{_SURELY}
    | {_MATCHES} | {_IT}{_SURELY}
    | \b(?:elijo|choisis|wähle)\b | (?:{
  _words("选择 選擇 选 選 应该是 應該是 而是 就是 是")
})
    | \bnot\s[^.!?\n]{{1,40}}?\bbut(?:\s+rather)?  # not A but
  ){_ITS_NAME}""")
# Before, in addition to STATED: the answer is called the final one.
FINAL = _regex(r"""(?:\bfinal\s+(?:answer|choice|option|decision)
    |\bin\s+conclusion\b|最终答案|最終答案)[^.\n]{0,24}$""")
# Before: the option may be the answer.
MAYBE = _regex(
  rf"(?:\b(?:could|might|may|can)\s+(?:well\s+|also\s+)?be{_SURELY}"
  rf"|\b(?:maybe|perhaps|possibly)\b,?){_ITS_NAME}"
)
# Before: "option", so that what follows is a symbol and no word: "Caption A
# shows it". With a colon it may be a word: "caption: A man".
LABEL = _regex(rf"{NOUN}\s+$")
# Before: "option" or "(". "Letter" counts only at the start of a clause,
# because "He wears the letter B" is about something else.
NAMED = _regex(
  rf"(?:{NOUN.replace('letter|', '')}|(?:^|[.,:!?\n]\s*)(?:the\s+)?letter)"
  r"\s*:?\s*[(\[]?\s*$"
)
# Before: the option is denied. Some words may stand between: "do not think it
# is".
NOT = _regex(rf"""(?:
    (?:\b(?:not|never|cannot)|n['’]t)\s+
      (?:(?!(?:but|so|because|since|although|though)\b)\w+\s+){{0,3}}
    | \b(?:neither|nor|than|except|unlike|without|instead\s+of|excluding
      |eliminat\w+|exclud\w+|reject\w*|rul\w+\s+out|dismiss\w*|discard\w*)\s+
    | 不(?:应|應|该|該|会|能|可能)*(?:是|为|选|選|选择|選擇) | 并非 | 排除
  )\s*(?:the\s+)?(?:{NOUN}\s*:?\s*)?[(\[]?\s*$""")
# Before, in the same clause: the option is doubted or asked about; others would
# say it, or it was said at first; or it is only being considered.
DOUBTED = _regex(rf"""(?:
    \b(?:consider(?:ing)?|analy[sz](?:e|ing)|examin(?:e|ing)|evaluat(?:e|ing)
      |look(?:ing)?\s+at|check(?:ing)?|according\s+to
      |(?<!i\ )see(?=\s+option))\s+(?:the\s+)?(?:{NOUN}\s*:?\s*)?[(\[]?\s*$
  | (?:
      \b(?:i|we)\s+(?:\w+ly\s+)?(?:doubt|disagree)\b
      | \b(?:it|that)(?:['’]s|\s+(?:is|seems))\s+(?:\w+ly\s+|very\s+)?
        (?:unlikely|improbable|implausible|doubtful|false|untrue|not\s+true)
        \s+that\b
      | \bwhether\b
      | \b(?:at\s+first|first|initially|originally)\b,?\s+(?:i|we)\s+(?:had\s+)?
        (?:thought|believed|assumed|guessed)\b
      | \b(?:you|one|some|many|others|people|viewers)\s+(?:people\s+)?
        (?:may|might|could)\s+(?:\w+ly\s+)?(?:{_CHOOSE}|assume|argue)\b
    )(?:(?!\b(?:and|but|so)\b)[^.,:;!?\n]){{0,60}}$
  )""")
# Before: the option starts a clause, or the clause says nothing else: "So it
# must be".
_FILLERS = _words(
  "so thus hence therefore finally definitely clearly obviously probably"
  " certainly surely sure likely most maybe perhaps possibly absolutely well ok"
  r" okay yes yeah yep no(?=\s*[,.!—–-]) hmm oh of_course and but rather just"
  " simply only indeed again i['’]m it['’]s it is must be that this means makes"
  " would the answer final correct best my here"
)
ALONE = _regex(
  rf"""(?:^|[\n.,:;!?–—→⇒…>)]|\s-)\s*
    (?:(?:(?:{_FILLERS})\b|因此|所以|故|那么|[^\w\s(\[\ue000-\ue0ff])\s*)*
    [(\[]?\s*$"""
)
# Before: an abbreviation, so that "e.g. b" and "Dr. B" start no clause.
ABBREVIATED = _regex(r"\b(?:mrs?|ms|dr|st|prof|vs|cf|e\.g|i\.e|fig)\.\s*$")
# Before: a condition; and one that only means to answer, "if I had to choose".
IF = _regex(r"(?:^|[.!?\n,;]\s*)(?:if|unless|had|suppose|assuming)\b[^.!?\n]*$")
FORCED = _regex(r"""\bif\s+(?:i|we|you|one)?\s*(?:had|have|must|need|were|was
    |am|are)?\s*(?:forced\s+)?to\s+(?:choose|pick|guess|select|answer|say)""")
# Before an option's text: "The video shows" a blue car.
SHOWN = _regex(rf"""(?:^|[.!?\n:,]\s*)(?:(?:in|based\s+on|from|according\s+to)
    \s+the\s+\w+,?\s+)?(?:it|this|that|there|he|she|they|i|we
      |the\s+\w+(?:\s+\w+)?)
    (?:['’]s|\s+(?:clearly\s+)?(?:is|are|was|were|has|have|shows?|showed|see
      |depicts?|displays?|features?|contains?|can\s+see|presents?))
    (?:\s+showing)?\s+(?:{NOUN}\s+)?$""")

# After: the option is called the answer.
RIGHT = _regex(r"""[\s.)\]:,]*(?:
    (?:\b(?:is|was|would\s+be|(?:seems|looks|appears)(?:\s+to\s+be)?
        |must\s+be|should\s+be)\s+
      (?:definitely\s+|clearly\s+|probably\s+|indeed\s+)?
      (?:the\s+|my\s+|a\s+)?(?:most\s+|only\s+)?
      (?:correct|right|best|true|accurate|appropriate|suitable|fitting|answer
        |choice|likely|final)\b)
    | \b(?:fits|matches|describes\s+\w+)\s+best\b | \b(?:es|est|ist|é|è)\s+
      (?:la\s+|le\s+|a\s+)?(?:correct|richtig|bonne|juste|corr)\w*
    | (?:项|項)?\s*(?:是|最)?\s*(?:正确|正確|对|對|合适|准确)
    | が正しい | が正解)
  | [ )\]]*\b(?:the|my)\s+(?:most\s+)?(?:correct|right|best|final|likely)?\s*
    (?:answer|option|choice)\b  # "makes B the answer"
  """)
# After: the option is denied.
WRONG = _regex(r"""[\s.)\]:,]*(?:
    \b(?:is|are|was|were)(?:n['’]t|\s+(?:all\s+|both\s+|clearly\s+)?
      (?:not|never|wrong|incorrect|false|ruled|eliminated|excluded|out))\b
    | \b(?:can|could)(?:not|n['’]t|\s+(?:not|be\s+(?:ruled|eliminated
      |excluded|discarded|rejected))\b)
    | (?:\b(?:is|are|was)|\b(?:seems?|looks?|appears?)(?:\s+to\s+be)?)\s+
      (?:\w+ly\s+|very\s+|quite\s+|less\s+)?(?:unlikely|improbable|implausible
      |doubtful|inaccurate|incorrect|wrong|false|hardly|(?<=less\ )likely
      |(?<=less\ )plausible)\b
    | (?:[-–—]\s*)?\b(?:incorrect|wrong|false)(?=\s*(?:[.,;!)\n]|$)|\s+(?:
      because|since|as)\b)
    | (?:项|項|选项)?\s*(?:是)?(?:错|錯|不对|不對|不正确|不正確|不是|不符))""")
# After: the option does not fit, "does not", so it is named and not meant.
UNFIT = _regex(r"""[\s.)\]:,]*\b(?:do|does|did|has|have|would|should|may|might)
    (?:n['’]t|\s+not)\b""")
# After: the line ends; or the clause or sentence does; or it was a question; or
# the option depends on a condition.
LAST = re.compile(r"[\s.!)\]…]*(?:\n|$)")
CLOSED = re.compile(r"\s*(?:[.!,;:]|$|\n)")
ASKED = re.compile(r"[^.!?\n]*\?")
ONLY_IF = _regex(r"\W*\b(?:only\s+)?(?:if|unless)\b")
# After: since "A", "I", lower case and digits are words, too, they are symbols
# only before these: "A because", not "A man"; and "A - a man", not "A-frame".
_JOINS = rf"""(?:{
  _words(
    "because since as for which is was and or but due given seems looks would"
    " appears must should here i_think i_guess i_believe i_would"
  )
})\b"""
ENDS = _regex(rf"\s*(?:[.,:;!?)\]/&\n…→⇒<>=+]|[-–—]\s|$)|\s+{_JOINS}")
# After a letter that opens the answer without a mark: "B The car drives", but
# not "C major".
GOES_ON = re.compile(
  rf"""\s+(?:{_JOINS}|(?:{
    _words(
      "shows matches fits describes best better rather instead over not"
      " obviously probably definitely clearly certainly surely likely The An?"
      " It Its This That There In At On He She His Her They We Because Since As"
      " When Based Explanation Reason"
    )
  })\b)
  | \s*[^\s\w] | \s*(?:\n|$) | \s*[^\x00-\x7f] | \s+[A-Z](?!\w)""",
  re.VERBOSE,
)

# Between two options: they are in one list; or the one belongs to the other, as
# in "A. B" and "A -> B".
LIST = _regex(
  rf"""[ ]?[)\]]?\s*
    (?:[,/&+]|\b(?:and|or|nor|as\s+well\s+as|plus)\b|和|或者?|与|與|及)+\s*
    (?:(?:and|or|nor|maybe|perhaps|possibly|also|even)\s+)*(?:the\s+)?
    (?:{NOUN}\s+)?[(\[]?\s* | [)\]]?[ ]*[(\[]?"""
)
NEXT = re.compile(r"[ .):;(\]\[…→⇒>–—-]*")

# What was said before is withdrawn; after those that are not in the group
# "hard" only if another answer follows.
CORRECTION = _regex(r"""(?P<hard>
    \bwait(?=\s*[,.!?…—:-]|\s+(?:no|a\s|i\b|let)|\s*$) | \bscratch\s+that
    | \bhold\s+on(?=\s*[,.!…—-]) | \bon\s+second\s+thou?ght
    | \bcorrection\s*[:,—-]
    | \blet\s+me\s+(?:re-?\s?\w+|correct|think|check)
    | \bi\s+(?:made\s+a\s+mistake|was\s+wrong|misread|take\s+(?:that|it)\s+back)
    | 等等|等一下|不对，|更正)
  | \bactually\s*[,:] | \bsorry\s*[,.:] | \bmy\s+mistake | \bi\s+meant?\b\s*,?
  | \boops\b | \bedit\s*:""")
