"""A relay whose images are their seeds: no network, no checkpoint."""

import numpy as np

from rdm_jax.data.classes import Classes
from rdm_jax.sampling import pipeline
from rdm_jax.sampling.labels import labels_of


class FakeRelay(pipeline.RelayPipeline):
    """Counts the batches that are sampled; 'images' are the seeds."""

    def __init__(self, config, classes=Classes(("a", "b")), steps=(10, 20)):  # noqa: B008
        self.config, self.classes, self.made, self.after_each = config, classes, [], lambda: None
        self.low, self.first, self.earlier = None, 1, ("stage1",)
        self.checkpoints = [{"step": step} for step in steps]

    def labels(self, seeds):
        return labels_of(seeds, self.config.sampling.labels, self.classes, run_seed=0)

    def begin(self, seeds):
        images = seeds.astype(np.uint8)[:, None, None, None]
        return pipeline.Begun(
            [[np.ones((8, 4, 4, 1), np.uint8)], [images]], [np.ones(8, bool)], len(seeds)
        )

    def finish(self, begun):
        self.made.append(begun.stages[1][0].ravel().tolist())
        self.after_each()
        return [batches[0][: begun.count] for batches in begun.stages]
