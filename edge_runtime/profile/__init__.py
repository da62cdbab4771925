"""The memory report: a plan's prediction beside what was measured, as page, text and JSON."""
