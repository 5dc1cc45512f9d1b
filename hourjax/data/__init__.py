"""Records to batches: numpy only, no jax."""
