"""The train step, its state, checkpoints, and the loop that joins them."""
