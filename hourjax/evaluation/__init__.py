"""Answers, scores and the report."""
