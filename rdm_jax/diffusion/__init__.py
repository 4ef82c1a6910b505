"""The mathematics of relay diffusion: pure functions of arrays, without networks, files or
globals."""
