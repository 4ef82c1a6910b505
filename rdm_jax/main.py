"""python -m rdm_jax.main --config configs/digits.py --workdir runs/digits

Prepares the data, trains every stage, samples. The same command again goes on where it was stopped.
"""

import os
import signal
import sys

# Before anything imports TensorStore or XLA, whose C++ logging is decided at import.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if __name__ == "__main__":
    # Python's own handler breaks imports off anywhere; until there is something to save, Ctrl-C
    # simply ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rdm_jax.runtime.environment import check_or_exit

    check_or_exit()

from absl import flags

from rdm_jax import config, modes
from rdm_jax.cli.command import parse_flags
from rdm_jax.cli.config_flag import WholeNumber, define_config
from rdm_jax.cli.exit_codes import exit_status
from rdm_jax.plan.plan import plan
from rdm_jax.runtime import distributed
from rdm_jax.runtime.compile_cache import keep_compiled
from rdm_jax.runtime.console import quiet_libraries, show_log
from rdm_jax.runtime.environment import quiet_libtpu
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.waiting import SECONDS_TO_JOIN


def _whole_number(
    name: str, default: int | None, help_string: str, lower_bound: int | None = None
) -> flags.FlagHolder:
    return flags.DEFINE(
        WholeNumber(lower_bound), name, default, help_string, serializer=flags.ArgumentSerializer()
    )


_CONFIG = define_config(
    help_string="Config file, config.json or a run's folder; --config.field=value overrides."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, logs and samples.")
_MODE = flags.DEFINE_enum("mode", "all", (*modes.MODES, "plan"), "Which part to do.")
_STAGE = _whole_number(
    "stage", None, "With --mode train, import, export or plan: which stage, from 1.", lower_bound=1
)
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "With --mode import: the .pkl, .pt or safetensors; with export: what to write."
)
_EVALUATIONS = flags.DEFINE_list(
    "evaluations", [], "With --mode report: evaluation.json files; without, all of the workdir."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of process 0; '' where the cluster tells; 'none' to stay alone."
)
_PROCESSES = _whole_number(
    "processes", None, "With --coordinator host:port: how many processes there are."
)
_PROCESS = _whole_number(
    "process", None, "With --coordinator host:port: which of them this is, from 0."
)
_JOIN_TIMEOUT = _whole_number(
    "join_timeout",
    SECONDS_TO_JOIN,
    "With several processes: seconds to wait for all.",
    lower_bound=1,
)
_TARGET = flags.DEFINE_string(
    "target", "here", "With --mode plan: chips, such as v5e-16 or h100-8; 'here' for these devices."
)
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.4, "With --mode plan: the share of the peak FLOP/s that is reached."
)
_CLASSES = _whole_number(
    "classes", 0, "With --mode plan: number of classes; 0 for none.", lower_bound=0
)
_COMPILE = flags.DEFINE_bool(
    "compile",
    False,
    "With --mode plan: compile for the TPU target, for the compiler's own figures.",
)
_ALLOW_CHANGES = flags.DEFINE_list(
    "allow_changes", [], "Fields that may change in a run that goes on: learning_rate,batch_size."
)
_SKIP_BAD = flags.DEFINE_bool(
    "skip_bad", False, "Leave out images that cannot be used, instead of refusing the set."
)

_UPDATE = flags.DEFINE_bool(
    "update",
    False,
    "With --mode prepare: compare the data with its source; prepare anew what changed.",
)


def _run() -> None:
    parse_flags(sys.argv)  # config_flags looks at sys.argv itself, so nothing else would do
    if _CONFIG.value is None or (_WORKDIR.value is None and _MODE.value != "plan"):
        raise InputError(
            "--config and --workdir are needed, as in --config configs/digits.py --workdir runs/digits."
        )
    if _MODE.value == "plan":
        quiet_libtpu()
        about = {
            flag.name: flag.value for flag in (_TARGET, _UTILISATION, _CLASSES, _COMPILE, _STAGE)
        }
        return print(plan(config.parse(_CONFIG.value), **about))
    distributed.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _JOIN_TIMEOUT.value)
    quiet_libtpu()  # sets a variable that `join` would take for a cluster of one host
    keep_compiled()
    show_log(quiet=not distributed.is_primary())
    part = {
        flag.name: flag.value
        for flag in (_MODE, _STAGE, _WEIGHTS, _EVALUATIONS, _SKIP_BAD, _UPDATE, _ALLOW_CHANGES)
    }
    return modes.run(_CONFIG.value, _WORKDIR.value, **part)


def main() -> int:
    """Returns the exit status: 0 done, 1 diverged or left alone, 2 bad input, 130 and 143 stopped
    by Ctrl-C and SIGTERM."""
    show_log()
    quiet_libraries()
    return exit_status(_run, lambda: _WORKDIR.value)


if __name__ == "__main__":
    distributed.exit_with(main)
