"""The estimator bench: how near gradient estimates come to the exact gradient."""
