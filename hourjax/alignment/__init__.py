"""Stage 0: frames and captions brought together, before any training."""
