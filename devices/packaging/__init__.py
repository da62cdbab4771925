"""What a device installs."""
