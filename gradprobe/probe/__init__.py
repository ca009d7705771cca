"""What the probe script does, as a library."""
