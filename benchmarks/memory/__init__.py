"""Benches of memory and time: the runtime beside PyTorch, beside backpropagation, and beside its own predictions."""
