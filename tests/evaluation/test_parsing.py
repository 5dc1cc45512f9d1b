import json
import pathlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hourjax.evaluation.parsing import LETTERS, normalise, parse
from hourjax.evaluation.questions import Question

OPTIONS = ("a blue hat", "Red", "running fast", "two dogs")


def _choice(options=OPTIONS):
  return Question("1", "v.mp4", "Which?", "A", "choice", tuple(options))


CHOICES = {
  # A letter, however it is written.
  "B": "B",
  "b": "B",
  "B.": "B",
  "b.": "B",
  "(B)": "B",
  "(b)": "B",
  "[B]": "B",
  "(B": "B",
  "B)": "B",
  " B \n": "B",
  "**B**": "B",
  "`B`": "B",
  '"B"': "B",
  "\\boxed{B}": "B",
  "<answer>B</answer>": "B",
  "Ｂ": "B",
  "（Ｂ）": "B",
  "B B": "B",
  "B, B": "B",
  "A": "A",
  "a": "A",
  "a)": "A",
  # A letter with its option, or with another text.
  "B: red": "B",
  "B. red": "B",
  "B red": "B",
  "(B) red": "B",
  "B) Red": "B",
  "B - red": "B",
  "b. red": "B",
  "B, because of the dog": "B",
  "B because it is": "B",
  "A because it is": "A",
  "A. a man walks": "A",
  "A: a blue hat": "A",
  "B. 5": "B",
  "B\nA man is shown.": "B",
  "B\n\nExplanation: the man of (A) waves.": "B",
  # A letter that is stated to be the answer.
  "The answer is B": "B",
  "The answer is b.": "B",
  "The best answer is:\nB": "B",
  "The correct answer is (B).": "B",
  "Answer: (C).": "C",
  "Answer:C": "C",
  "Answer B": "B",
  "answer = D": "D",
  "My answer is option D.": "D",
  "Best option: (B": "B",
  "The best option is D. Two dogs": "D",
  "The correct option is B because A is wrong": "B",
  "The correct option is B because (A) shows a cat": "B",
  "A is wrong, so the answer is B.": "B",
  "Option B": "B",
  "option b": "B",
  "Option B is correct": "B",
  "Option A shows it": "A",
  "Option A best describes the scene, whereas option B does not.": None,
  "Answer A matches better than answer B.": "A",
  "Answer: A man runs": None,
  "The description I saw fits": None,
  "B is the correct answer": "B",
  "(B) is right": "B",
  "I think B": "B",
  "I think it's B.": "B",
  "I would go with D": "D",
  "I choose (C)": "C",
  "The answer is most likely C": "C",
  "Based on the video, the answer would be C.": "C",
  "Based on the video: C.": "C",
  "It must be so, B": "B",
  "A. hat\nB. red\nC. fast\nAnswer: B": "B",
  # The option's text without a letter.
  "a blue hat": "A",
  "A blue hat": "A",
  "red": "B",
  "RED.": "B",
  "The answer is red.": "B",
  "The answer is a blue hat": "A",
  "It is red.": "B",
  "Two dogs.": "D",
  # A sentence that begins with a word that could be a letter.
  "A man in a hat walks by": None,
  "A man": None,
  "I see nothing": None,
  "I think it is late": None,
  "the answer is a man": None,
  "The answer is A man": None,
  "A-frame houses": None,
  "U.S. soldiers": None,
  "D'Artagnan": None,
  "Both dogs run.": None,
  "Vitamin C is good": None,
  # Nothing.
  "": None,
  "   \n": None,
  ".": None,
  "?!": None,
  "()": None,
  "Yes": None,
  "I don't know": None,
  "None of the above": None,
  "and": None,
  # Several letters.
  "A and B": None,
  "A or B": None,
  "A, B": None,
  "A/B": None,
  "A & B": None,
  "(A) or (B)": None,
  "(A), (B)": None,
  "(A) (B)": None,
  "A, B and C": None,
  "B A": None,
  "AB": None,
  "ABCD": None,
  "A\nB\nC\nD": None,
  "A. hat\nB. red\nC. fast\nD. dogs": None,
  "(A) hat (B) red": None,
  "The answer is A or B": None,
  "The answer is A and B": None,
  "The answer is A. The answer is B.": None,
  "Both A and B": None,
  "I cannot choose between A and B": None,
  "Option A or option B": None,
  # Letters that are ruled out.
  "B is wrong": None,
  "B is not right": None,
  "B isn't it": None,
  "not B": None,
  "The answer is not B": None,
  "The answer is not option B": None,
  "It is not option B.": None,
  "It isn't the option B": None,
  "Any option except option B": None,
  "It is not (B).": None,
  "It isn't (B).": None,
  "(A), not (B)": "A",
  "(B) is wrong, (A) is not": None,
  # Letters beyond the options.
  "E": None,
  "(E)": None,
  "E.": None,
  "The answer is E": None,
  "E. green": None,
  "Option Z": None,
  "5": None,
}


