"""Using what was learned: a worker that answers, its commands, and its HTTP server."""
