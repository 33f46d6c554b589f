"""Fake images of any shape: a smooth pattern per class and noise. For smoke configs and tests."""

import numpy as np

from ddil_jax.data.dataset import Dataset
from ddil_jax.errors import UsageError

_SPLITS = ("train", "test")


def load(split: str = "train", image_size: int = 8, channels: int = 1, num_classes: int = 10,
         num_examples: int = 256, seed: int = 0) -> Dataset:
  """Makes a set from its arguments alone; the classes are the same in both splits, the noise is not.

  `x = clip(0.7 cos(2 pi (f_h h + f_w w + p)) + 0.2 n, -1, 1)`, n ~ N(0, 1), with frequencies f in
  {0, 1, 2} and a phase p per class and channel; labels go round: `i mod num_classes`.

  Raises:
    UsageError: a size below 1.
  """
  sizes = dict(image_size=image_size, channels=channels, num_classes=num_classes, num_examples=num_examples)
  for key, value in sizes.items():
    if value < 1:
      raise UsageError(f"fake: {key} must be at least 1, not {value}")
  rng = np.random.default_rng([seed, image_size, channels, num_classes])
  freq = rng.integers(0, 3, (2, num_classes, channels))
  phase = rng.random((num_classes, channels))
  grid = np.arange(image_size) / image_size
  rows, columns = grid[None, :, None, None], grid[None, None, :, None]
  angle = freq[0][:, None, None] * rows + freq[1][:, None, None] * columns + phase[:, None, None]
  labels = np.arange(num_examples, dtype=np.int32) % num_classes
  noise = np.random.default_rng([seed, 1 + _SPLITS.index(split)]).standard_normal(
      (num_examples, image_size, image_size, channels), dtype=np.float32)
  images = 0.7 * np.cos(2 * np.pi * angle).astype(np.float32)[labels] + np.float32(0.2) * noise
  return Dataset("fake", images.clip(-1, 1), labels, num_classes, (-1.0, 1.0), split)


def load_text(split: str = "train", image_size: int = 8, channels: int = 4, num_classes: int = 10,
              num_examples: int = 256, seed: int = 0, tokens: int = 77, width: int = 16, pooled: int = 0) -> Dataset:
  """The set of `load` with prompts in the place of classes: "text" [N, tokens, width] tells the pattern.

  With `pooled` also SDXL's "text_pooled" [N, pooled] and "time_ids" [N, 6].

  Raises:
    UsageError: a size below 1.
  """
  if tokens < 1 or width < 1:
    raise UsageError(f"fake_text: tokens and width must be at least 1, not {tokens} and {width}")
  made = load(split, image_size, channels, num_classes, num_examples, seed)
  rng = np.random.default_rng([seed, tokens, width])
  tables = {"text": rng.standard_normal((num_classes + 1, tokens, width), np.float32)}
  if pooled:
    sizes = np.float32([image_size, image_size, 0, 0, image_size, image_size])
    tables |= {"text_pooled": rng.standard_normal((num_classes + 1, pooled), np.float32),
               "time_ids": np.tile(sizes, (num_classes + 1, 1))}
  return made._replace(
      name="fake_text", labels=np.zeros_like(made.labels), num_classes=1,
      cond={name: table[made.labels] for name, table in tables.items()},
      null={name: table[num_classes] for name, table in tables.items()},
      captions=[f"pattern {label}" for label in made.labels], bounds=((-1.0,) * channels, (1.0,) * channels))
