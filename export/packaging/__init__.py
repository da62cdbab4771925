"""Writing a package: programs, weights, tokenizer, self-check, manifest."""
