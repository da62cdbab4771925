"""What a simulation leaves to look at: progress, tables, curves, pages."""
