"""Decodes all images of a set into one array, on every core."""

import concurrent.futures
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Shaped

from rdm_jax.data.sources import cores
from rdm_jax.runtime.console import progress
from rdm_jax.runtime.errors import BadImage


def decoded(
    items: Sequence,
    image_shape: tuple[int, ...],
    dtype: np.dtype,
    description: str,
    skip: Callable[[int, BadImage], None] | None = None,
) -> tuple[Shaped[np.ndarray, "n h w c"], Int32[np.ndarray, " n"], Bool[np.ndarray, " m"]]:
    """The pixels and class indices of images, without those that cannot be used.

    Args:
      items: pixels and class index, by index.
      image_shape, dtype: of the pixels.
      description: of the progress bar.
      skip: called for each image that cannot be used, which is then left out; None to raise.

    Returns:
      Pixels and class indices, and which of the items they are.

    Raises:
      InputError: an image cannot be used.
    """
    count = len(items)
    images, labels = np.empty((count, *image_shape), dtype), np.empty(count, np.int32)
    kept = np.ones(count, bool)

    def decode(index: int) -> None:
        try:
            images[index], labels[index] = items[index]
        except BadImage as error:
            if skip is None:
                raise
            kept[index] = False
            skip(index, error)
        bar.update()

    # Pillow and array_record release Python's lock while they decode.
    with (
        progress(count, description) as bar,
        concurrent.futures.ThreadPoolExecutor(cores()) as pool,
    ):
        try:
            for _ in pool.map(decode, range(count)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return (images, labels, kept) if kept.all() else (images[kept], labels[kept], kept)
