"""A data set of tensorflow-datasets made of files that are there already.

Imported where one is made: it imports tensorflow-datasets, which takes long.
"""

from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from rdm_jax.runtime.files import link_or_copy


class _Info(tfds.core.DatasetInfo):
    """Does not look the data set up among those that are published, which leaves an empty folder
    in the system's temporary directory."""

    def initialize_from_bucket(self) -> None:
        pass


class RelayImages(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):
    """Makes a data set, split 'train', of shards that are there already.

    Not a ShardBasedBuilder, which writes one shard after the other, and after a kill begins again
    with the first.

    Args:
      shards: number of records, and path, of each.
      features: of a record.
      spec: of the source, for the description.
      data_dir: where tensorflow-datasets is to make the data set, on the same file system.

    Attributes:
      shard_paths: what the shards are called in the data set.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, shards: Sequence[tuple[int, Path]], features, spec: str, data_dir: Path):
        self._shards, self._features, self._spec = shards, features, spec
        super().__init__(data_dir=data_dir, file_format=tfds.core.FileFormat.ARRAY_RECORD)

    def _info(self) -> tfds.core.DatasetInfo:
        description = f"Images of {self._spec}, prepared by rdm_jax."
        kwargs = {"description": description, "features": self._features, "disable_shuffling": True}
        return _Info(builder=self, **kwargs)

    @property
    def shard_paths(self) -> list[Path]:
        """Where the shards are, or are to be, in the data set."""
        template, count = self._get_filename_template("train"), len(self._shards)
        return [
            Path(template.sharded_filepath(shard_index=i, num_shards=count)) for i in range(count)
        ]

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        for (_, path), name in zip(self._shards, self.shard_paths, strict=True):
            link_or_copy(path, name)
        lengths, size = (
            [records for records, _ in self._shards],
            sum(path.stat().st_size for _, path in self._shards),
        )
        template = self._get_filename_template("train")
        split = tfds.core.SplitInfo(
            name="train", shard_lengths=lengths, num_bytes=size, filename_template=template
        )
        self.info.set_splits(tfds.core.SplitDict([split]))
