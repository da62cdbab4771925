"""Each figure of README and docs/results: one command, one result file, one table."""
