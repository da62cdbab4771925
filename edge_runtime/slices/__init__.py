"""Kinds of slices, a module each: what device and coordinator need to know of them."""
