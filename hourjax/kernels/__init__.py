"""Attention, behind one call: `hourjax.kernels.attention`.

Beside it, attention to a cache of few new tokens, and who attends to what.

Tiles of the TPU kernels and what they reach: `hourjax.kernels.tpu`.
"""

from hourjax.kernels.attention import attention as attention
from hourjax.kernels.attention import key_attention as key_attention
from hourjax.kernels.cached import cached_attention as cached_attention
from hourjax.kernels.common import SAVED as SAVED
from hourjax.kernels.sharded import Sharding as Sharding
