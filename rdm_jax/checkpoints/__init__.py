"""Checkpoints on disk: saved, verified and found."""
