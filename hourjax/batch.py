"""The contract between data and model: one NamedTuple of arrays.

Rows (B) have fixed capacities: X stored feature tokens, I_f video frames and
I_t image tiles as pixels, R blended tokens, S memory tokens, T queries and L
decoder positions. A row holds several samples, which segment ids distinguish;
0 is padding. Visual tokens are numbered in the order

    [features (X) | pooled frames (I_f x Q) | tiles (I_t x P) | blends (R)]

and the memory, the queries and the decoder's input are gathered from them with
static shapes.
"""

from typing import Any, NamedTuple

Array = Any  # numpy on the host, jax on the device


class Batch(NamedTuple):
  """Holds B rows.

  Integers are int32. A query or decoder position comes from a word or by an
  index from other tokens; that of its token and source that does not apply is
  -1.

  Attributes:
    features: bfloat16 or float32 [B, X, V], tower features pooled per frame.
    frames: uint8, or float in [-1, 1], [B, I_f, h, w, 3]; the model encodes
      them and pools each to Q tokens.
    frame_trains: [B, I_f] 1 where the tower learns from a frame, 0 in videos
      of more than TOWER_FRAMES (paper, appendix A).
    tiles: as frames, [B, I_t, h, w, 3]; the model encodes them to P tokens.
    blend_source: [B, R, 4] visual tokens mixed into one (scaled-down images).
    blend_weight: float32 [B, R, 4].
    memory_source: [B, S] visual token of each memory token; -1 is newline.
    memory_position: [B, S] for RoPE.
    memory_segment: [B, S]; also 0 where no query may attend to a token.
    query_token: [B, T] word id, or -1 where the query is a memory token.
    query_source: [B, T] index into the memory.
    query_position: [B, T] for RoPE.
    query_segment: [B, T] queries of one segment attend to one another.
    query_reads: [B, T] the memory segment that the query reads. Several
      samples may read one memory.
    decoder_token: [B, L] word id, or -1 where it is an output of MemAug.
    decoder_source: [B, L] index into the queries.
    decoder_position: [B, L] 0, 1, 2, ... in each sample.
    decoder_segment: [B, L].
    target: [B, L] the label of the next position, -100 where there is none.
    target_weight: float32 [B, L], weight of each label in the loss; 0 where
      there is no label.
  """

  features: Array
  frames: Array
  frame_trains: Array
  tiles: Array
  blend_source: Array
  blend_weight: Array
  memory_source: Array
  memory_position: Array
  memory_segment: Array
  query_token: Array
  query_source: Array
  query_position: Array
  query_segment: Array
  query_reads: Array
  decoder_token: Array
  decoder_source: Array
  decoder_position: Array
  decoder_segment: Array
  target: Array
  target_weight: Array


IGNORE = -100
TOWER_FRAMES = 128  # frames of the longest video whose pixels train the tower
