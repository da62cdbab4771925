"""Benches of memory and time."""
