"""The update on the device: tangents, estimators of the gradient, optimisers, replay of reported scalars."""
