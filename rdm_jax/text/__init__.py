"""Encoders of text, whose outputs condition a network; they are used as published, not trained."""
