"""The feature store: arrays, index and ledgers in a folder or a bucket."""
