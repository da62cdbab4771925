"""What monitoring systems read: metrics, readiness, log lines, traces."""
