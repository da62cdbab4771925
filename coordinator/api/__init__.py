"""HTTP: the application, its middleware, the device's and the operator's routes."""
