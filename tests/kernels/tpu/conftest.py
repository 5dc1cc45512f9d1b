"""Every interpreted kernel of these tests is checked for races."""

import pytest
from jax._src.pallas.mosaic.interpret import (
  interpret_pallas_call as interpreter,
)
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture(autouse=True)
def no_races(monkeypatch):
  """The interpreter keeps only the last call's races: this keeps all."""
  calls = []

  def recorded(*args, **kwargs):
    calls.append(real(*args, **kwargs))
    return calls[-1]

  real = interpreter.RaceDetectionState
  monkeypatch.setattr(interpreter, "RaceDetectionState", recorded)
  yield calls
  # A call that failed leaves its memory behind, which would fail the next.
  pltpu.reset_tpu_interpret_mode_state()
  assert not any(call.races_found for call in calls)
