"""Whether the checkpoints of a run fit its config and each other."""

from collections.abc import Sequence
from typing import Any

from rdm_jax.config import Config, to_dict
from rdm_jax.data import latent_spec
from rdm_jax.data.classes import Classes, matched
from rdm_jax.data.latent_spec import LatentSpec
from rdm_jax.data.text_table import TextSpec, same_text, spec_of
from rdm_jax.diffusion import guidance
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.mounts import AnyPath
from rdm_jax.sampling.prompts import FIELD, no_text, takes_text


def common_classes(config: Config, known: list[Classes], first: int) -> Classes:
    """The classes that all stages know.

    A stage that knows them by number alone takes another stage's names. All stages get the same
    indices, so their classes must agree in number and order.
    """
    common = next((classes for classes in known if not classes.by_number), known[0])
    for number, classes in enumerate(known, first):
        if matched(classes, common) != tuple(range(len(common))):
            field = f"config.stage{number}.checkpoint={config.stage(number).checkpoint!r}"
            raise InputError(
                f"{field} knows the classes {classes}, other stages {common}",
                "Use checkpoints of the same classes in the same order.",
            )
    return common


def common_text(config: Config, abouts: Sequence[dict[str, Any]], first: int) -> TextSpec | None:
    """How the captions of all stages are embedded; None if no stage takes text.

    Raises:
      InputError: a checkpoint does not say, they differ, or there are prompts and no stage takes
        text.
    """
    found = {}
    for number, about in enumerate(abouts, first):
        if takes_text(config.stage(number)):
            field = f"config.stage{number}.checkpoint={config.stage(number).checkpoint!r}"
            text = spec_of(about)
            if text is None:
                raise InputError(
                    f"{field} does not name the encoder of its text",
                    "Use a checkpoint that was trained with captions.",
                )
            found[field] = text
    if not found:
        if config.sampling.prompts:
            raise no_text(f"{FIELD}={config.sampling.prompts!r:.60}")
        return None
    common = next(iter(found.values()))
    for field, text in found.items():
        if not same_text(text, common):
            raise InputError(
                f"{field} knows text of {text}, another stage of {common}",
                "Use checkpoints of the same encoder.",
            )
    return common


def check_latents(
    number: int, path: AnyPath, about: dict[str, Any], digest: str | None, before: LatentSpec | None
) -> LatentSpec | None:
    """The latents that a checkpoint was trained on; None for pixels.

    Args:
      number: of the stage.
      path, about: the checkpoint.
      digest: SHA-256 of the weights of the config's autoencoder; None for pixels.
      before: the latents of the stage before; None for the first one.

    Raises:
      InputError: they are not of this autoencoder, or normalised in another way than `before`.
    """
    found = latent_spec.spec_of(about)
    if (found and found.autoencoder) != digest:
        ours = latent_spec.shown(LatentSpec(digest, (), ()) if digest else None)
        raise InputError(
            f"checkpoint {path} of stage{number} was trained on {latent_spec.shown(found)}, and "
            f"config.data.autoencoder gives {ours}",
            "Set it to the autoencoder that the checkpoint was trained with.",
        )
    if before and found and before != found:
        raise InputError(
            f"checkpoint {path} of stage{number} has latents that are normalised in another way "
            "than those of the stage before",
            "Train both stages on the same prepared data.",
        )
    return found


def check_guidance(config: Config, number: int, path: AnyPath, about: dict[str, Any]) -> None:
    """Refuses guidance of a network that was never trained without labels.

    Nothing is known about imported weights, so these are accepted.
    """
    entries = config.stage(number).guidance
    dropout = about["stage"]["training"]["label_dropout"]
    needed = any(entry.needs_null for entry in entries)
    if needed and not dropout and "imported" not in about:
        raise InputError(
            f"config.stage{number}.guidance={guidance.shown(entries)} cannot be used: checkpoint "
            f"{path} was trained with training.label_dropout={dropout}, that is, never without "
            "labels",
            "Use 1.0.",
        )


def check_same_stage(config: Config, number: int, path: AnyPath, about: dict[str, Any]) -> None:
    """Refuses a checkpoint that computes something else, though its arrays may have the shapes."""
    ours = to_dict(config)[f"stage{number}"]
    for part in ("network", "precondition", "process", "condition"):
        fields = ours[part].keys() | about["stage"][part].keys()
        for field in sorted(fields, key=lambda field: (field != "kind", field)):
            was, now = about["stage"][part].get(field), ours[part].get(field)
            if was != now and field not in ("dropout", "dtype", "remat"):
                raise InputError(
                    f"config.stage{number}.{part}.{field}={now!r}, but checkpoint {path} is of "
                    f"another network ({was!r})",
                    f"Use {was!r}.",
                )
