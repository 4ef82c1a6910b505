"""Sets of tiny images, identified by red, as a folder, a zip or a tar."""

import io
import tarfile
import zipfile

from PIL import Image

from rdm_jax.data.images import ImageSpec

FORM = ImageSpec(4, 4)


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def pngs(*names):
    """Images by name, whose red is their index."""
    return {name: png(i) for i, name in enumerate(names)}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    """Members by name, or by ZipInfo."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            file.writestr(name, content)
    return f"zip:{path}"


def write_tar(path, members, mode="w"):
    """Members by name, or by TarInfo."""
    with tarfile.open(path, mode) as file:
        for member, content in members.items() if isinstance(members, dict) else members:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(member) if isinstance(member, str) else member
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return f"tar:{path}"


def write_folder(path, members):
    for name, content in members.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return f"folder:{path}"


def values(source):
    """The red of every image, which identifies it."""
    return [int(source.read(i, FORM)[0, 0, 0]) for i in range(len(source))]


def classes(source):
    """The name of every image's class, by the image's name."""
    return (
        {name: source.class_names[source.label(i)] for i, name in enumerate(source.names)}
        if source.class_names
        else {}
    )
