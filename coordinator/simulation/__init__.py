"""Simulated fleets: the coordinator's own rounds, and devices that live in this process, under a virtual clock."""
