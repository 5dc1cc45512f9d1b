"""Which samples make a step, and which of them share a row."""
