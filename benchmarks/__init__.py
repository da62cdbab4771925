"""Each figure of the README: one command, one result file, one table."""
