"""Measurements of the coordinator under load."""
