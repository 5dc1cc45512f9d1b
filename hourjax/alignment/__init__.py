"""Stage 0: frames and captions brought together by SigLIP's loss."""
