"""The process, the machine and the user: errors, files, signals, devices. Nothing of diffusion."""
