"""Digits through other chains of stages: more stages, other factors, images that are not square.

    python -m rdm_jax.main --config experiments/chain/config.py:8-16-32 --workdir runs/chain_8-16-32

A chain is a list of sides joined by '-', or of height x width: 4-32, 8-32, 8x6-32x24.
`emoji-16-64-256` is three stages of the emoji, for an accelerator, `emoji-16-64-256-tiny` the same
in minutes on two cores. README.md has the results.
"""

import dataclasses

from configs import digits, emoji
from rdm_jax.config import Config, Evaluation, Stage, parse
from rdm_jax.diffusion.preconditioning import EDMPreconditioning

MORE_STEPS = 10  # of the noise schedule, of which four levels are below the smaller noise
TONES = "0,0,0,0,0,0,1-5"  # as in the set, where 1,871 of 3,391 have none


def get_config(chain: str = "8-16-32"):
    """The config of a chain as an ml_collections ConfigDict."""
    if chain in ("emoji-16-64-256", "emoji-16-64-256-tiny"):
        return _emoji("tiny" if chain.endswith("tiny") else "full").to_config_dict()
    sides = [side.split("x") for side in chain.split("-")]
    return _digits([(int(side[0]), int(side[-1])) for side in sides]).to_config_dict()


def relay_stage(
    usual: Stage, before: tuple[int, int], resolution: tuple[int, int], fold: int
) -> Stage:
    """A relay stage like `usual` for another factor.

    The blur grows with the factor, so that the same detail is left at the hand-over. For a smaller
    factor the noise shrinks too: the mean of fewer pixels keeps more of it.
    """
    factor = resolution[0] // before[0]
    pixels = usual.process.clock.blur_sigma_max * factor / usual.factor
    joined = usual.sampler.truncation_sigma * min(1, factor / usual.factor)
    steps = usual.sampler.steps if factor >= usual.factor else MORE_STEPS
    sampler = dataclasses.replace(usual.sampler, truncation_sigma=joined, steps=steps)
    process = dataclasses.replace(
        usual.process,
        patch=factor,
        clock=dataclasses.replace(usual.process.clock, blur_sigma_max=pixels),
    )
    return dataclasses.replace(
        usual,
        resolution=resolution,
        process=process,
        sampler=sampler,
        network=dataclasses.replace(usual.network, patch=fold),
    )


def _digits(sizes: list[tuple[int, int]]) -> Config:
    """A chain of digits.py's stages; relay networks work at about 8x8, with pixels folded."""
    config = parse(digits.get_config())
    first, relay = config.stages
    stages = [dataclasses.replace(first, resolution=sizes[0])]
    for before, size in zip(sizes, sizes[1:], strict=False):
        stages.append(relay_stage(relay, before, size, fold=max(1, size[0] // 8)))
    data = config.data
    if sizes[-1] != (32, 32):
        directory = f"data/digits_{'x'.join(map(str, sizes[-1]))}"
        data = dataclasses.replace(data, directory=directory)
    earlier = [f"stage{number}" for number in range(1, len(stages))]
    measured = ", ".join(["held_out", *earlier, "samples"])
    evaluation = dataclasses.replace(config.evaluation, images=measured)
    return dataclasses.replace(config, data=data, stages=tuple(stages), evaluation=evaluation)


def _emoji(size: str) -> Config:
    """emoji.py's two stages after one at 16x16; skin tones are classes, for the classifier."""
    config = parse(emoji.get_config(size))
    small, large = config.stages
    network = dataclasses.replace(
        small.network, channel_mult=(1, 2), attention_levels=(1,), patch=1
    )
    middle = dataclasses.replace(
        large, resolution=(64, 64), network=small.network, training=small.training
    )
    stages = (dataclasses.replace(small, resolution=(16, 16), network=network), middle, large)
    if size == "tiny":
        stages = tuple(
            _brief(stage, images)
            for stage, images in zip(stages, (48_000, 12_800, 4_800), strict=True)
        )
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, directory="data/emoji_256_tones", skin_tones="mark", held_out=339
        ),
        stages=stages,
        sampling=dataclasses.replace(config.sampling, seeds="0-255", labels=TONES),
        evaluation=Evaluation(features="classifier", images="held_out, stage1, stage2, samples"),
    )


def _brief(stage: Stage, images: int) -> Stage:
    """A stage for few training images: a larger learning rate, a shorter EMA half-life.

    The noise level is passed to the network as in digits.py.
    """
    often = {
        "checkpoint_every": images // 4,
        "preview_every": images // 2,
        "log_every": images // 40,
    }
    rates = {
        "learning_rate": 1e-3,
        "warmup": images // 20,
        "ema_halflife": images / 10,
        "ema_rampup": 0.0,
    }
    training = dataclasses.replace(stage.training, images=images, **rates, **often)
    return dataclasses.replace(
        stage, precondition=EDMPreconditioning(noise_scale=1.0), training=training
    )
