"""The model: its folder, checkpoint, head and attached slices."""
