"""Attention as Pallas TPU kernels, forward and backward.

Half of all arithmetic of training on hour-long video is here: 9,728 queries
of 16 heads against 235,520 memory tokens. What makes it fast:

- the heads of a KV group share a tile, so a key is read once for all;
- scores are [keys, rows]: weights are the stationary operand of the matmuls
  that contract over them, which fill also a 256-wide matrix unit at head
  dim 128 (the usual order leaves it half empty: at most 50 % of peak);
- the maximum of a row is taken once and checked at the end (`forward.py`);
- the next unit's scores are computed while this one is exponentiated;
- only tiles that share a segment meet (`block_schedule.py`), and rows of
  other segments are masked by row, which costs nothing;
- causal attention skips what lies above the diagonal, and masks only the
  chunks that it crosses (`masks.py`);
- the backward is one sweep of five matmuls, dq held in VMEM (`backward.py`).

The block schedule lies in scalar memory, which holds 130,000 blocks: three
questions about an hour on one chip of v5e, not about two hours. A longer call
is cut into parts, each with a schedule of its own (`call.py`), and compiled
once for all. So is a day (12,288 queries, 6,291,456 keys; 3B, v5e): 7 parts
forward, 6 backward. HBM alone is the limit: 12.2 GiB with all keys and values
forward, 14.4 with their gradients.

Tiles (`hourjax/parallel/chips.py`) and what the compiler's schedule makes of
them, 3B, bf16, an hour of memory, as printed by
`python -m hourjax.bench attention --topology=v5e:2x4 --json`:

  chip    kernel    rows  keys  chunk  unit  share of peak  block   splash
  v5e     forward   1024  1024    512   512    100 % (mxu)   94 %     82 %
          backward  1024  1024    512   512    100 % (mxu)   97 %     71 %
  v5p     forward   1024  1024    512   512    100 % (mxu)   93 %     81 %
          backward  1024  1024    512   512    100 % (mxu)   96 %     71 %
  v6e     forward   2048  2048    512   512     61 %         59 %     31 %
          backward  2048  1024    256   512     63 %         60 %     32 %
  tpu7x   forward   2048  2048    512   512     66 %         63 %     30 %
          backward  2048  1024    256   512     71 % (mxu)   67 %     31 %

Share of peak is the arithmetic of the hot region over its cycles (one bundle of
the final schedule is a cycle) at the core's bf16 rate; never more than what the
matrix unit can stream, which limits where it says mxu. Block counts also the
code around the region. Neither knows of stalls or of waiting for HBM, and both
believe the compiler that weights are pushed into the unit beside a running
product, of which these kernels make more use than others: no TPU was at hand,
and a schedule read so is optimistic by some 10 to 25 %.

What causal calls reach is in `hourjax/benchmarks/README.md`.

Splash is jax's splash attention at the same shape, read the same way, its
backward not fused (fused it reaches 100, 100, 45 and 48 % and holds 9.5 GiB of
partial dq). 7B (7 heads a group) on v6e: 58 and 56 %. Temporaries in HBM are
0.3 GiB, for 7B 0.6 GiB: operands turned into tiles; XLA's own attention asks
for 139 GiB.
"""
