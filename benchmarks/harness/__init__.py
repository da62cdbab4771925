"""What the benches share: options, model shapes, rows, measured processes, turns, result files and tables."""
