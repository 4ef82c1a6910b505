"""What the environment's variables tell jax and XLA, which end the process, or raise, where they do
not understand it."""

import contextlib
import os
import re
import sys
import tempfile
import traceback
import warnings

from rdm_jax.runtime.errors import InputError

NO_BACKEND = "Unable to initialize backend"  # in jax's words


def check_or_exit() -> None:
    """Imports jax. Where the environment does not let it work, one line says why, and the process
    ends with status 2."""
    try:
        import_jax()
        _check_xla_flags()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def import_jax() -> None:
    """Imports jax, which reads JAX_... of the environment. Raises InputError where it cannot."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        said = str(error)
        named = [
            f"{name}={os.environ[name]!r}"
            for name in os.environ
            if name.startswith("JAX_") and name.lower() in said.lower()
        ]
        what = ", ".join(named) or "a variable JAX_... of the environment"
        raise InputError(
            f"{what} cannot be used ({said}); another value, or unsetting it, would do."
        ) from error


def quiet_libtpu() -> None:
    """Keeps libtpu from logging that this machine has no TPU, where it has none.

    JAX looks for TPUs wherever libtpu is installed. It sets TPU_SKIP_MDS_QUERY where it finds no
    chips; libtpu then logs six lines about two variables that are not set.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def backend_error(error: BaseException) -> InputError | None:
    """What to tell the user where jax finds no devices of the platform that was asked for; None for
    any other error."""
    frames = traceback.extract_tb(error.__traceback__)
    asserted = (
        isinstance(error, AssertionError) and frames and frames[-1].name == "backends"
    )  # none of its platforms is here
    if not asserted and not (isinstance(error, RuntimeError) and str(error).startswith(NO_BACKEND)):
        return None
    said = (
        "there is no such device"
        if asserted
        else re.split(r" \((?:set JAX_PLATFORMS|you may need)", str(error))[0]
    )
    asked = os.environ.get("JAX_PLATFORMS", "")
    if not asked:
        return InputError(
            f"the accelerator cannot be used ({said}); ending what else uses it, or JAX_PLATFORMS=cpu, would do."
        )
    return InputError(
        f"JAX_PLATFORMS={asked!r} cannot be used ({said}); JAX_PLATFORMS=cpu, or unsetting it, would do."
    )


def _check_xla_flags() -> None:
    """Raises InputError where XLA would end the process: in its words, which a child process is
    told."""
    given = os.environ.get("XLA_FLAGS", "")
    if not given.strip():
        return
    with tempfile.TemporaryFile() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are threads, which the child has no use for
        child = os.fork()
        if not child:
            _let_xla_read_its_flags(said.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if status:
        why = next(
            (line for line in lines if "XLA_FLAGS" in line or "ouldn't" in line),
            lines[0] if lines else "no reason given",
        )
        why = why.partition("] ")[2] or why
        would_do = (
            "flags that this version of XLA knows (those of TPUs belong into LIBTPU_INIT_ARGS)"
        )
        raise InputError(f"XLA_FLAGS={given!r} cannot be used ({why}); {would_do} would do.")


def _let_xla_read_its_flags(stderr: int) -> None:
    """In a child process, which it ends."""
    with contextlib.suppress(Exception):  # where jaxlib has it no more, nothing is found out
        os.dup2(stderr, 2)
        from jaxlib import _jax

        _jax.CompileOptions()  # has XLA's flags in it
    os._exit(0)
