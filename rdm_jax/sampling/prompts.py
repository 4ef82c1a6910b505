"""Prompts: read from the config, a file or a run's captions, and encoded for the networks."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rdm_jax.config import Config, Stage
from rdm_jax.data.text_table import TextSpec, same_text
from rdm_jax.models.conditions import Condition
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.files import local_path
from rdm_jax.sampling.run_captions import Captions
from rdm_jax.text.encoders import TextEncoder, open_encoder

FIELD, ENCODER = "config.sampling.prompts", "config.data.text_encoder"
HELD_OUT = "held_out"  # the value that means the run's held-out captions
KEPT = 4096  # encoded prompts that are kept, as many images may have the same


class Listed(NamedTuple):
    """Prompts that seeds take in turn.

    Attributes:
      texts: the prompts.
      classes: the name of the class that belongs to each, '' for none; () if none is known.
    """

    texts: tuple[str, ...]
    classes: tuple[str, ...] = ()


def takes_text(stage: Stage) -> bool:
    """Whether a stage is conditioned on text."""
    return "text" in stage.condition.inputs


def uses_classes(condition: Condition) -> bool:
    """Whether a condition depends on the classes of images."""
    return "label" in condition.inputs


def parse_prompts(text: str) -> tuple[str, ...]:
    """The prompts of `sampling.prompts`, stripped; () for '' and 'held_out', which name none.

    Raises:
      InputError: a prompt is empty, the JSON is not a list of strings, or the file is missing or
        not UTF-8.
    """
    given = text.strip()
    if given in ("", HELD_OUT):
        return ()
    if given.startswith("["):
        parts, where = _json_list(text), f"{FIELD}={text!r}"
    elif given.endswith(".txt") and ";" not in given:
        parts, where = _lines(given), f"the file of {FIELD}={text!r}"
    else:
        parts, where = given.split(";"), f"{FIELD}={text!r}"
    parts = [part.strip() for part in parts]
    if not all(parts):
        number = parts.index("") + 1
        raise InputError(f"{where}: prompt {number} of {len(parts)} is empty", "Give every prompt.")
    if not parts:
        raise InputError(f"{where} has no prompts", "Give one or more.")
    return tuple(parts)


def check_prompts(config: Config, *, encode: bool) -> None:
    """Refuses prompts that cannot be read, or that no stage of the config takes, early.

    Args:
      config: of the run.
      encode: whether to refuse those that are too long, too: sampling itself comes much later.

    Raises:
      InputError: names the field, or the prompt.
    """
    value = config.sampling.prompts
    prompts = parse_prompts(value)
    if value and not any(map(takes_text, config.stages)):
        raise no_text(f"{FIELD}={value!r:.60}")
    if value.strip() == HELD_OUT and not config.data.held_out:
        raise InputError(
            f"{FIELD}={value!r} means captions of held-out images, and config.data.held_out=0",
            "Give other prompts.",
        )
    if any(takes_text(stage) and uses_classes(stage.condition) for stage in config.stages):
        check_labels(config)
    if prompts and encode:
        encoder = open_encoder(config.data.text_encoder, config.data.text_tokens, ENCODER)
        encoder(prompts[:KEPT])


def check_labels(config: Config) -> None:
    """Refuses prompts of the config that would have no class, where images depend on both."""
    value, sampling = config.sampling.prompts, config.sampling
    if parse_prompts(value) and sampling.labels == "balanced" and not sampling.low:
        raise no_classes(f"{FIELD}={value!r:.60}")


def no_classes(field: str) -> InputError:
    """The refusal of prompts without classes: no network is trained with text and no class."""
    return InputError(
        f"{field} has no classes, on which the images depend, too",
        "Set --config.sampling.labels to classes, or to 'random'; from Python, give labels.",
    )


def no_text(field: str) -> InputError:
    """The refusal of prompts where no stage takes text."""
    return InputError(
        f"{field} is of no use: no stage is conditioned on text",
        "Use --config.sampling.labels for classes, or a run that was trained with captions.",
    )


def _json_list(text: str) -> list[str]:
    try:
        parts = json.loads(text)
        if all(type(part) is str for part in parts):
            return parts
    except (ValueError, RecursionError):
        pass
    raise InputError(
        f"{FIELD}={text!r} is not a JSON list of strings", """Use a list such as '["a", "b"]'."""
    )


def _lines(path: str) -> list[str]:
    """The lines of a file, without a last empty one."""
    try:
        text = local_path(path, FIELD).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{FIELD}={path!r} cannot be read ({error.strerror})",
            "Use a text file with a prompt per line.",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{FIELD}={path!r} is not UTF-8 (byte {error.start})", "Save the file as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def choose(config: Config, captions: Captions | None, *, classes: bool) -> Listed:
    """The prompts of a run's samples: those of `sampling.prompts`, or captions of the run.

    Args:
      config: of the run.
      captions: of the run; None if its workdir has none.
      classes: whether a caption is listed once with each of its classes, instead of once.

    Raises:
      InputError: as `parse_prompts` does, or the run has no such captions.
    """
    value = config.sampling.prompts
    if given := parse_prompts(value):
        return Listed(given)
    held_out = value.strip() == HELD_OUT
    listed = Listed(())
    if captions and held_out:
        listed = Listed(captions.held_out, captions.held_out_classes)
    elif captions:
        listed = Listed(captions.training, captions.training_classes)
    if not listed.texts:
        raise InputError(
            f"{FIELD}={value!r} means the {'held-out ' if held_out else ''}captions of the run, "
            "and its workdir has none",
            f"Give prompts, such as --{FIELD}='a red apple; a sleeping cat'.",
        )
    return listed if classes else Listed(tuple(dict.fromkeys(listed.texts)))


class Prompts:
    """Encodes prompts for the networks of a run.

    The encoder is in memory, that of the accelerator included, until `release`, and again once
    other prompts are encoded.

    Args:
      config: of the run; `data.text_encoder` is opened.
      text: how the captions of the run's training are embedded.

    Raises:
      InputError: the encoder cannot be opened, or is another one than that of the training.
    """

    def __init__(self, config: Config, text: TextSpec):
        self._name, self._text = config.data.text_encoder, text
        self._encoder: TextEncoder | None = self._opened()
        self._known: dict[str, np.ndarray] = {}  # the valid tokens of each

    def _opened(self) -> TextEncoder:
        encoder = open_encoder(self._name, self._text.tokens, ENCODER)
        found = TextSpec(encoder.name, encoder.weights_hash, encoder.tokens, encoder.width)
        if not same_text(found, self._text):
            raise InputError(
                f"{ENCODER}={self._name!r} is {found}, and the run was trained with {self._text}",
                "Use the encoder that the run was trained with.",
            )
        return encoder

    def encode(self, prompts: Sequence[str]) -> None:
        """Encodes new prompts. Raises InputError for an empty one, or one that is too long."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if not new:
            return
        self._encoder = self._encoder or self._opened()
        made = self._encoder(new)
        for prompt, tokens, length in zip(new, made.tokens, made.lengths, strict=True):
            self._known[prompt] = np.array(tokens[:length], np.float16)

    def release(self) -> None:
        """Frees the memory of the encoder; what is encoded stays."""
        self._encoder = None

    def given(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """'text', float16 (b, tokens, width), and 'text_length', int32 (b,), as in a batch.

        Raises:
          InputError: as `encode` does.
        """
        self.encode(prompts)
        found = [self._known[prompt] for prompt in prompts]
        text = np.zeros((len(found), self._text.tokens, self._text.width), np.float16)
        for row, tokens in zip(text, found, strict=True):
            row[: len(tokens)] = tokens
        for prompt in list(self._known)[: max(0, len(self._known) - KEPT)]:
            del self._known[prompt]
        return {"text": text, "text_length": np.asarray(list(map(len, found)), np.int32)}
