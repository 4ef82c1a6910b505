"""Steps and the number of images that they show."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Count:
    """Steps and the number of images that they show, with one change of the batch size.

    Attributes:
      batch_size: images per step, from step `step` on.
      step, images: the step at which the batch size changed, and the images shown until then.
    """

    batch_size: int
    step: int = 0
    images: int = 0

    def images_at(self, step: int) -> int:
        """Images shown by the first `step` steps, for `step` not before the change."""
        return self.images + (step - self.step) * self.batch_size

    def steps_for(self, images: int) -> int:
        """Steps that show at least `images` images."""
        return self.step - (self.images - images) // self.batch_size

    def is_due(self, step: int, every: int) -> bool:
        """Whether step `step` shows the first image of another `every` images; never for 0."""
        return bool(every) and self.images_at(step) // every > self.images_at(step - 1) // every

    def changed(self, batch_size: int, step: int) -> "Count":
        """The same with another batch size from step `step` on."""
        if batch_size == self.batch_size:
            return self
        return Count(batch_size, step, self.images_at(step))
