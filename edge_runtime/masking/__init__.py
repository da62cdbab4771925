"""Masks that cancel in a sum, so that whoever adds contributions up sees none of them: a device's side."""
