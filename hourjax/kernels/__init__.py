"""Attention: the public call, its reference and its TPU and GPU kernels."""
