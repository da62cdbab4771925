"""The estimator bench."""
