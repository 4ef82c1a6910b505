"""How many images a number of steps has shown."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Count:
    """Steps and the images that they show, where the batch size may have changed on the way.

    Attributes:
      batch_size: images a step, from step `step` on.
      step, images: the step at which the batch size became this one, and the images shown until
        then.
    """

    batch_size: int
    step: int = 0
    images: int = 0

    def images_at(self, step: int) -> int:
        """Images shown by the first `step` steps, of which the last ones have this batch size."""
        return self.images + (step - self.step) * self.batch_size

    def steps_for(self, images: int) -> int:
        """Steps that show at least `images` images."""
        return self.step - (self.images - images) // self.batch_size

    def is_due(self, step: int, every: int) -> bool:
        """Whether step `step` shows the first image of another `every` images; never for 0."""
        return bool(every) and self.images_at(step) // every > self.images_at(step - 1) // every

    def changed(self, batch_size: int, step: int) -> "Count":
        """The same with another batch size from step `step` on."""
        return (
            self if batch_size == self.batch_size else Count(batch_size, step, self.images_at(step))
        )
