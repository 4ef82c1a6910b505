"""The training of one stage: the pure step, the loop around it, and its metrics."""
