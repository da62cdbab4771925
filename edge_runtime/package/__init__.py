"""The model package: manifest, files, slices, and the folder a device prepares from it."""
