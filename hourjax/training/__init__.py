"""Loss, optimizer, step, checkpoints and the loop that joins them."""
