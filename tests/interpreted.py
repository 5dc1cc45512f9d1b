"""The TPU kernels without a TPU: in interpret mode, with small tiles."""

import functools

from jax.experimental.pallas import tpu as pltpu

from hourjax.kernels import attention as module
from hourjax.kernels.tpu import call as tpu
from hourjax.kernels.tpu.tiles import AttentionTiles, Tiles

# Several tiles, chunks and units even for a few hundred keys.
_TILES = Tiles(rows=128, keys=256, chunk=128, unit=128)
TILES = AttentionTiles(_TILES, _TILES, 1 << 30)
# Finds races, reads out of bounds and (memory begins as NaN) outputs that are
# never written.
PARAMS = pltpu.InterpretParams(detect_races=True)


def use_tpu_kernels(monkeypatch) -> None:
  """Lets `kernels.attention` compute with the interpreted TPU kernels."""

  def backend(name, causal, tiles):
    del name, tiles
    how = {"causal": causal, "tiles": TILES, "interpret": PARAMS}
    return module.Backend(
      functools.partial(tpu.forward, **how),
      functools.partial(tpu.backward, **how),
    )

  monkeypatch.setattr(module, "backend", backend)
