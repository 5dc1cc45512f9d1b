"""The feature store: arrays and index files in a folder or a bucket."""
