"""scikit-learn's handwritten digits: 1,797 images of 8 x 8, 10 classes. The embedded default."""

import numpy as np

from ddil_jax.data.builder import ImageBuilder

NUM_TEST = 500


class Digits(ImageBuilder, skip_registration=True):
  """Digits as a tfds builder: train 1,297, test 500, pixels 0..16.

  The split needs no random numbers: sort by class (stable, in the order of the file) and take the
  j-th of the N to test where `floor((j + 1) 500 / N) > floor(j 500 / N)`. That spreads the test set
  evenly over the classes and over the file, whose order is that of the writers.
  """
  IMAGE_SHAPE = (8, 8, 1)
  CLASSES = tuple("0123456789")
  PIXEL_MAX = 16
  ABOUT = "Optical recognition of handwritten digits, 8x8, pixels 0..16 (scikit-learn's load_digits)."
  HOMEPAGE = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"

  def read(self):
    from sklearn.datasets import load_digits  # slow to import, and only needed once
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[..., None], digits.target
    test = held_out(labels)
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def held_out(labels: np.ndarray) -> np.ndarray:
  """bool [N]: the examples of the test split, by the rule above."""
  j = np.arange(len(labels))
  chosen = (j + 1) * NUM_TEST // len(labels) > j * NUM_TEST // len(labels)
  mask = np.zeros(len(labels), bool)
  mask[np.argsort(labels, kind="stable")[chosen]] = True
  return mask
