"""What installs on devices: profiles, units, pinned packages."""
