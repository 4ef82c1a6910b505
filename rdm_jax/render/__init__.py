"""Tables and images for people."""
