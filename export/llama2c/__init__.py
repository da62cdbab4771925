"""llama2.c checkpoints as model folders."""
