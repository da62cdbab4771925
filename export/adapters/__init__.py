"""peft adapters, in and out, and merging into the base."""
