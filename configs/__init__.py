"""Configs by name: `--config digits` is the file digits.py here. The wheel has them as
rdm_jax.configs."""
