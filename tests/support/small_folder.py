"""Helpers of the tests of preparation, for the images in the fixture `folder`."""

from rdm_jax.data.images import ImageSpec

FORM = ImageSpec(8, 6)


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def flip_bit(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
