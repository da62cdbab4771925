"""The process that trains: its jobs, its start under a memory limit, its main function."""