@pytest.mark.parametrize(("answer", "letter"), CHOICES.items())
def test_choice(answer, letter):
  assert parse(answer, _choice()) == letter


@pytest.mark.parametrize(
  ("answer", "options", "letter"),
  [
    # An option's text is no letter, a letter no option's text.
    ("5", ("3", "5", "7"), "B"),
    ("B. 5", ("3", "5", "7"), "B"),
    ("The answer is 5.", ("3", "5", "7"), "B"),
    ("x", ("x", "y"), "A"),
    ("A. y", ("x", "y"), "A"),
    ("(A) y", ("x", "y"), "A"),
    ("A", ("B", "A"), "A"),
    ("C major", ("C major", "D minor"), "A"),
    ("A man runs", ("A dog runs", "A man runs"), "B"),
    ("The answer is A man runs", ("A dog runs", "A man runs"), "B"),
    ("E. green", ("a", "b", "c", "d", "green"), "E"),
    # What is cleaned from an answer is cleaned from the options.
    ("$ 168", ("$ 167", "$ 168"), "B"),
    ("snake_case", ("snake_case", "camel"), "A"),
    ("The answer is 5 m².", ("4 m²", "5 m²"), "B"),
    # Options with the same text are one answer; their texts differ else.
    ("red", ("red", "red", "blue"), "A"),
    ("polish", ("Polish", "polish"), "B"),
    ("POLISH", ("Polish", "polish"), None),
    ("Red and blue", ("red", "blue"), None),
    ("red hat", ("red", "blue"), None),
  ],
)
def test_choice_among_other_options(answer, options, letter):
  assert parse(answer, _choice(options)) == letter


FOUR = ("A red ball.", "A blue car.", "A green tree.", "A yellow sun.")


ANSWERS = pathlib.Path(__file__).parent / "answers"


def _answers(kind):
  """Answers, options and letters of a file, which says how it is read."""
  options = FOUR
  for line in (
    (ANSWERS / f"{kind}.txt").read_text().rstrip("\n").split("\n")[3:]
  ):
    mark, _, rest = line.partition(" ")
    if mark == "=":
      options = tuple(json.loads(rest))
    else:
      yield rest.replace("⏎", "\n"), options, None if mark == "-" else mark


@pytest.mark.parametrize("kind", sorted(p.stem for p in ANSWERS.iterdir()))
def test_answers_as_models_give_them(kind):
  wrong = [
    (answer, found, letter)
    for answer, options, letter in _answers(kind)
    if (found := parse(answer, _choice(options))) != letter
  ]
  assert not wrong


# With {0} for a letter and {1} for its option's text.
FORMS = (
  "{0}", "{1}", "({0})", "{0}. {1}", "{0} {1}", "({0}) {1}", "{0}: {1}",
  "The answer is {0}.", "The best answer is {1}", "\\boxed{{{0}}}",
  "\\boxed{{\\text{{{0}. {1}}}}}", "<answer>{0}</answer>", "选{0}",
  '{{"answer": "{0}"}}', "**{0}**", "<think>A or B?</think>{0}", "It is {1}.",
  "答案是{0}。", "{0} because it is there", "Option {0} is correct", "So, {0}!",
)  # fmt: skip


@given(st.sampled_from(FORMS), st.permutations(FOUR), st.integers(0, 3))
def test_the_letter_moves_with_its_option(form, options, index):
  answer = form.format("ABCD"[index], options[index].rstrip("."))
  assert parse(answer, _choice(options)) == "ABCD"[index]


