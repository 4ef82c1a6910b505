"""Which images each stage of a config is trained on: prepared, decoded and opened."""

from collections.abc import Callable, Iterable
from pathlib import Path

from rdm_jax.config import Config
from rdm_jax.data.classes import Classes, table
from rdm_jax.data.image_sets import ImageSet, open_direct, open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import Encoding
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError


def open_sets(
    config: Config,
    numbers: Iterable[int],
    *,
    workdir: Path | None = None,
    skip_bad: bool = False,
    verify: bool = False,
    update: bool = False,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[int, ImageSet]:
    """Prepares what has not been prepared, and opens it.

    Args:
      numbers: of the stages that are to be trained, from 1. A stage without a `source` has the last
        one's set.
      workdir: of the run, for folders of images that overlap with what the run writes are refused
        before they are read.
      skip_bad, verify, update, check_stop: as for `prepare.prepare`.

    Raises:
      InputError: an image or a setting cannot be used, or a stage's own images are of other
        classes.
    """
    last, sets = len(config.stages), {}
    for number in sorted({n if config.stage(n).source else last for n in numbers}):
        try:
            options = {
                "skip_bad": skip_bad,
                "verify": verify,
                "update": update,
                "check_stop": check_stop,
            }
            sets[number] = _open(config, number, _written_to(config, workdir), **options)
        except BadImage as error:
            raise InputError(f"{error} --skip_bad leaves such images out.") from error
        about = (
            number,
            f"{len(sets[number]):,}",
            *sets[number].image_shape,
            len(sets[number].class_names),
        )
        log.info("data: stage%d: %s images of %d x %d x %d, %d classes", *about)
        names = sets[number].class_names
        if names != tuple(map(str, range(len(names)))):  # else each is called by its number
            log.info(
                "data: stage%d: classes by number: %s",
                number,
                table(Classes(names), tuple(range(len(names)))),
            )
    for number, images in sets.items():
        others = sets.get(last, images).class_names
        if images.class_names != others:
            path = f"config.stage{number}.source={config.stage(number).source!r}"
            kinds = (
                f"{Classes(images.class_names)} and not, like config.data.source, {Classes(others)}"
            )
            raise InputError(
                f"{path} has the classes {kinds}; the same in the same order would do."
            )
    return {n: sets[n] if n in sets and config.stage(n).source else sets[last] for n in numbers}


def _written_to(config: Config, workdir: Path | None) -> list[Path]:
    """What of a workdir may hold pictures of a run's own."""
    names = [f"stage{number}" for number in range(1, len(config.stages) + 1)]
    return (
        [workdir / name for name in (*names, config.sampling.name, config.evaluation.name)]
        if workdir
        else []
    )


def set_for_pictures(config: Config) -> ImageSet | None:
    """Images to compare samples with, if they are there already; sampling needs none."""
    spec, directory = config.data.source, config.data.directory
    place = spec.removeprefix("prepared:") if spec.startswith("prepared:") else directory
    try:
        if place and (Path(place).expanduser() / "dataset_info.json").is_file():
            return open_sets(config, [len(config.stages)])[len(config.stages)]
        reason = f"there is no prepared data in {place!r}"
    except InputError as error:
        reason = str(error)
    log.info("the picture will not show the nearest real images: %s", reason)
    return None


def _open(
    config: Config,
    number: int,
    apart_from: list[Path],
    *,
    skip_bad: bool,
    verify: bool,
    update: bool,
    check_stop: Callable[[], None],
) -> ImageSet:
    data, stage = config.data, config.stage(number)
    field, spec = (
        (f"config.stage{number}.source", stage.source)
        if stage.source
        else ("config.data.source", data.source)
    )
    form = ImageSpec(
        *stage.resolution, channels=data.channels, background=data.background, crop=data.crop
    )
    listed = {
        "skin_tones": data.skin_tones if spec.startswith("emoji:") else "",
        "classes": data.classes,
    }
    listed |= {"apart_from": apart_from, "skip_bad": skip_bad, "max_left_out": data.max_left_out}
    cache_bytes = int(data.cache_gib * 2**30)
    if update and (spec.startswith("prepared:") or not data.directory):
        log.info(
            "data: there is nothing to update for %s=%r: it is prepared elsewhere, or read at every start",
            field,
            spec,
        )
    if spec.startswith("prepared:"):
        images = open_prepared(spec.removeprefix("prepared:"), cache_bytes=cache_bytes)
        if images.image_shape != (form.height, form.width, form.channels):
            found, wanted = (
                " x ".join(map(str, shape))
                for shape in (images.image_shape, (*stage.resolution, form.channels))
            )
            raise InputError(
                f"{field}={spec!r} has images of {found} (height x width x channels); {wanted} would do."
            )
        return images
    if not data.directory:
        return open_direct(spec, form, cache_bytes=cache_bytes, **listed)
    directory = prepare(
        spec,
        f"{Path(data.directory)}_stage{number}" if stage.source else data.directory,
        form,
        encoding=Encoding(data.encoding, data.quality),
        verify=verify,
        update=update,
        check_stop=check_stop,
        **listed,
    )
    return open_prepared(directory, cache_bytes=cache_bytes)
