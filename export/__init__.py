"""From a Hugging Face model folder to a package a device can train: runs on a workstation, with torch."""
