"""The learning bench."""
