"""Published checkpoints in and out, by one table of names."""
