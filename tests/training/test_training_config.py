"""A configuration's values: what can be meant, and what is refused at once."""

import copy
import dataclasses
import json
import math

import pytest

from configs import demo, hourllava
from hourjax import command
from hourjax.errors import UserError
from hourjax.training import config as module
from hourjax.training.config import (
  LIMITS,
  build_experiment,
  rename_old_keys,
)
from hourjax.training.workdir import (
  check_workdir,
  config_diff,
  find_config,
  read_config,
)
from tests.training import runs

DEMO = demo.get_config("stage=3").to_dict()
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
    ("model.decoder.heads", 3, "kv_heads 2; the first must be a multiple"),
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


# Micro-batches of one row, two a step.
RUN = runs.changed(BUILT, steps=6, batch_rows=1, accumulate=2)


@pytest.mark.parametrize(
  "changes, refused",
  [
    ({"read__threads": 2, "metrics__tensorboard": False}, []),
    ({"keep_checkpoints": 5, "checkpoint_every": 1, "log_every": 3}, []),
    ({"mesh__data": -1, "mesh__fsdp": 1, "model__remat": "full"}, []),
    ({"on_save_error": "stop", "max_nonfinite": 2}, []),
    ({"batch_rows": 2, "accumulate": 1}, []),
    ({"batch_rows": 2}, ["batch_rows"]),
    ({"batch_rows": 4, "accumulate": 1}, ["accumulate", "batch_rows"]),
    ({"steps": 12}, ["steps"]),
    ({"loss": "tokens"}, ["loss"]),
    ({"batch_samples": 2, "accumulate": 1}, ["accumulate", "batch_samples"]),
    ({"seed": 1, "data__weights": "train=2"}, ["data.weights", "seed"]),
    ({"data__media": "elsewhere"}, []),
  ],
)
def test_what_may_change(changes, refused):
  old = json.loads(json.dumps(dataclasses.asdict(RUN)))
  new = dataclasses.asdict(runs.changed(RUN, **changes))
  assert list(config_diff(old, new)) == refused


@pytest.mark.parametrize(
  "changes, refused",
  [
    ({"batch_rows": 8}, []),
    ({"batch_samples": 8}, ["batch_samples"]),
    ({"drop_last": True}, ["drop_last"]),
    (
      {"batch_samples": 0, "accumulate": 4},
      ["accumulate", "batch_samples"],
    ),
  ],
)
def test_what_may_change_in_batches_of_samples(changes, refused):
  """Micro-batches of any size, as a step is the same samples."""
  run = runs.changed(RUN, accumulate=1, batch_rows=4, batch_samples=16)
  old = json.loads(json.dumps(dataclasses.asdict(run)))
  new = dataclasses.asdict(runs.changed(run, **changes))
  assert list(config_diff(old, new)) == refused


@pytest.mark.parametrize(
  "changes, said",
  [
    (
      {"batch_samples": 128, "accumulate": 3},
      r"accumulate is 3 and config\.batch_samples 128: .*accumulate=1, or",
    ),
    (
      {"batch_samples": 8, "batch_rows": 16},
      r"batch_rows is 16 and config\.batch_samples 8: .*set .*batch_rows=8",
    ),
    ({"drop_last": True}, r"drop_last is True and config\.batch_samples 0: "),
  ],
)
def test_a_step_is_either_samples_or_micro_batches(changes, said):
  with pytest.raises(UserError, match=said):
    runs.changed(BUILT, **changes)


@pytest.mark.parametrize(
  "argument, samples",
  [
    (f"size={size},stage={stage}", 256 if (size, stage) == ("7b", 3) else 128)
    for size in ("3b", "7b")
    for stage in (1, 2, 3)
  ],
)
def test_published_batches(argument, samples):
  """Appendix A of the paper; the official scripts drop the last batch."""
  made = build_experiment(hourllava.get_config(argument).to_dict())
  assert (made.batch_samples, made.drop_last) == (samples, True)
  assert (made.accumulate, made.step_rows) == (1, samples)


def test_keys_of_other_versions():
  """What was not there had its default; what is gone cannot be judged."""
  old = json.loads(json.dumps(dataclasses.asdict(RUN)))
  new = dataclasses.asdict(RUN)
  del old["max_length"], old["mesh"], old["rows"]["tiles"]
  assert config_diff(old, new) == {}
  assert config_diff({**old, "gone": 3}, new)["gone"] == ("3", "(not set)")


def test_a_run_without_a_choice_of_loss_goes_on_over_tokens():
  """Configurations ask for `samples`, which no older version had."""
  old = json.loads(json.dumps(dataclasses.asdict(RUN)))
  del old["loss"]
  assert build_experiment(old).row_spec.loss == "tokens"
  assert RUN.row_spec.loss == "samples"
  found = config_diff(old, dataclasses.asdict(RUN))
  assert found == {"loss": ('"tokens"', '"samples"')}


def test_keys_under_their_old_names(tmp_path):
  """A run of an older version goes on, and says nothing of them."""
  config = json.loads(json.dumps(dataclasses.asdict(RUN)))
  old = {**config, "watch": config["metrics"] | {"wandb": "hours"}}
  del old["metrics"]
  with pytest.raises(UserError, match=r"watch is now called config\.metrics"):
    build_experiment(old)
  renamed = rename_old_keys(old)
  assert renamed["metrics"]["wandb"] == "hours" and "watch" not in renamed
  assert build_experiment(renamed) == runs.changed(RUN, metrics__wandb="hours")
  assert rename_old_keys({**old, **config}) == config
  (tmp_path / "config.json").write_text(json.dumps(old))
  assert read_config(tmp_path) == find_config(tmp_path) == renamed
  check_workdir(RUN, tmp_path)


def test_an_old_name_on_a_command_line(monkeypatch):
  """The message names the key as it is called now."""
  arguments = [
    "train",
    "--config=configs/demo.py",
    "--config.watch.tensorboard=False",
  ]
  with pytest.raises(UserError, match=r"did you mean --config\.metrics\.tens"):
    command._check_config(arguments)


@pytest.mark.parametrize(
  "key, value",
  [
    ("seed", -1),
    ("steps", -5),
    ("max_length", 0),
    ("data.max_skipped", 1.5),
    ("data.share_memory", 0),
    ("data.single_image", "plan"),
    ("read.threads", 0),
    ("max_nonfinite", 0),
    ("on_save_error", "ignore"),
  ],
)
def test_values_out_of_range(key, value):
  config = demo.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=f"config.{key} is '?{value}"):
    build_experiment(config.to_dict())
