"""Environment variables that JAX or XLA cannot use, which raise there or end the process."""

import contextlib
import os
import re
import sys
import tempfile
import traceback
import warnings

from rdm_jax.runtime.errors import InputError, reason

NO_BACKEND = "Unable to initialize backend"  # JAX's messages
NO_MEMORY = "RESOURCE_EXHAUSTED"


def check_or_exit() -> None:
    """Imports JAX; if the environment prevents it, prints one line and exits with status 2."""
    try:
        import_jax()
        _check_xla_flags()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def import_jax() -> None:
    """Imports JAX, which reads the variables JAX_... . Raises InputError if one is invalid."""
    try:
        import jax  # noqa: F401
    except ValueError as error:
        message = str(error)
        named = [
            f"{name}={os.environ[name]!r}"
            for name in os.environ
            if name.startswith("JAX_") and name.lower() in message.lower()
        ]
        what = ", ".join(named) or "an environment variable JAX_..."
        raise InputError(
            f"{what} cannot be used ({message})", "Set another value or unset it."
        ) from error


def quiet_libtpu() -> None:
    """Keeps libtpu from logging that this machine has no TPU, where it has none.

    JAX looks for TPUs wherever libtpu is installed. It sets TPU_SKIP_MDS_QUERY where it finds no
    chips; libtpu then logs six lines about two variables that are not set.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def backend_error(error: Exception) -> InputError | None:
    """Returns what to tell the user if JAX lacks the requested devices or memory, else None."""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY in str(error)
    ):
        return InputError(
            f"there is too little memory ({reason(error).rstrip('.')})",
            "Lower the batch size (stageN.training.batch_size or sampling.batch_size), or raise "
            "stageN.training.accumulate.",
        )
    if isinstance(error, RuntimeError) and str(error).startswith(NO_BACKEND):
        message = re.split(r" \((?:set JAX_PLATFORMS|you may need)", str(error))[0]
    elif _no_platform(error):
        message = "there is no such device"
    else:
        return None
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if not platforms:
        return InputError(
            f"the accelerator cannot be used ({message})",
            "End the other processes that use it, or set JAX_PLATFORMS=cpu.",
        )
    return InputError(
        f"JAX_PLATFORMS={platforms!r} cannot be used ({message})",
        "Set JAX_PLATFORMS=cpu or unset it.",
    )


def _no_platform(error: BaseException) -> bool:
    """Whether an assertion of JAX says that none of the requested platforms is available."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AssertionError) and bool(frames) and frames[-1].name == "backends"


def _check_xla_flags() -> None:
    """Raises InputError with XLA's message if XLA cannot parse XLA_FLAGS.

    XLA would end the process, so a child process parses them first.
    """
    value = os.environ.get("XLA_FLAGS", "")
    if not value.strip():
        return
    with tempfile.TemporaryFile() as stderr, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about threads, which the child does not use
        child = os.fork()
        if not child:
            _let_xla_parse_its_flags(stderr.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").splitlines()
    if status:
        telling = (line for line in lines if "XLA_FLAGS" in line or "ouldn't" in line)
        line = next(telling, lines[0] if lines else "no reason given")
        raise InputError(
            f"XLA_FLAGS={value!r} cannot be used ({line.partition('] ')[2] or line})",
            "Use flags that this version of XLA knows; flags of TPUs go into LIBTPU_INIT_ARGS.",
        )


def _let_xla_parse_its_flags(stderr: int) -> None:
    """Runs in a child process, and ends it."""
    with contextlib.suppress(Exception):  # without this private API nothing is checked
        os.dup2(stderr, 2)
        from jaxlib import _jax

        _jax.CompileOptions()  # parses XLA_FLAGS
    os._exit(0)
