"""Measurements of speed and memory; `hourjax.bench` runs them."""
