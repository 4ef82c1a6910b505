"""Rules of `config.evaluation`: image sets, references, seeds."""

from rdm_jax.config.rules import IMAGES, check_folder, is_of_kind, require
from rdm_jax.config.schema import LEAST, Config
from rdm_jax.runtime.fields import check_bounds
from rdm_jax.runtime.files import local_path
from rdm_jax.runtime.ranges import parse_list, parse_numbers


def evaluated_seeds(config: Config) -> str:
    """The seeds of the images that an evaluation generates."""
    return config.evaluation.seeds or config.sampling.seeds


def is_generated(image_set: str) -> bool:
    """Whether stages make the images of a part of `evaluation.images`."""
    return image_set == "samples" or image_set.startswith("stage")


def measured_sets(config: Config) -> tuple[str, ...]:
    """The image sets that an evaluation measures, each once."""
    return tuple(dict.fromkeys(parse_list(config.evaluation.images, "config.evaluation.images")))


def check(config: Config) -> None:
    """Refuses an evaluation that cannot work. Raises InputError."""
    values = config.evaluation
    if values.features == "none":
        return
    check_bounds(values, "config.evaluation")
    check_folder(values.name, "config.evaluation.name")
    require(
        values.name != config.sampling.name,
        "config.evaluation.name",
        values.name,
        "Use another name than sampling.name.",
    )
    local_path(values.weights, "config.evaluation.weights")
    for image_set in measured_sets(config):
        _check_image_set(image_set, config)
    of_data = values.reference in ("training", "held_out")
    require(
        of_data or is_of_kind(values.reference, ("prepared", "npz"), "config.evaluation.reference"),
        "config.evaluation.reference",
        values.reference,
        "Use 'training', 'held_out', 'prepared:PATH' or 'npz:PATH'.",
    )
    _check_native(config)
    seeds = {"evaluation.seeds_in_training": values.seeds_in_training}
    if any(map(is_generated, measured_sets(config))):
        field = "evaluation.seeds" if values.seeds else "sampling.seeds"
        seeds = {field: evaluated_seeds(config), **seeds}
    for field, numbers in seeds.items():
        require(
            len(parse_numbers(numbers, f"config.{field}")) >= LEAST,
            f"config.{field}",
            numbers,
            f"Use {LEAST} or more seeds, or other --config.evaluation.seeds: too few images cannot "
            "be measured.",
        )


def _check_native(config: Config) -> None:
    """The reference of stages at their own size."""
    values, field = config.evaluation, "config.evaluation.native_reference"
    spec, of_data = values.native_reference, values.native_reference in ("training", "held_out")
    require(
        not spec or of_data or is_of_kind(spec, ("prepared", "npz"), field),
        field,
        spec,
        "Use 'training', 'held_out', 'prepared:PATH', 'npz:PATH', or '' for none.",
    )
    native = next((name for name in measured_sets(config) if name.endswith("@native")), "")
    require(
        spec or not native,
        field,
        spec,
        f"Use 'training', 'held_out', 'prepared:PATH' or 'npz:PATH' for {native!r} in images.",
    )
    require(
        not spec or values.features != "classifier",
        field,
        spec,
        "Use '', or other features: a classifier is made for images of the final size.",
    )
    for stage in config.stages[:-1]:
        require(
            not (of_data and stage.source),
            field,
            spec,
            f"Use 'prepared:PATH' or 'npz:PATH': config.{stage.name}.source is not the data of the "
            "last stage.",
        )


def _check_image_set(image_set: str, config: Config) -> None:
    """One part of `evaluation.images`."""
    stages = [f"{stage.name}{end}" for end in ("", "@native") for stage in config.stages[:-1]]
    known = ["samples", *stages, "held_out", *(f"{kind}:PATH" for kind in IMAGES), "prepared:PATH"]
    require(
        image_set in ("samples", "held_out", *stages)
        or is_of_kind(image_set, (*IMAGES, "prepared", "npz"), "config.evaluation.images"),
        "config.evaluation.images",
        config.evaluation.images,
        f"Use {', '.join(map(repr, known))} or 'npz:PATH'.",
    )
    values, held_out = config.evaluation, config.data.held_out
    needed = "held_out" in (image_set, values.reference, values.native_reference)
    require(
        held_out or not needed,
        "config.data.held_out",
        held_out,
        "Use more than 0 for 'held_out' in config.evaluation.",
    )
