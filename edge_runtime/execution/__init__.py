"""Running a package's programs: prepared weights, sweeps through the segments, caches between steps."""
