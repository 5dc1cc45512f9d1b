"""Mesh, axis rules and what crosses devices."""
