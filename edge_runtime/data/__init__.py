"""A device's rows: read, tokenised, batched."""
