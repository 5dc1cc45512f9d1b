"""The step compiled for chips that are not there, and its program read."""
