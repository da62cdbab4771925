"""Memory: planned before a task, enforced by the kernel, metered while it runs."""