AROUND = (
  "", "Sure!", "I watched the whole video.", "Let me explain.", "Here we go:",
  "The man walks through a town.", "Based on the video,", "Thanks.",
)  # fmt: skip


@given(
  st.sampled_from(FORMS),
  st.sampled_from(AROUND),
  st.sampled_from([text for text in AROUND if text[-1:] in ("", ".", "!")]),
  st.sampled_from("ABCD"),
)
def test_words_that_name_no_option_change_nothing(form, before, after, letter):
  answer = form.format(letter, FOUR["ABCD".index(letter)].rstrip("."))
  answer = f"{before}\n{answer}\n{after}"
  assert parse(answer, _choice(FOUR)) == letter


@given(st.sampled_from(FORMS[:8]), st.sampled_from("ABCD"))
def test_thinking_without_an_end_is_no_answer(form, letter):
  answer = form.format(letter, FOUR["ABCD".index(letter)])
  for opened in ("<think>", "<thinking>\n", "◁think▷", "<|begin_of_thought|>"):
    assert parse(opened + answer, _choice(FOUR)) is None


def test_long_answers_take_no_longer_than_they_are():
  """No pattern tries all ways to split a long answer."""
  began = time.monotonic()
  for piece in (
    ",",
    "so, ",
    "(",
    "*a ",
    "\\boxed{",
    '{"a":',
    "~~",
    "- ",
    "<b>",
  ):
    parse(piece * 300 + "B", _choice(FOUR))
  assert time.monotonic() - began < 30


@pytest.mark.parametrize(
  ("answer", "said"),
  [
    ("Yes", "yes"),
    ("<think>No? Well.</think>Yes.", "yes"),
    ("<think>Yes", None),
    ("\\boxed{\\text{No}}", "no"),
    ('{"answer": "Yes", "reason": "There is no dog: no."}', "yes"),
    ("yes.", "yes"),
    ("**No**", "no"),
    ("no.", "no"),
    ("Yes, the man is running.", "yes"),
    ("No, he is not.", "no"),
    ("No dogs are shown", "no"),
    ("Yes, there is no dog.", "yes"),
    ("The answer is no", "no"),
    ("I think yes", "yes"),
    ("No because he sits", "no"),
    ("Yes and no", None),
    ("Not yes", None),
    ("Neither yes nor no", None),
    ("Yes or no", None),
    ("Yes. No.", None),
    ("No, wait: yes", None),
    ("There is no dog.", None),
    ("Not really", None),
    ("nobody", None),
    ("Yesterday", None),
    ("", None),
    ("The man is running.", None),
  ],
)
def test_yes_or_no(answer, said):
  question = Question("1", "v.mp4", "Is it?", "yes", "yes_no")
  assert parse(answer, question) == said


CAPTIONS = ("A man is dribbling.", "A man: he is dunking.")


@pytest.mark.parametrize(
  ("answer", "symbols", "number"),
  [
    ("Option 1", "12", "1"),
    ("Option 2: A man: he is dunking.", "12", "2"),
    ("option two", "12", "2"),
    ("The second option", "12", "2"),
    ("1", "12", "1"),
    ("(2)", "12", "2"),
    ("2.", "12", "2"),
    ("The best option is 2.", "12", "2"),
    ("Option 3", "12", None),
    ("1 and 2", "12", None),
    ("Option 1 or Option 2", "12", None),
    ("2 men are dribbling", "12", None),
    ("1.5", "12", None),
    ("A", "12", None),
    ("Sentence A", "AB", "1"),
    ("Sentence B: A man: he is dunking.", "AB", "2"),
    ("Caption B", "AB", "2"),
    ("B", "AB", "2"),
    ("b.", "AB", "2"),
    ("The better match is Sentence B.", "AB", "2"),
    ("The second caption", "AB", "2"),
    ("1", "AB", None),
    ("Sentence C", "AB", None),
    ("Caption A matches the video better.", "AB", "1"),
    ("Caption B matches the video better.", "AB", "2"),
    ("Caption A matches the video better than Caption B.", "AB", "1"),
    ("Caption B matches the video better than Caption A.", "AB", "2"),
    ("Option 1 matches the video better than Option 2.", "12", "1"),
    ("Option 2 matches the video better than Option 1.", "12", "2"),
    ("Sentence A better captures the essence", "AB", "1"),
    ("2 captions are given", "12", None),
    ("A man", "AB", None),
    ("Sentence A and Sentence B", "AB", None),
    ("A man is dribbling.", "12", "1"),
    ("a man: he is dunking", "AB", "2"),
    ("The answer is: A man is dribbling.", "AB", "1"),
    ("A woman is dribbling.", "AB", None),
    ("<think>Option 1?</think>Option 2", "12", "2"),
    ("\\boxed{2}", "12", "2"),
    ("Not option 1. Option 2.", "12", "2"),
    ("选项2", "12", "2"),
    ("I see 2 men.", "12", None),
    ("Option 1... no wait, option 2", "12", "2"),
    ("2. A man: he is dunking.", "12", "2"),
    ("Caption B: A man: he is dunking.", "AB", "2"),
    ("Neither Sentence A nor Sentence B", "AB", None),
    ("", "AB", None),
  ],
)
def test_captions(answer, symbols, number):
  extra = {"symbols": tuple(symbols)}
  question = Question("1", "v", "?", "1", "match", CAPTIONS, extra=extra)
  assert parse(answer, question) == number


