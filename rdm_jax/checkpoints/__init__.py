"""Checkpoints on disk: saved, checked and found."""
