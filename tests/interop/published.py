"""The published networks in PyTorch, by their tables in the papers, with random weights under the published names."""

import math

import torch
import torch.nn.functional as F

torch.set_num_threads(1)


class Weights:
  """Random weights, made when a layer first asks for them; `state` is the state dict."""

  def __init__(self, seed: int = 0):
    self.state = {}
    self.generator = torch.Generator().manual_seed(seed)

  def __call__(self, name, *shape, mean=0.0, spread=1.0):
    if name not in self.state:
      self.state[name] = mean + spread * (2 * torch.rand(shape, generator=self.generator) - 1)
    return self.state[name]

  def kernel(self, name, *shape):
    """Uniform, so that ReLU layers keep the size of what passes."""
    return self(name, *shape, spread=(6 / math.prod(shape[1:]))**0.5)

  def convolution(self, x, name, width, kernel, stride=1, padding=0):
    return F.conv2d(x, self.kernel(f"{name}.weight", width, x.shape[1], kernel, kernel),
                    self(f"{name}.bias", width, spread=0.1), stride, padding)


def inception(w: Weights, x):
  """pixels [B,3,299,299] -> (logits without bias, pool3 features); Szegedy et al. 2015, table 1 and figures 5 to 7."""
  def conv(x, name, width, kernel=(1, 1), stride=1, same=True):
    padding = tuple(k // 2 for k in kernel) if same and stride == 1 else 0
    x = F.conv2d(x, w.kernel(f"{name}.conv.weight", width, x.shape[1], *kernel), None, stride, padding)
    mean, var = w(f"{name}.bn.running_mean", width, spread=0.1), w(f"{name}.bn.running_var", width, mean=1, spread=0.5)
    gain, bias = w(f"{name}.bn.weight", width, mean=1, spread=0.5), w(f"{name}.bn.bias", width, spread=0.1)
    w.state.setdefault(f"{name}.bn.num_batches_tracked", torch.tensor(0))
    return F.relu(F.batch_norm(x, mean, var, gain, bias, eps=1e-3))

  def chain(x, *layers):
    for layer in layers:
      x = conv(x, *layer)
    return x

  def pool(x, name, width, average=True):
    pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if average else F.max_pool2d(x, 3, 1, 1)
    return conv(pooled, f"{name}.branch_pool", width)

  x = chain(x, ("Conv2d_1a_3x3", 32, (3, 3), 2), ("Conv2d_2a_3x3", 32, (3, 3), 1, False), ("Conv2d_2b_3x3", 64, (3, 3)))
  x = F.max_pool2d(x, 3, 2)
  x = F.max_pool2d(chain(x, ("Conv2d_3b_1x1", 80), ("Conv2d_4a_3x3", 192, (3, 3), 1, False)), 3, 2)
  for n, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
    x = torch.cat([conv(x, f"{n}.branch1x1", 64),
                   chain(x, (f"{n}.branch5x5_1", 48), (f"{n}.branch5x5_2", 64, (5, 5))),
                   chain(x, (f"{n}.branch3x3dbl_1", 64), (f"{n}.branch3x3dbl_2", 96, (3, 3)),
                         (f"{n}.branch3x3dbl_3", 96, (3, 3))), pool(x, n, width)], 1)
  n = "Mixed_6a"
  x = torch.cat([conv(x, f"{n}.branch3x3", 384, (3, 3), 2),
                 chain(x, (f"{n}.branch3x3dbl_1", 64), (f"{n}.branch3x3dbl_2", 96, (3, 3)),
                       (f"{n}.branch3x3dbl_3", 96, (3, 3), 2)), F.max_pool2d(x, 3, 2)], 1)
  row, column = (1, 7), (7, 1)
  for n, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
    x = torch.cat([conv(x, f"{n}.branch1x1", 192),
                   chain(x, (f"{n}.branch7x7_1", c), (f"{n}.branch7x7_2", c, row), (f"{n}.branch7x7_3", 192, column)),
                   chain(x, (f"{n}.branch7x7dbl_1", c), (f"{n}.branch7x7dbl_2", c, column),
                         (f"{n}.branch7x7dbl_3", c, row), (f"{n}.branch7x7dbl_4", c, column),
                         (f"{n}.branch7x7dbl_5", 192, row)), pool(x, n, 192)], 1)
  n = "Mixed_7a"
  x = torch.cat([chain(x, (f"{n}.branch3x3_1", 192), (f"{n}.branch3x3_2", 320, (3, 3), 2)),
                 chain(x, (f"{n}.branch7x7x3_1", 192), (f"{n}.branch7x7x3_2", 192, row),
                       (f"{n}.branch7x7x3_3", 192, column), (f"{n}.branch7x7x3_4", 192, (3, 3), 2)),
                 F.max_pool2d(x, 3, 2)], 1)
  for n, average in (("Mixed_7b", True), ("Mixed_7c", False)):
    three = conv(x, f"{n}.branch3x3_1", 384)
    twice = chain(x, (f"{n}.branch3x3dbl_1", 448), (f"{n}.branch3x3dbl_2", 384, (3, 3)))
    x = torch.cat([conv(x, f"{n}.branch1x1", 320),
                   conv(three, f"{n}.branch3x3_2a", 384, (1, 3)), conv(three, f"{n}.branch3x3_2b", 384, (3, 1)),
                   conv(twice, f"{n}.branch3x3dbl_3a", 384, (1, 3)), conv(twice, f"{n}.branch3x3dbl_3b", 384, (3, 1)),
                   pool(x, n, 192, average)], 1)
  features = x.mean((2, 3))
  w("fc.bias", 1008)
  return features @ w.kernel("fc.weight", 1008, 2048).T, features


def lpips(w: Weights, a, b, net: str):
  """images a, b [B,3,H,W] in [-1, 1] -> distance [B]; Zhang et al. 2018, eq. 1."""
  vgg = [(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]

  def taps(x):
    x = (x - torch.tensor([-.030, -.088, -.188])[:, None, None]) / torch.tensor([.458, .448, .450])[:, None, None]
    if net == "alex":
      x = F.relu(w.convolution(x, "features.0", 64, 11, 4, 2))
      yield x
      x = F.relu(w.convolution(F.max_pool2d(x, 3, 2), "features.3", 192, 5, 1, 2))
      yield x
      x = F.max_pool2d(x, 3, 2)
      for index, width in ((6, 384), (8, 256), (10, 256)):
        x = F.relu(w.convolution(x, f"features.{index}", width, 3, 1, 1))
        yield x
      return
    index = 0
    for stage, (convolutions, width) in enumerate(vgg):
      if stage:
        x, index = F.max_pool2d(x, 2, 2), index + 1
      for _ in range(convolutions):
        x, index = F.relu(w.convolution(x, f"features.{index}", width, 3, 1, 1)), index + 2
      yield x

  distance = 0
  for i, (f, g) in enumerate(zip(taps(a), taps(b), strict=True)):
    head = w(f"lin{i}.model.1.weight", 1, f.shape[1], 1, 1, mean=0.5, spread=0.5)
    f, g = (v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (f, g))
    distance = distance + F.conv2d((f - g).square(), head).mean((1, 2, 3))
  for name in ("classifier.1.weight", "classifier.1.bias"):  # in the published files, of no use here
    w(name, 4)
  return distance