def test_captions_are_numbered_where_nothing_is_said():
  question = Question("1", "v", "?", "1", "match", CAPTIONS)
  assert parse("Option 2", question) == "2"


@pytest.mark.parametrize(
  ("answer", "words"),
  [
    ("Red", "red"),
    ("  the  Red\nball. ", "the red ball"),
    ("**Red!**", "red"),
    ("red, white", "red, white"),
    ("<think>Blue? No.</think>\nRed.", "red"),
    ("<think>Blue", None),
    ("\\boxed{\\text{Red}}", "red"),
    ("<answer>Red</answer>", "red"),
    ("3.5 m", "3.5 m"),
    ("...", None),
    ("", None),
  ],
)
def test_words(answer, words):
  assert parse(answer, Question("1", "v", "?", "red", "open")) == words


@pytest.mark.parametrize(
  "words",
  ['A "red" ball', "It costs $5.", "The #1 car", "5 m²", "½ cup", "a_b {c} *"],
)
def test_right_words_are_right_whatever_letters_they_have(words):
  question = Question("1", "v", "?", words, "open")
  assert parse(words, question) == normalise(words) != ""


def test_words_compare_as_normalised():
  question = Question("1", "v", "?", "The  Red ball.", "open")
  said = parse("the red ball", question)
  assert said == normalise(question.expected)


_PIECES = st.sampled_from(
  [*"ABCDEabcd12", *"().,:/&\n'", " ", " and ", " or ", "The answer is ",
   "option ", " is wrong", "yes", "no", "red", "A man ", "Sentence ", "**"]
)  # fmt: skip
_ANSWERS = st.one_of(st.text(), st.lists(_PIECES).map("".join))


@given(_ANSWERS, st.lists(st.text(max_size=5), max_size=len(LETTERS)))
def test_a_letter_is_one_of_the_options(answer, options):
  found = parse(answer, _choice(options))
  assert found is None or found in LETTERS[: len(options)]


@given(
  _ANSWERS,
  st.lists(st.text(max_size=5), min_size=2, max_size=5),
  st.booleans(),
)
def test_a_number_is_one_of_the_captions(answer, captions, letters):
  extra = {"symbols": LETTERS[: len(captions)]} if letters else {}
  question = Question("1", "v", "?", "1", "match", tuple(captions), extra=extra)
  found = parse(answer, question)
  assert found is None or 1 <= int(found) <= len(captions)


@given(_ANSWERS)
def test_yes_no_and_words_never_fail(answer):
  question = Question("1", "v", "?", "yes", "yes_no")
  assert parse(answer, question) in (None, "yes", "no")
  words = parse(answer, Question("1", "v", "?", "red", "open"))
  assert words is None or words == normalise(words) != ""


@given(st.sampled_from(LETTERS[:4]), st.sampled_from(LETTERS[:4]))
def test_two_letters_are_no_answer(one, two):
  for answer in (f"{one} or {two}", f"({one}) and ({two})", f"{one}, {two}"):
    assert parse(answer, _choice()) == (one if one == two else None)
