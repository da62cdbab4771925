"""Training on the device: tangents, estimators of the gradient, optimisers, and replay of reported scalars."""
