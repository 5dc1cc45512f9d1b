"""Attention, behind one call: `hourjax.kernels.attention`."""

from hourjax.kernels.attention import SAVED as SAVED
from hourjax.kernels.attention import attention as attention
from hourjax.kernels.sharded import Sharding as Sharding
