"""What sampled images are made of: classes, prompts and small images, as asked or by seed."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from rdm_jax.config import Config
from rdm_jax.config.rules import refuse_latents
from rdm_jax.data.classes import Classes
from rdm_jax.data.text_table import TextSpec
from rdm_jax.runtime.errors import InputError
from rdm_jax.runtime.ranges import LARGEST, parse_numbers
from rdm_jax.sampling.labels import Labels, labels_asked, labels_of
from rdm_jax.sampling.low_images import LowImages, small_asked
from rdm_jax.sampling.prompts import (
    FIELD,
    KEPT,
    Listed,
    Prompts,
    choose,
    no_classes,
    no_text,
    parse_prompts,
)
from rdm_jax.sampling.run_captions import Captions, mark, read_captions
from rdm_jax.sampling.stage_sampler import in_batches

Seeds = Sequence[int] | np.ndarray | Array


class Asked(NamedTuple):
    """Images to sample.

    Attributes:
      seeds: int64 (n,).
      labels: int32 (n,) class indices; -1 without classes.
      texts: n prompts; '' if no stage takes text.
      stage: number of the stage whose images are given; 0 for none.
      small: the images of that stage, uint8 or float32 in [-1, 1], taken in turn; None for those of
        `sampling.low`.
    """

    seeds: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    texts: Sequence[str]
    stage: int = 0
    small: UInt8[np.ndarray, "m h w c"] | Float[np.ndarray, "m h w c"] | None = None

    def rows(self, indices: Int[np.ndarray, " m"]) -> "Asked":
        """Some of them."""
        small = None if self.small is None else self.small[indices % len(self.small)]
        texts = [self.texts[index] for index in indices]
        return Asked(self.seeds[indices], self.labels[indices], texts, self.stage, small)

    def batches(self, size: int) -> list["Asked"]:
        """All of them in order, `size` at a time; the last batch may be shorter."""
        return [self.rows(indices) for indices in in_batches(np.arange(len(self.seeds)), size)]


class Conditions:
    """What the images of a pipeline are conditioned on; `RelayPipeline` has the attributes."""

    config: Config
    low: LowImages | None
    first: int
    classes: Classes
    text: TextSpec | None = None
    captions: Captions | None = None
    _listed_are_encoded = False

    def _open_text(self, text: TextSpec, captions: Path) -> None:
        """Opens the encoder and reads the captions of the run, for networks that know text."""
        self.text, self._captions_file = text, captions
        self.captions = read_captions(captions)
        self._prompts = Prompts(self.config, text)
        if self.config.sampling.prompts:  # refused now, not after hours
            self.labels(np.zeros(1, np.int64))
            self._encode_listed()

    def _encode_listed(self) -> None:
        """Encodes the prompts of the config's seeds, and frees the encoder's memory for sampling.

        Of more than `KEPT` prompts the rest is encoded batch by batch, and the encoder stays.
        """
        seeds = parse_numbers(self.config.sampling.seeds, "config.sampling.seeds")
        wanted = list(dict.fromkeys(self.prompts(np.asarray(seeds))))
        self._prompts.encode(wanted[:KEPT])
        if len(wanted) <= KEPT:
            self._prompts.release()
        self._listed_are_encoded = True

    def labels(self, seeds: Int[np.ndarray, " b"]) -> Int[np.ndarray, " b"]:
        """The classes of seeds, int32 (b,); -1 without classes.

        They follow the rule of `sampling.labels`; if that is 'balanced', they are those of the
        small images or else of the captions, where these have classes.

        Raises:
          InputError: the classes of prompts are not known, or the networks do not know them.
        """
        rule = self.config.sampling.labels
        if self.low and len(self.classes) and rule == "balanced":
            of_images = self.low.labels(seeds, self.classes)
            if of_images is not None:
                return of_images
        if self._classes_of_captions:
            return self._listed_labels[seeds % len(self._listed_labels)]
        return labels_of(seeds, rule, self.classes, run_seed=self.config.seed)

    @functools.cached_property
    def _classes_of_captions(self) -> bool:
        """Whether images have the classes of their captions: others were never trained together."""
        if not self.text or not len(self.classes) or self.config.sampling.labels != "balanced":
            return False
        no_seeds = np.zeros(0, np.int64)
        return not self.low or self.low.labels(no_seeds, self.classes) is None

    @functools.cached_property
    def _listed_labels(self) -> Int[np.ndarray, " n"]:
        """The class of each listed prompt."""
        if parse_prompts(self.config.sampling.prompts):
            raise no_classes(f"{FIELD}={self.config.sampling.prompts!r:.60}")
        numbers = {"": -1} | {name: number for number, name in enumerate(self.classes.names)}
        names = self.listed.classes
        if not names:
            raise InputError(
                f"{self._captions_file} does not have the classes of its captions",
                "Run --mode=train again, which adds them, or set --config.sampling.labels.",
            )
        if unknown := set(names) - numbers.keys():
            raise InputError(
                f"{self._captions_file} has captions of the class {min(unknown)!r}, and the "
                f"networks know {self.classes}",
                "Set --config.sampling.labels.",
            )
        return np.asarray([numbers[name] for name in names], np.int32)

    @functools.cached_property
    def listed(self) -> Listed:
        """The prompts of `sampling.prompts`, or captions of the run; none if no stage takes text.

        Raises:
          InputError: there are none.
        """
        if not self.text:
            return Listed(())
        return choose(self.config, self.captions, classes=self._classes_of_captions)

    def prompts(self, seeds: Int[np.ndarray, " b"]) -> list[str]:
        """The prompt of each seed: prompt s mod n for seed s; '' if no stage takes text."""
        texts = self.listed.texts or ("",)
        return [texts[int(seed) % len(texts)] for seed in seeds]

    def are_held_out(self, prompts: Sequence[str]) -> list[bool]:
        """Whether each prompt is certainly no caption of the training (`Captions`)."""
        return self.captions.are_held_out(prompts) if self.captions else [False] * len(prompts)

    def captions_below(self, seeds: Int[np.ndarray, " b"]) -> list[str] | None:
        """What is drawn below the image of each seed: its prompt, its class, whether held out.

        None if no stage takes text.
        """
        if not self.text:
            return None
        prompts, labels = self.prompts(seeds), self.labels(seeds)
        texts = [mark(*pair) for pair in zip(prompts, self.are_held_out(prompts), strict=True)]
        names = [f" ({name})" for name in self.classes.names] + [""]  # last, for the label -1
        return [text + names[label] for text, label in zip(texts, labels, strict=True)]

    def given(
        self,
        seeds: Seeds,
        *,
        labels: Labels | None = None,
        prompts: str | Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """What images are conditioned on, for `StageFunctions.condition`.

        'label' int32 (n,), -1 without classes; of networks that know text also 'text' float16
        (n, tokens, width) and 'text_length' int32 (n,).

        Args:
          seeds, labels, prompts: as `RelayPipeline.sample` takes them.

        Raises:
          InputError: as `RelayPipeline.sample` does.
        """
        return self._given(self._asked(seeds, labels, prompts))

    def _given(self, asked: Asked) -> dict[str, np.ndarray]:
        return {"label": asked.labels} | (self._prompts.given(asked.texts) if self.text else {})

    def _asked(
        self,
        seeds: Seeds,
        labels: Labels | None = None,
        prompts: str | Sequence[str] | None = None,
        small: np.ndarray | Array | None = None,
    ) -> Asked:
        """What the arguments of `sample` mean."""
        numbers = np.asarray(seeds)
        if numbers.ndim != 1 or np.any((numbers < 0) | (numbers > LARGEST) | (numbers % 1 != 0)):
            raise InputError(
                f"seeds={seeds!r:.60} cannot be used", f"Give a list of numbers, 0 to {LARGEST}."
            )
        numbers, stage = numbers.astype(np.int64), self.low.stage if self.low else 0
        if small is not None:
            refuse_latents(self.config, "small")
            if self.low:
                low = self.config.sampling.low
                raise InputError(
                    f"small does not go with sampling.low={low!r}", "Give one of them."
                )
            before = range(max(self.first - 1, 1), len(self.config.stages))
            sizes = {number: self.config.stage(number).resolution for number in before}
            stage, small = small_asked(small, sizes, self.config.data.channels)
        texts = self._texts(numbers, prompts, has_labels=labels is not None)
        if labels is None:
            if small is not None and len(self.classes):
                raise InputError(
                    "small has no classes, and those of the seeds are of other images",
                    "Give labels, the classes of small.",
                )
            found = self.labels(numbers)
        else:
            found = labels_asked(labels, len(numbers), self.classes)
        return Asked(numbers, found, texts, stage, small)

    def _texts(
        self,
        seeds: Int[np.ndarray, " n"],
        prompts: str | Sequence[str] | None,
        *,
        has_labels: bool,
    ) -> Sequence[str]:
        """The prompt of each image."""
        if prompts is None:
            # At their first use those of the config's seeds are encoded.
            if self.text and not self._listed_are_encoded:
                self._encode_listed()
            return self.prompts(seeds)
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self.text:
            raise no_text(f"prompts={prompts!r:.60}")
        if not listed and len(seeds):
            raise InputError(f"prompts={prompts!r} has no prompts", "Give one or more.")
        if self._classes_of_captions and not has_labels:
            raise no_classes(f"prompts={prompts!r:.60}")
        return [listed[i % len(listed)] for i in range(len(seeds))]
