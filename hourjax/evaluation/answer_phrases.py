"""What models wrap an answer in: thinking, containers, Markdown, LaTeX, JSON.

"<think>A or B?</think>So \\boxed{\\text{B}}."  -> spoken "So \\boxed{...}."
                                            -> contained ["\\text{B}"]
                                            -> clean "B"
"""
# MERGED hourjax.evaluation.phrases:
# Phrases around an option's name that tell how it is meant.
#
# Patterns of what stands before end at the name, those of what follows start
# there. Matched without regard to case, on text that `markup.clean` has made.

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


def _regex(pattern: str) -> re.Pattern:
  return re.compile(pattern, re.IGNORECASE | re.VERBOSE)


def _words(words: str) -> str:
  """Alternatives, without spaces, as some patterns are not verbose."""
  return "|".join(words.split()).replace("_", r"\s+")


# "answer", "option" and what models of other tongues write for them.
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
_ITS_NAME = rf"\s*:?\s*(?:{_ADJECTIVE})*(?:{NOUN}\s*:?\s*)?[(\[]?\s*$"

# Before: it is called the answer.
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
# Before, in addition: as the last word on it.
FINAL = _regex(r"""(?:\bfinal\s+(?:answer|choice|option|decision)
    |\bin\s+conclusion\b|最终答案|最終答案)[^.\n]{0,24}$""")
# Before: it may be.
MAYBE = _regex(
  rf"(?:\b(?:could|might|may|can)\s+(?:well\s+|also\s+)?be{_SURELY}"
  rf"|\b(?:maybe|perhaps|possibly)\b,?){_ITS_NAME}"
)
# Before: "option", so that the name is no word: "Caption A shows it". After
# "caption: " it may be: "caption: A man".
LABEL = _regex(rf"{NOUN}\s+$")
# Before: "option", "(". "He wears the letter" B is about something else.
NAMED = _regex(
  rf"(?:{NOUN.replace('letter|', '')}|(?:^|[.,:!?\n]\s*)(?:the\s+)?letter)"
  r"\s*:?\s*[(\[]?\s*$"
)
# Before: it is denied. Some words may stand between: "do not think it is".
NOT = _regex(rf"""(?:
    (?:\b(?:not|never|cannot)|n['’]t)\s+
      (?:(?!(?:but|so|because|since|although|though)\b)\w+\s+){{0,3}}
    | \b(?:neither|nor|than|except|unlike|without|instead\s+of|excluding
      |eliminat\w+|exclud\w+|reject\w*|rul\w+\s+out|dismiss\w*|discard\w*)\s+
    | 不(?:应|應|该|該|会|能|可能)*(?:是|为|选|選|选择|選擇) | 并非 | 排除
  )\s*(?:the\s+)?(?:{NOUN}\s*:?\s*)?[(\[]?\s*$""")
# Before, in the same clause: it is doubted, asked, or what others or the past
# would say; or it is only being looked at.
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
# Before: it starts a clause, or the clause says nothing else: "So it must be".
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
# Before: "e.g. b" and "Dr. B" are no clauses.
ABBREVIATED = _regex(r"\b(?:mrs?|ms|dr|st|prof|vs|cf|e\.g|i\.e|fig)\.\s*$")
# Before: a condition, unless it is only the wish to answer.
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

# After: it is called the answer.
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
# After: it is denied.
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
# After: it is ruled out, as far as it goes; named, but not meant.
UNFIT = _regex(r"""[\s.)\]:,]*\b(?:do|does|did|has|have|would|should|may|might)
    (?:n['’]t|\s+not)\b""")
# After: the line ends; it was asked; it depends.
LAST = re.compile(r"[\s.!)\]…]*(?:\n|$)")
CLOSED = re.compile(r"\s*(?:[.!,;:]|$|\n)")  # the sentence or clause, too
ASKED = re.compile(r"[^.!?\n]*\?")
ONLY_IF = _regex(r"\W*\b(?:only\s+)?(?:if|unless)\b")
# After: "A", "I", lower case and digits are words, too. Only before these they
# are symbols: "A because", not "A man"; and "A - a man", not "A-frame".
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

# Between two names: they are listed; or the one is not said without the other,
# as in "A. B" and "A -> B".
LIST = _regex(
  rf"""[ ]?[)\]]?\s*
    (?:[,/&+]|\b(?:and|or|nor|as\s+well\s+as|plus)\b|和|或者?|与|與|及)+\s*
    (?:(?:and|or|nor|maybe|perhaps|possibly|also|even)\s+)*(?:the\s+)?
    (?:{NOUN}\s+)?[(\[]?\s* | [)\]]?[ ]*[(\[]?"""
)
NEXT = re.compile(r"[ .):;(\]\[…→⇒>–—-]*")

# What was said before is taken back; after the soft ones only if another
# answer follows.
CORRECTION = _regex(r"""(?P<hard>
    \bwait(?=\s*[,.!?…—:-]|\s+(?:no|a\s|i\b|let)|\s*$) | \bscratch\s+that
    | \bhold\s+on(?=\s*[,.!…—-]) | \bon\s+second\s+thou?ght
    | \bcorrection\s*[:,—-]
    | \blet\s+me\s+(?:re-?\s?\w+|correct|think|check)
    | \bi\s+(?:made\s+a\s+mistake|was\s+wrong|misread|take\s+(?:that|it)\s+back)
    | 等等|等一下|不对，|更正)
  | \bactually\s*[,:] | \bsorry\s*[,.:] | \bmy\s+mistake | \bi\s+meant?\b\s*,?
  | \boops\b | \bedit\s*:""")
