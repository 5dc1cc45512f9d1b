"""Attention, behind one call: `hourjax.kernels.attention`."""

from hourjax.kernels.attention import attention as attention
