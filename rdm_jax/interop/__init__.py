"""Safe reading of the published PyTorch files, without torch and without running anything in
them."""
