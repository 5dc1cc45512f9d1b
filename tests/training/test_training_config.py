"""A configuration's values: what can be meant, and what is refused at once."""

import copy
import math

import pytest

from configs import demo, hourllava
from hourjax.errors import UserError
from hourjax.training import config as module
from hourjax.training.config import LIMITS, build_experiment

DEMO = demo.get_config("stage=1").to_dict()
BUILT = build_experiment(DEMO)
VALUES = dict(module._flat(BUILT))
NUMBERS = [k for k, v in VALUES.items() if type(v) in (int, float)]
ODD = (
  *(None, True, -1, -(10**30), 2**31, 2**63, 10**400, 1.5, math.nan, math.inf),
  *(-math.inf, "x", "1", [], {}, [1]),
)


def _with(key, value):
  config = copy.deepcopy(DEMO)
  *path, last = key.split(".")
  holder = config
  for name in path:
    holder = holder[name]
  holder[last] = value
  return config


def test_every_number_has_limits():
  assert sorted(NUMBERS) == sorted(LIMITS)


@pytest.mark.parametrize(
  "argument", [f"size={s},stage={n}" for s in ("3b", "7b") for n in (1, 2, 3)]
)
def test_published_configurations_are_within_them(argument):
  build_experiment(hourllava.get_config(argument).to_dict())


@pytest.mark.parametrize("key", NUMBERS)
def test_beyond_the_limits(key):
  low, high = LIMITS[key]
  for value in (low - 1, high * 2 + 1, 2**63, -(2**63)):
    with pytest.raises(UserError, match=rf"config\.{key} is "):
      build_experiment(_with(key, type(VALUES[key])(value)))


@pytest.mark.parametrize("key", [*VALUES, "model", "model.vision", "rows"])
def test_any_value_is_taken_or_refused_by_name(key):
  """Never another exception, and never a value of another type."""
  for value in ODD:
    try:
      made = build_experiment(_with(key, value))
    except UserError as error:
      assert (
        f"config.{key}" in str(error)
        or "model" in key
        or ("config.steps" in str(error))
      ), error
      continue
    if key in VALUES:
      assert type(dict(module._flat(made))[key]) is type(VALUES[key])


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    ("batch_rows", 2**31, "is 2147483648; it must be at least 1 and at most"),
    ("accumulate", 2**63, "is 9223372036854775808; it must be at least 1 and"),
    ("accumulate", 2.0, "is 2.0; it must be an integer"),
    ("log_every", True, "is True; it must be an integer"),
    ("steps", "100", "is '100'; it must be an integer"),
    ("epochs", math.nan, "is nan; it must be a number"),
    ("optimizer.decoder", -1e-5, "is -1e-05; it must be at least 0 and"),
    ("optimizer.b2", 1.0, "is 1.0; it must be at least 0 and at most 0.99"),
    ("optimizer.warmup", 1.5, "is 1.5; it must be at least 0 and at most 1"),
    ("metrics.tensorboard", 1, "is 1; it must be True or False"),
    ("init", None, "is None; it must be text"),
    ("model.remat", "all", "is 'all'; choose none, dots or full"),
    ("model.dtype", "int8", "is 'int8'; choose float32, bfloat16 or float16"),
    ("model.decoder.heads", 3, "heads 3; the first must be a multiple"),
    ("data", 5, "is 5; it must be a group of keys"),
  ],
)
def test_what_is_said(key, value, said):
  with pytest.raises(UserError) as raised:
    build_experiment(_with(key, value))
  assert said in str(raised.value) and f"config.{key}" in str(raised.value)


def test_an_integer_is_a_number():
  made = build_experiment(_with("epochs", 2))
  assert made.epochs == 2 and type(made.epochs) is float
