"""What the metrics are called in tables, and which way is better."""

from typing import NamedTuple


class Meaning(NamedTuple):
  """A metric in words; `better` is "lower", "higher", or "" where neither is."""
  title: str
  better: str
  about: str

  @property
  def heading(self) -> str:
    return self.title[:1].upper() + self.title[1:]

  @property
  def sentence(self) -> str:
    return f"{self.better} is better: {self.about}" if self.better else self.about


METRICS = {
    "fd": Meaning("Fréchet distance", "lower", "squared, of Gaussians fitted to the extractor's features"),
    "kd": Meaning("kernel distance", "lower", "unbiased squared MMD, cubic kernel, so it may be negative"),
    "precision": Meaning("precision", "higher", "share of samples near the reference"),
    "recall": Meaning("recall", "higher", "share of the reference near the samples"),
    "density": Meaning("density", "higher", "how densely the reference lies around the samples"),
    "coverage": Meaning("coverage", "higher", "share of reference points with a sample near them"),
    "class_accuracy": Meaning("class accuracy", "higher", "samples classified as the class asked for"),
    "vendi": Meaning("Vendi score", "higher", "effective number of unlike samples"),
    "diversity": Meaning("diversity", "", "mean distance of two samples of a class; the data have one too"),
    "lpips_diversity": Meaning("LPIPS-diversity", "", "mean LPIPS of two samples of a class; the data have one too"),
    "clip_score": Meaning("CLIP score", "higher", "100 x cosine of an image and its prompt; the data have one too"),
    "r_precision": Meaning("R-precision", "higher", "share of samples whose own prompt CLIP finds among 100"),
    "inception_score": Meaning("inception score", "higher", "sure and evenly spread classes"),
    "inception_score_std": Meaning("deviation of the inception score", "", "over parts of the samples"),
    "saturation": Meaning("saturation", "", "share of pixels at the bound, good or bad only against the data's own"),
}


def of(metric: str) -> Meaning:
  """The meaning of a metric, by kind ("fd") or full name; an unknown one is called as it is, with no direction."""
  kind = metric.partition("@")[0]
  return METRICS.get(kind) or Meaning(kind, "", "")
