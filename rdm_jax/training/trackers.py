"""Trackers of experiments, beside the files of a run: Weights & Biases.

Nothing that happens in a tracker stops or delays the training.
"""

import contextlib
import netrc
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

from rdm_jax.config import Config, to_dict
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.lazy import import_library, lazy_import

wandb = lazy_import("wandb", "wandb")

CALLS_THAT_WAIT = 10_000  # further ones are dropped
OTHER_HOSTS = ("api.wandb.ai",)  # keys for it are used for other names of the same server
SECONDS_TO_CLOSE = 10
SECONDS_IF_HURRIED = 2


@runtime_checkable
class Tracker(Protocol):
    """What a stage's metrics and pictures are sent to; any method may raise any error."""

    def write(self, values: Mapping[str, float | int]) -> None:
        """Sends metrics by name; 'images' is the number of images trained on."""

    def picture(self, path: Path, images: int) -> None:
        """Sends a preview, drawn after so many images."""

    def close(self) -> None:
        """Sends what is left."""


def check(config: Config) -> None:
    """Refuses a tracker that would fail, or ask for an API key, once the training has begun.

    Raises:
      InputError: its library is not installed, or has no key for its server.
    """
    if not config.tracker:
        return
    import_library(config.tracker, config.tracker)
    settings = wandb.setup().settings
    if settings.mode == "online" and not _has_key(settings):
        raise InputError(
            f"config.tracker={config.tracker!r} has no API key for {settings.base_url}",
            "Run 'wandb login', set WANDB_API_KEY, or set WANDB_MODE=offline.",
        )


def _has_key(settings: Any) -> bool:
    """Whether the library finds a key without asking: in a variable, its settings or a netrc."""
    if settings.api_key or getattr(settings, "identity_token_file", None):
        return True
    hosts = (urlsplit(settings.base_url).netloc, *OTHER_HOSTS)
    named = os.environ.get("NETRC")
    for path in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            found = netrc.netrc(os.path.expanduser(path))
        except FileNotFoundError:
            continue
        except (netrc.NetrcParseError, OSError):
            return True  # the library may read it
        if any(map(found.authenticators, hosts)):
            return True
    return False


def open_tracker(config: Config, directory: Path) -> Tracker | None:
    """The config's tracker for a stage, in a thread of its own; None for none.

    Args:
      config: of the run.
      directory: of the stage.
    """
    if not config.tracker:
        return None
    return Background(lambda: Wandb(directory, to_dict(config)), config.tracker)


class Wandb:
    """A run in Weights & Biases, one per stage; the stages of a workdir are a group.

    A resumed training continues the same run, whose id is in the stage's directory. The library's
    own variables say where it goes, and whether at all: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY.

    Args:
      directory: of the stage.
      config: of the run, as JSON.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]):
        id_file, group = directory / "wandb_id", directory.resolve().parent.name
        directory.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rdm_jax"),
            group=group,
            name=f"{group}/{directory.name}",
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(directory),
            config=dict(config),
            settings=wandb.Settings(console="off"),
        )
        # Not its own step: what a resumed training measures again comes a second time.
        self._run.define_metric("*", step_metric="images")

    def write(self, values: Mapping[str, float | int]) -> None:
        """Logs the metrics."""
        self._run.log(dict(values))

    def picture(self, path: Path, images: int) -> None:
        """Logs the picture as 'preview'."""
        self._run.log({"images": images, "preview": wandb.Image(str(path))})

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


class Background:
    """Opens and calls a tracker in a thread of its own; an error is logged and ends it.

    Args:
      opened: returns the tracker.
      name: of the tracker, for the log.
    """

    def __init__(self, opened: Callable[[], Tracker], name: str):
        self._name = name
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(CALLS_THAT_WAIT)
        self._thread = threading.Thread(target=self._work, args=(opened,), daemon=True)
        self._thread.start()

    def write(self, values: Mapping[str, float | int]) -> None:
        """Returns at once."""
        self._put("write", values)

    def picture(self, path: Path, images: int) -> None:
        """Returns at once."""
        self._put("picture", path, images)

    def close(self, *, hurried: bool = False) -> None:
        """Waits for the calls before, `SECONDS_TO_CLOSE` at most.

        Args:
          hurried: `SECONDS_IF_HURRIED` at most, as the process may be killed soon.
        """
        seconds = SECONDS_IF_HURRIED if hurried else SECONDS_TO_CLOSE
        self._put("close")
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("tracker %s: not finished in %g s", self._name, seconds)

    def _put(self, method: str, *arguments: Any) -> None:
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait((method, arguments))

    def _work(self, opened: Callable[[], Tracker]) -> None:
        try:
            tracker, method = opened(), ""
            while method != "close":
                method, arguments = self._calls.get()
                getattr(tracker, method)(*arguments)
        except Exception as error:  # of the library, which may raise anything
            log.warning("tracker %s: %s; training continues without it", self._name, error)
