"""A small synthetic data set: real videos, questions and a tokenizer.

`build.build` writes it, `hourjax.demo` is its command line.
"""
