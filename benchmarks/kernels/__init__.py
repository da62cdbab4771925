"""Benches of single products and of where weights lie."""
