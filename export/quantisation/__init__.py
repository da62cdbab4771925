"""Frozen weights in few bits, on tensors and in graphs."""
