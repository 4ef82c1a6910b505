"""The images that each stage of a config is trained on: prepared, decoded and opened."""

from collections.abc import Callable, Iterable
from pathlib import Path

from rdm_jax.config import Config, validate, validate_captions
from rdm_jax.data.classes import Classes, table
from rdm_jax.data.image_sets import ImageSet, open_direct, open_prepared
from rdm_jax.data.images import ImageSpec
from rdm_jax.data.latent_spec import LatentSpec
from rdm_jax.data.latents import add_latents, is_encoded, open_latents
from rdm_jax.data.prepare import prepare
from rdm_jax.data.records import Encoding
from rdm_jax.data.text_table import Embedding, TextSpec
from rdm_jax.data.write_sums import add_sums
from rdm_jax.data.write_text import add_text, is_embedded
from rdm_jax.interop import latent_space
from rdm_jax.runtime.console import log
from rdm_jax.runtime.errors import BadImage, InputError
from rdm_jax.text import encoders
from rdm_jax.text.encoders import TextEncoder
from rdm_jax.workdir import Workdir


def open_sets(
    config: Config,
    numbers: Iterable[int],
    *,
    workdir: Path | None = None,
    skip_bad: bool = False,
    verify: bool = False,
    update: bool = False,
    embeds: bool = True,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[int, ImageSet]:
    """Prepares the images of stages unless that is done, and opens them.

    Args:
      numbers: of the stages that are trained, from 1. A stage without a `source` shares the last
        one's set.
      workdir: of the run; sources that overlap with its outputs are refused before they are read.
      skip_bad, verify, update, check_stop: as for `prepare.prepare`.
      embeds: embed captions that are not yet embedded, and encode images as latents; otherwise
        these sets have none.

    Returns:
      The set of each stage, by number.

    Raises:
      InputError: an image or a setting cannot be used, or a stage's own images have other classes.
    """
    last = len(config.stages)
    own_or_last = {number: _set_number(config, number) for number in numbers}
    encoder = None
    if embeds:
        validate_captions.check_asked(config, own_or_last)
        encoder = _encoder(config, own_or_last, update)
    opened = _cells(config, own_or_last)
    sets: dict[int, ImageSet] = {}
    for number in sorted(set(own_or_last.values())):
        try:
            sets[number] = _open(
                config,
                number,
                opened.get(number, []),
                encoder,
                Workdir(workdir).outputs(config) if workdir else [],
                skip_bad=skip_bad,
                verify=verify,
                update=update,
                embeds=embeds,
                check_stop=check_stop,
            )
        except BadImage as error:
            fix = f"{error.fix} Pass --skip_bad to leave such images out.".strip()
            raise InputError(error.problem, fix) from error
        _log_set(number, sets[number])
    for number in own_or_last:
        _log_full_records(config, number, sets[own_or_last[number]])
    for number, images in sets.items():
        others = sets.get(last, images).class_names
        if images.class_names != others:
            raise InputError(
                f"config.stage{number}.source={config.stage(number).source!r} has the classes "
                f"{Classes(images.class_names)}, config.data.source has {Classes(others)}",
                "Use the same classes in the same order.",
            )
    return {number: sets[chosen] for number, chosen in own_or_last.items()}


def _set_number(config: Config, number: int) -> int:
    """Returns the stage whose set a stage is trained on: itself, or the last one."""
    return number if config.stage(number).source else len(config.stages)


def _embedding(config: Config) -> Embedding | None:
    """How captions are to be embedded; None without captions."""
    data = config.data
    return Embedding(data.text_encoder, data.text_tokens) if data.captions != "none" else None


def _place(config: Config, number: int) -> str:
    """The folder of a stage's own prepared set; '' if it is read directly."""
    source, directory = config.data.source, config.data.directory
    if own := config.stage(number).source:
        source, directory = own, directory and f"{Path(directory)}_stage{number}"
    return source.removeprefix("prepared:") if source.startswith("prepared:") else directory


def _encoder(config: Config, sets: dict[int, int], update: bool) -> TextEncoder | None:
    """Opens the encoder of captions, before images are read; None if all are embedded already.

    Args:
      config: of the run.
      sets: the stage whose set a stage is trained on, by its number.
      update: whether sets whose source has changed are prepared again.

    Raises:
      InputError: there is no such encoder, or a stage is conditioned on tokens of another width.
    """
    embedding = _embedding(config)
    places = {_place(config, number) for number in sets.values()}
    if embedding is None or not (
        update or any(not place or not _has_captions(place, embedding) for place in places)
    ):
        return None
    encoder = encoders.open_encoder(embedding.encoder, embedding.tokens)
    spec = TextSpec(encoder.name, "", encoder.tokens, encoder.width)
    validate.check_captions(config, dict.fromkeys(sets, spec))
    return encoder


def _has_captions(place: str, embedding: Embedding) -> bool:
    """Whether a prepared set has embedded captions."""
    return is_embedded(Path(place).expanduser().resolve(), embedding)


def _cell(config: Config, number: int) -> int:
    """Returns p: a stage sees the means of p x p pixels of its set."""
    if config.data.autoencoder:  # whose latents are averaged instead
        return 1
    images = config.stage(_set_number(config, number)).resolution
    return images[0] // config.stage(number).resolution[0]


def _cells(config: Config, numbers: Iterable[int]) -> dict[int, list[int]]:
    """The cells whose means these stages see, by the stage whose set it is."""
    cells: dict[int, list[int]] = {}
    for number in numbers:
        if (cell := _cell(config, number)) > 1:
            cells.setdefault(_set_number(config, number), []).append(cell)
    return cells


def _log_full_records(config: Config, number: int, images: ImageSet) -> None:
    """Logs that a stage reads more than it needs, and what changes that."""
    cell = _cell(config, number)
    if images.of_cells(cell).cell != cell:
        log.info(
            "data: stage%d reads the full records, %d times the pixels that it needs; "
            "--mode=prepare adds records of its size",
            number,
            cell**2,
        )


def _log_set(number: int, images: ImageSet) -> None:
    names = images.class_names
    log.info(
        "data: stage%d: %s images of %d x %d x %d, %d classes",
        number,
        f"{len(images):,}",
        *images.image_shape,
        len(names),
    )
    indices = tuple(range(len(names)))
    if names != tuple(map(str, indices)):  # else the names are the indices
        log.info("data: stage%d: classes by number: %s", number, table(Classes(names), indices))


def set_for_pictures(config: Config) -> ImageSet | None:
    """Returns images to compare samples with if they are prepared; sampling itself needs none."""
    directory = config.data.directory
    if config.data.source.startswith("prepared:"):
        directory = config.data.source.removeprefix("prepared:")
    try:
        if directory and (Path(directory).expanduser() / "dataset_info.json").is_file():
            last = len(config.stages)
            return open_sets(config, [last], embeds=False)[last]
        reason = f"there is no prepared data in {directory!r}"
    except InputError as error:
        reason = str(error)
    log.info("the samples are drawn without their nearest real images: %s", reason)
    return None


def _open(
    config: Config,
    number: int,
    cells: list[int],
    encoder: TextEncoder | None,
    apart_from: list[Path],
    *,
    skip_bad: bool,
    verify: bool,
    update: bool,
    embeds: bool,
    check_stop: Callable[[], None],
) -> ImageSet:
    """Opens the set of one stage, from 1: prepared elsewhere, read directly, or prepared here.

    Its `cells` are opened; those of all stages that share it are written. Latents, if it has them,
    are in memory instead of pixels.
    """
    data, stage = config.data, config.stage(number)
    field, source = "config.data.source", data.source
    if stage.source:
        field, source = f"config.stage{number}.source", stage.source
    height, width, channels = latent_space.image_shape(config, number)
    spec = ImageSpec(height, width, channels, background=data.background, crop=data.crop)
    encodes = bool(data.autoencoder) and embeds
    cache_bytes = 0 if encodes else int(data.cache_gib * 2**30)
    if update and (source.startswith("prepared:") or not data.directory):
        log.info(
            "data: nothing to update for %s=%r: it is prepared elsewhere, or read at every start",
            field,
            source,
        )
    written = _cells(config, range(1, len(config.stages) + 1)).get(number, [])
    embedding, place = _embedding(config), _place(config, number)
    if embedding and not embeds and not _has_captions(place, embedding):
        embedding = None
    if source.startswith("prepared:"):
        _check_shape(open_prepared(place), spec, f"{field}={source!r}")
        if verify:
            _try_to_add(place, lambda path: add_sums(path, written, check_stop))
        if embedding and embeds:
            _try_to_add(place, lambda path: add_text(path, embedding, check_stop))
        if encodes:
            _try_to_add(place, lambda path: _encode(config, path, check_stop))
        images = open_prepared(place, cache_bytes=cache_bytes, cells=cells, embedding=embedding)
        return _with_latents(config, images, place) if encodes else images
    listing = {
        "skin_tones": data.skin_tones if source.startswith("emoji:") else "",
        "classes": data.classes,
        "captions": data.captions,
        "encoder": encoder,
        "apart_from": apart_from,
        "skip_bad": skip_bad,
        "max_left_out": data.max_left_out,
    }
    if not place:
        return open_direct(source, spec, cache_bytes=cache_bytes, cells=cells, **listing)
    directory = prepare(
        source,
        place,
        spec,
        encoding=Encoding(data.encoding, data.quality),
        verify=verify,
        update=update,
        cells=written,
        check_stop=check_stop,
        **listing,
    )
    if embedding and embeds:
        add_text(directory, embedding, check_stop)
    if encodes:
        _encode(config, directory, check_stop)
    images = open_prepared(directory, cache_bytes=cache_bytes, cells=cells, embedding=embedding)
    return _with_latents(config, images, directory) if encodes else images


def _encode(config: Config, directory: Path, check_stop: Callable[[], None]) -> None:
    """Adds the latents of a prepared set, unless that is done."""
    codec = None
    if not is_encoded(directory, latent_space.digest(config) or ""):
        codec = latent_space.open_codec(config)
    if codec:
        add_latents(directory, codec, check_stop)


def _with_latents(config: Config, images: ImageSet, place: str | Path) -> ImageSet:
    """The set with its latents, in memory if they are small enough."""
    digest, directory = latent_space.digest(config) or "", Path(place).expanduser().resolve()
    found = open_latents(directory, digest, images.class_names)
    if found.images.nbytes <= config.data.cache_gib * 2**30:
        found.images.cache(f"reading the latents of {directory.name}")
    images.add_latents(found.images, LatentSpec(digest, found.mean, found.deviation))
    return images


def _try_to_add(place: str, add: Callable[[Path], None]) -> None:
    """Adds to a set that is prepared elsewhere; one that cannot be written stays as it is."""
    try:
        add(Path(place).expanduser().resolve())
    except OSError as error:
        log.warning("data: %s stays as it is, as it cannot be written (%s)", place, error)


def _check_shape(images: ImageSet, spec: ImageSpec, what: str) -> None:
    """Refuses prepared images of another shape than the stage's."""
    wanted = (spec.height, spec.width, spec.channels)
    if images.image_shape != wanted:
        found = " x ".join(map(str, images.image_shape))
        raise InputError(
            f"{what} has images of {found} (height x width x channels)",
            f"Use images of {' x '.join(map(str, wanted))}.",
        )
