"""Predictions on a device, beside an inference engine used directly."""
