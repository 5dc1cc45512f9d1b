import jax
import jax.numpy as jnp
import pytest

from hourjax.errors import UserError
from hourjax.training.config import parse_steps
from hourjax.training.trackers import Profiler


@pytest.mark.parametrize(
  "text", ["5", "5:5", "6:5", "0:3", "-1:3", "a:b", "1:"]
)
def test_not_a_range(text):
  with pytest.raises(UserError) as error:
    parse_steps(text)
  assert f"config.metrics.profile_steps is {text!r}; write a:b" in str(
    error.value
  )


def test_a_range():
  assert list(parse_steps("10:13")) == [10, 11, 12]
  assert not parse_steps("")


def _run(profiler, steps):
  double = jax.jit(lambda x: x @ x)
  x = jnp.ones((64, 64))
  took = {}
  for step in steps:
    took[step] = profiler.begin_step(step)
    x = double(x)
  return took


def _traces(workdir):
  return list((workdir / "profile").rglob("*.xplane.pb"))


def test_a_trace_of_three_steps(tmp_path, capsys):
  profiler = Profiler(tmp_path, range(2, 5))
  took = _run(profiler, range(1, 5))
  assert not _traces(tmp_path)
  took |= _run(profiler, range(5, 8))
  assert [step for step, seconds in took.items() if seconds] == [2, 5]
  profiler.close()
  # Where TensorBoard looks for traces.
  (trace,) = _traces(tmp_path)
  assert trace.parents[1] == tmp_path / "profile" / "plugins" / "profile"
  content = trace.read_bytes()
  assert b"/host:CPU" in content and b"step_num" in content
  found = jax.profiler.ProfileData.from_serialized_xspace(content)
  steps = [
    dict(event.stats)["step_num"]
    for plane in found.planes
    for line in plane.lines
    for event in line.events
    if event.name == "train"
  ]
  assert steps == [2, 3, 4]
  assert f"wrote a trace into {tmp_path / 'profile'}" in capsys.readouterr().err


@pytest.mark.parametrize("due", [1, 2])
def test_begin_and_end_wait_for_the_devices(tmp_path, due):
  """Else a trace has a part of the step before, and lacks one of its last."""
  profiler = Profiler(tmp_path, range(1, 2))
  for step in range(due):
    profiler.begin_step(step)
  x = jnp.full((600, 600), 1e-3)
  slow = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: y @ x, x))
  compiled = slow.lower(x).compile()
  y = compiled(x)
  assert not y.is_ready()
  profiler.begin_step(due)
  assert y.is_ready()
  profiler.close()


def test_a_run_that_ends_within_the_range(tmp_path):
  profiler = Profiler(tmp_path, range(2, 100))
  _run(profiler, range(1, 4))
  profiler.close()
  assert len(_traces(tmp_path)) == 1
  profiler.close()


def test_a_trace_of_somebody_else(tmp_path, capsys):
  jax.profiler.start_trace(tmp_path / "other")
  try:
    profiler = Profiler(tmp_path, range(1, 3))
    _run(profiler, range(1, 5))
    profiler.close()
  finally:
    jax.profiler.stop_trace()
  assert capsys.readouterr().err.count("no trace of these steps") == 1
  assert not _traces(tmp_path)
