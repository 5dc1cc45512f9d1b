"""Asking a model: encode a memory, read prompts, decode answers."""
