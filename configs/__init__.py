"""Configurations of training runs, read by --config=FILE.py:ARGUMENT."""
