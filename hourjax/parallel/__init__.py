"""The mesh, axis rules, the table of TPU chips, and what crosses devices."""
