"""Attention, behind one call: `hourjax.kernels.attention`.

Tiles of the TPU kernels and what they reach: `hourjax.kernels.tpu`.
"""

from hourjax.kernels.attention import attention as attention
from hourjax.kernels.common import SAVED as SAVED
from hourjax.kernels.sharded import Sharding as Sharding
