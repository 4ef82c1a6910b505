"""The quality of images: features, distances between sets of them, and reports."""
