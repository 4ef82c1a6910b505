"""The command `rdm-jax`."""

import runpy


def main() -> None:
    """Does what `python -m rdm_jax.main` does, with the same checks before jax is imported."""
    runpy.run_module("rdm_jax.main", run_name="__main__", alter_sys=True)
