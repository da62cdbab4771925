"""From results to new slices: means and server optimisers."""
