"""A run's whole relay to a folder that others can load, and such a folder into a workdir."""

from pathlib import Path
from typing import Any

import jax

from rdm_jax.checkpoints import averages, folders, shared, store
from rdm_jax.config import Config
from rdm_jax.config.rules import refuse_latents
from rdm_jax.runtime import sharding
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import InputError
from rdm_jax.workdir import Workdir


def export_relay(config: Config, workdir: Workdir, folder: Path) -> None:
    """Writes all stages of a run, the averages that its config chooses, as `shared.write` does.

    Raises:
      InputError: a stage has no such checkpoint or average, or the folder exists.
      OSError: a file cannot be written.
    """
    refuse_latents(config, "the export of a relay")
    stages, replicated = [], sharding.replicated(sharding.local_mesh())
    for number, stage in enumerate(config.stages, 1):
        field = f"config.stage{number}.checkpoint"
        directory, step = folders.find(stage.checkpoint, workdir.checkpoints(number), field)
        chosen = averages.choose(stage, directory, step)
        network = stage.build(config.data.channels, len(chosen.about["classes"]))
        params = chosen.read(store.with_sharding(network.abstract, replicated))
        stages.append(shared.SharedStage(params, chosen.about, step))
        config = config.with_stage(number, checkpoint="newest", average="ema")
    shared.write(
        config, stages, folder, captions=workdir.captions, card=_card(config, stages, folder.name)
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    log.info("export: %d stages, %.1f MB -> %s", len(stages), size / 1e6, folder)


def import_relay(folder: Path, workdir: Workdir) -> None:
    """Unpacks a shared relay into a workdir, with its config.

    Raises:
      InputError: the folder is not a shared relay or is damaged, or the workdir has checkpoints.
    """
    if not shared.is_shared(folder):
        raise InputError(
            f"{folder} is not a shared relay: it has no {shared.LIST}",
            "Use a folder that --mode=export without --stage has made.",
        )
    config = shared.read_config(folder)
    with workdir.locked():
        if trained := workdir.stages_with_checkpoints(config):
            raise InputError(
                f"{workdir} already has checkpoints of stage {trained[0]}", "Use another --workdir."
            )
        workdir.write_config(config)
        shared.unpack(folder, config, workdir.checkpoints, workdir.captions)


def _card(config: Config, stages: list[shared.SharedStage], name: str) -> str:
    """The text of the card: what it is, from what it was trained, how it is used."""
    rows = [
        (
            f"{number}",
            "{} x {}".format(*stage.resolution),
            f"{sum(leaf.size for leaf in jax.tree.leaves(made.params)):,}",
            f"{_images(made):,}",
            _loss(made.about),
        )
        for number, (stage, made) in enumerate(zip(config.stages, stages, strict=True), 1)
    ]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    text = stages[-1].about.get("text")
    prompts = ', prompts=["a red apple"] * 4' if text else ""
    knows = f"Captions, embedded by {text['encoder']}. " if text else ""
    classes, labels = stages[-1].about["classes"], ""
    if "label" in config.stages[-1].condition_for(len(classes)).inputs:
        knows += f"{len(classes)} classes. "
        labels = ', sampling={"labels": "random"}' if text else ""  # prompts have none themselves
    return f"""# {name}

A relay of diffusion models (arXiv 2309.03350), made by rdm_jax. {knows.strip()}

| stage | size | parameters | training images | validation loss |
|---|---|---|---|---|
{table}

Trained on `{config.data.source}`; the licence of these images applies to what it makes.

```python
import rdm_jax

pipe = rdm_jax.load("{name}"{labels})
*_, images = pipe.sample(range(4){prompts})  # uint8 (4, h, w, c)
```
"""


def _images(made: shared.SharedStage) -> int:
    count = made.about.get("count", {})
    batch_size = made.about["stage"]["training"]["batch_size"]
    return count.get("images", 0) + (made.step - count.get("step", 0)) * batch_size


def _loss(about: dict[str, Any]) -> str:
    loss = about.get("validation_loss")
    return "" if loss is None else f"{loss:.4f}"
