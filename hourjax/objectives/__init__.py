"""Preferences and rewards: what a training optimises beside plain answers."""
