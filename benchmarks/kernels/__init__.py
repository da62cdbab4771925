"""Benches of the arithmetics of frozen products, and of where their weights lie."""
