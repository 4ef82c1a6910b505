"""One stage trained: the pure step, the loop around it, its metrics and checkpoints."""
