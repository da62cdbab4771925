"""The memory report: what a device's plan predicts beside what was measured, as page, text and JSON."""
