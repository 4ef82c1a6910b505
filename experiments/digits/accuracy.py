"""Do samples show the requested digit, and are they copies of training images? See README.md.

python -m experiments.digits.accuracy runs/digits/samples/samples.npz [more .npz files]
"""

import sys

import numpy as np
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from rdm_jax.data.image_sets import open_prepared


def to_features(images: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1], one row per image."""
    return images.reshape(len(images), -1) / 127.5 - 1


def shrink(images: np.ndarray, factor: int) -> np.ndarray:
    """Images pooled by the factor."""
    b, h, w, c = images.shape
    return images.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def accuracies(
    real: np.ndarray, labels: np.ndarray, samples: np.ndarray, asked: np.ndarray
) -> list[str]:
    """The accuracy of samples by k-NN (k = 3) and an SVM (C = 10) trained on real images."""
    classifiers = KNeighborsClassifier(3), SVC(C=10)
    return [f"{np.mean(c.fit(real, labels).predict(samples) == asked):.3f}" for c in classifiers]


def distances(images: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Euclidean distances (b, 2) of each row to the two nearest rows of `real`."""
    squared = (images**2).sum(1)[:, None] + (real**2).sum(1) - 2 * images @ real.T
    return np.sqrt(np.partition(np.maximum(squared, 0), 1, axis=1)[:, :2])


def main(paths: list[str]) -> None:
    """Prints one Markdown row per file."""
    everything = open_prepared("data/digits").batch(np.arange(5000))
    real, labels = everything["image"], everything["label"]
    to_real = distances(to_features(real), to_features(real))[:, 1]  # [:, 0] is the image itself
    # A copy is nearer to a training digit than 99 % of its class's training digits are to each
    # other.
    closest = np.array([np.quantile(to_real[labels == c], 0.01) for c in range(10)])
    median, least = np.median(to_real), np.quantile(to_real, 0.01)
    print(f"real digits to the nearest other: median {median:.2f}, 1 % {least:.2f}\n")
    columns = ["samples", "stage 1 k-NN", "stage 1 SVM", "final k-NN", "final SVM"]
    columns += ["nearest real: median, 1 %", "copies"]
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|")
    for path in paths:
        made = np.load(path)
        small = accuracies(
            to_features(shrink(real, 4)), labels, to_features(made["stage1"]), made["labels"]
        )
        final = accuracies(to_features(real), labels, to_features(made["images"]), made["labels"])
        near = distances(to_features(made["images"]), to_features(real))[:, 0]
        copies = np.mean(near < closest[made["labels"]])
        cells = [
            path,
            *small,
            *final,
            f"{np.median(near):.2f}, {np.quantile(near, 0.01):.2f}",
            f"{copies:.1%}",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
