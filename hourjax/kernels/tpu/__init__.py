"""MemAug attention as Pallas TPU kernels."""

from hourjax.kernels.tpu.call import backward as backward
from hourjax.kernels.tpu.call import forward as forward
