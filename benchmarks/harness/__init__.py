"""What the benches share: subjects' shapes and rows, measured processes, result files, tables."""
