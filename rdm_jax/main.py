"""python -m rdm_jax.main --config configs/digits.py --workdir runs/digits

Prepares the data, trains every stage, samples, evaluates. The same command resumes an interrupted
run. Every field of the config is a flag: docs/configuration.md lists them.
"""

import os
import signal
import sys

# Before TensorStore or XLA are imported, which configure their C++ logging then.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if __name__ == "__main__":
    # Python's own handler would interrupt an import anywhere; until there is something to save,
    # Ctrl-C just ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rdm_jax.runtime.environment import check_or_exit

    check_or_exit()

from absl import flags

from rdm_jax import config, modes
from rdm_jax.cli.command import parse_flags
from rdm_jax.cli.config_flag import WholeNumber, define_config
from rdm_jax.cli.cores import use_cores
from rdm_jax.cli.exit_codes import exit_status
from rdm_jax.cli.run_flags import MODES, ONE_PROCESS
from rdm_jax.data.sources import cores
from rdm_jax.plan.plan import plan
from rdm_jax.runtime import distributed
from rdm_jax.runtime.compile_cache import keep_compiled
from rdm_jax.runtime.console import quiet_libraries, show_log
from rdm_jax.runtime.environment import quiet_libtpu
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.waiting import SECONDS_TO_JOIN


def _define_integer(
    name: str, default: int | None, help_string: str, lower_bound: int | None = None
) -> flags.FlagHolder[int | None]:
    parser = WholeNumber(lower_bound)
    return flags.DEFINE(parser, name, default, help_string, serializer=flags.ArgumentSerializer())


_CONFIG = define_config(
    help_string="Config file, config.json, a run's folder or hf://OWNER/NAME; --config.field=value "
    "overrides."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and samples.")
_MODE = flags.DEFINE_enum("mode", "all", (*MODES, "plan"), "What to do.")
_STAGE = _define_integer(
    "stage",
    None,
    "With --mode=train, import, export or plan: a stage, from 1; import and export without it take "
    "a whole relay.",
    lower_bound=1,
)
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "With --mode=import: a .pkl, .pt, .pth or safetensors; with export: file to write; without "
    "--stage the folder of a whole relay, or to import it hf://OWNER/NAME[@REVISION].",
)
_WEIGHTS_KEY = flags.DEFINE_string(
    "weights_key",
    None,
    "With --mode=import: the network in the file; by default 'ema', or 'model_ema1' in JiT's.",
)
_EVALUATIONS = flags.DEFINE_list(
    "evaluations", [], "With --mode=report: evaluation.json files; by default all of the workdir."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of process 0; '' to detect a cluster; 'none' to run alone."
)
_PROCESSES = _define_integer(
    "processes", None, "With --coordinator=host:port: the number of processes."
)
_PROCESS = _define_integer(
    "process", None, "With --coordinator=host:port: the index of this process, from 0."
)
_JOIN_TIMEOUT = _define_integer(
    "join_timeout",
    SECONDS_TO_JOIN,
    "With several processes: seconds to wait for all of them.",
    lower_bound=1,
)
_TARGET = flags.DEFINE_string(
    "target", "here", "With --mode=plan: chips, such as v5e-16 or h100-8; 'here' for these devices."
)
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.4, "With --mode=plan: the fraction of the peak FLOP/s that is reached."
)
_CLASSES = _define_integer(
    "classes", 0, "With --mode=plan: the number of classes; 0 for none.", lower_bound=0
)
_COMPILE = flags.DEFINE_bool(
    "compile", False, "With --mode=plan: compile for a TPU target and show the compiler's figures."
)
_ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes", [], "Fields that may change in a resumed run: learning_rate,batch_size."
)
_SKIP_BAD = flags.DEFINE_bool(
    "skip_bad", False, "Leave out images that cannot be used, instead of refusing the set."
)
_UPDATE = flags.DEFINE_bool(
    "update",
    False,
    "With --mode=prepare: compare the data with its source, and prepare what changed again.",
)


def _run() -> None:
    parse_flags(sys.argv)  # ml_collections reads sys.argv itself
    if _CONFIG.value is None or (_WORKDIR.value is None and _MODE.value != "plan"):
        raise InputError(
            "--config and --workdir are required",
            "Pass them as in --config configs/digits.py --workdir runs/digits.",
        )
    if _MODE.value == "plan":
        quiet_libtpu()
        text = plan(
            config.parse(_CONFIG.value),
            target=_TARGET.value,
            utilisation=_UTILISATION.value,
            classes=_CLASSES.value,
            compile=_COMPILE.value,
            stage=_STAGE.value,
        )
        print(text)
        return
    distributed.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _JOIN_TIMEOUT.value)
    quiet_libtpu()  # sets a variable that `join` would take for a cluster of one host
    keep_compiled()
    if _MODE.value not in ONE_PROCESS:
        use_cores(config.parse(_CONFIG.value), cores())
    show_log(quiet=not distributed.is_primary())
    modes.run(
        _CONFIG.value,
        _WORKDIR.value,
        mode=_MODE.value,
        stage=_STAGE.value,
        weights=_WEIGHTS.value,
        weights_key=_WEIGHTS_KEY.value,
        skip_bad=_SKIP_BAD.value,
        update=_UPDATE.value,
        evaluations=_EVALUATIONS.value,
        allow_changes=_ALLOW_CHANGES.value,
    )


def main() -> int:
    """Runs the command and returns its exit status.

    0: done; 1: diverged, or another process was lost; 2: bad input; 130 and 143: stopped by Ctrl-C
    and SIGTERM.
    """
    show_log()
    quiet_libraries()
    return exit_status(_run, lambda: _WORKDIR.value)


if __name__ == "__main__":
    distributed.exit_with(main)
