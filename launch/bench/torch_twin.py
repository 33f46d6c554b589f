"""The project's UNet and training steps in PyTorch, as one would write them there: what ours are compared with.

Weights come from our parameters. The steps hold what a step of ours does (draws, teacher, loss, gradient, clipping,
Adam, averages; DMD2's rollouts and replay), without its metrics. Of the demo's networks only: pixels and labels, no
attention, v-prediction, cosine log-SNR, no guidance, no GAN.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddil_jax.models.layers import num_groups

Params = Mapping[str, Any]


class ResBlock(nn.Module):
  """`ddil_jax/models/unet.py::ResBlock`."""

  def __init__(self, inputs: int, channels: int, embedding: int):
    super().__init__()
    self.norm_in = nn.GroupNorm(num_groups(inputs), inputs)
    self.conv_in = nn.Conv2d(inputs, channels, 3, padding=1)
    self.film = nn.Linear(embedding, 2 * channels)
    self.norm_out = nn.GroupNorm(num_groups(channels), channels)
    self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
    self.skip = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

  def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
    h = self.conv_in(F.silu(self.norm_in(x)))
    scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
    return self.skip(x) + self.conv_out(F.silu(self.norm_out(h) * (1 + scale) + shift))


class UNet(nn.Module):
  """`ddil_jax/models/unet.py::UNet`, `(x [B,C,H,W], t [B], label [B]) -> [B,C,H,W]`."""

  def __init__(self, channels: int, channel_mult: tuple[int, ...], num_res_blocks: int, image_channels: int,
               num_classes: int):
    super().__init__()
    self.width, self.levels, self.blocks = 4 * channels, len(channel_mult), num_res_blocks
    self.time_0, self.time_1 = nn.Linear(self.width, self.width), nn.Linear(self.width, self.width)
    self.label = nn.Embedding(num_classes + 1, self.width)
    self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
    h, skips = channels, []
    for i, mult in enumerate(channel_mult):
      for j in range(num_res_blocks):
        self.add_module(f"down_{i}_{j}", ResBlock(h, channels * mult, self.width))
        h = channels * mult
        skips.append(h)
    self.mid_0, self.mid_1 = ResBlock(h, h, self.width), ResBlock(h, h, self.width)
    for i, mult in reversed(list(enumerate(channel_mult))):
      for j in range(num_res_blocks):
        self.add_module(f"up_{i}_{j}", ResBlock(h + skips.pop(), channels * mult, self.width))
        h = channels * mult
      if i:
        self.add_module(f"upsample_{i}", nn.Conv2d(h, h, 3, padding=1))
    self.norm_out = nn.GroupNorm(num_groups(h), h)
    self.conv_out = nn.Conv2d(h, image_channels, 3, padding=1)
    half = self.width // 2
    frequencies = torch.exp(-math.log(1e4) / max(half - 1, 1) * torch.arange(half))
    self.register_buffer("frequencies", frequencies, persistent=False)

  def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    angles = t[:, None] * self.frequencies
    embedding = self.time_1(F.silu(self.time_0(torch.cat([angles.sin(), angles.cos()], dim=1))))
    embedding = F.silu(embedding + self.label(label))
    block = lambda name, h: self.get_submodule(name)(h, embedding)  # noqa: E731
    h, skips = self.conv_in(x), []
    for i in range(self.levels):
      h = F.avg_pool2d(h, 2, ceil_mode=True, count_include_pad=False) if i else h
      for j in range(self.blocks):
        h = block(f"down_{i}_{j}", h)
        skips.append(h)
    h = block("mid_1", block("mid_0", h))
    for i in reversed(range(self.levels)):
      for j in range(self.blocks):
        h = block(f"up_{i}_{j}", torch.cat([h, skips.pop()], dim=1))
      if i:
        height, width = skips[-1].shape[2:]
        h = F.interpolate(h, scale_factor=2, mode="nearest")[:, :, :height, :width]
        h = self.get_submodule(f"upsample_{i}")(h)
    return self.conv_out(F.silu(self.norm_out(h)))


def flat(tree: Params, path: str = "") -> dict[str, np.ndarray]:
  """{"a.b.c": array} of nested dicts."""
  out = {}
  for name, value in tree.items():
    out |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: np.asarray(value)}
  return out


def load(net: UNet, params: Params) -> UNet:
  """Puts our parameters into a net; every one has its place.

  Raises:
    RuntimeError: names or shapes that do not fit.
  """
  state, wanted = {}, net.state_dict()
  for name, value in flat(params).items():
    folder, _, kind = name.rpartition(".")
    key = f"{folder}.{ {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight'}.get(kind, kind) }"
    if kind == "kernel":
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    state[key] = torch.tensor(value)
    if key in wanted and wanted[key].ndim == 4 and value.ndim == 2:  # a dense layer over the channels
      state[key] = state[key][:, :, None, None]
  net.load_state_dict(state)
  return net.to(memory_format=torch.channels_last)


# Maths, on images [B,C,H,W] and times [B] -------------------------------------------------------------------

_B = math.atan(math.exp(-10.0))
_A = math.atan(math.exp(10.0)) - _B


def snr(t: Tensor) -> Tensor:
  """Cosine log-SNR from -20 to 20: SNR(t)."""
  return torch.tan(_A * t + _B) ** -2


def scales(t: Tensor) -> tuple[Tensor, Tensor]:
  """alpha and sigma [B,1,1,1]; 1 and 0 at the clean end."""
  log_snr = -2 * torch.log(torch.tan(_A * t + _B))
  alpha = torch.where(t > 0, torch.sigmoid(log_snr).sqrt(), 1.0)
  sigma = torch.where(t > 0, torch.sigmoid(-log_snr).sqrt(), 0.0)
  return alpha[:, None, None, None], sigma[:, None, None, None]


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
  alpha, sigma = scales(t)
  return alpha * x0 + sigma * noise


def denoise(net: UNet, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
  """x0 of a v-prediction."""
  alpha, sigma = scales(t)
  return alpha * x_t - sigma * net(x_t, 1000 * t, label)


def ddim(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
  (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(t), scales(s)
  return alpha_s * x0 + sigma_s * (x_t - alpha_t * x0) / sigma_t


def mse(a: Tensor, b: Tensor) -> Tensor:
  return ((a - b) ** 2).mean(dim=(1, 2, 3))


# Losses: (denoisers by name, states) -> scalar --------------------------------------------------------------


def denoising(d, s):
  return ((1 + snr(s["t"])) * mse(d["student"](s["x_t"], s["t"], s["label"]), s["x0"])).mean()


def pd(d, s, cap: float):
  t, mid, end, label = s["t"], s["mid"], s["s"], s["label"]
  with torch.no_grad():
    x_mid = ddim(s["x_t"], d["teacher"](s["x_t"], t, label), t, mid)
    x_s = ddim(x_mid, d["teacher"](x_mid, mid, label), mid, end)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(t), scales(end)
    ratio = sigma_s / sigma_t
    target = (x_s - ratio * s["x_t"]) / (alpha_s - ratio * alpha_t)
  return (snr(t).clamp(1, cap) * mse(d["student"](s["x_t"], t, label), target)).mean()


def consistency(denoiser, x_t, t, label):
  """LCM's c_skip x + c_out x0, times in steps of 1000."""
  scaled = (10 * 999 * t)[:, None, None, None]
  total = scaled**2 + 0.25
  return 0.25 / total * x_t + scaled / total.sqrt() * denoiser(x_t, t, label)


def lcm(d, s):
  with torch.no_grad():
    x_s = ddim(s["x_t"], d["teacher"](s["x_t"], s["t"], s["label"]), s["t"], s["s"])
    goal = consistency(d["target"], x_s, s["s"], s["label"])
  return mse(consistency(d["student"], s["x_t"], s["t"], s["label"]), goal).mean()


def dmd2_generator(d, s):
  """The loss, and the image, of which the critic learns."""
  x = d["student"](s["x_t"], s["t"], s["label"])
  with torch.no_grad():
    x_t = add_noise(x, s["dm_noise"], s["dm_t"])
    real, fake = (d[name](x_t, s["dm_t"], s["label"]) for name in ("teacher", "critic"))
    norm = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-8)
    goal = x - torch.nan_to_num((fake - real) / norm)
  return 0.5 * mse(x, goal).mean(), x.detach()


def dmd2_critic(d, s, x, cap: float):
  t = s["critic_t"]
  x0 = d["critic"](add_noise(x, s["critic_noise"], t), t, s["label"])
  return ((1 + snr(t)).clamp_max(cap) * mse(x0, x)).mean()


class Step:
  """A training step with all that it changes: `step(batch) -> {player: loss}`.

  Args:
    method: "denoising", "pd", "lcm" or "dmd2".
    make_net: () -> a UNet.
    params: {player: our parameters}; teacher: ours, or ().
    options: grid, fine_grid (PD), rates {player: learning rate}, clip, ema, target_decay, cap, period, dm_range,
      refresh_every, slots, label_dropout, t_min, num_classes.
    denoiser: `denoise`, or the same by `torch.compile`.
  """

  def __init__(self, method: str, make_net: Callable[[], UNet], params: Mapping[str, Params], teacher: Params,
               options: Mapping[str, Any], denoiser=denoise):
    self.method, self.o, self.count, self.updates, self._buffer = method, options, 0, 0, None
    self.nets = {name: load(make_net(), p.get("net", p)) for name, p in params.items()}
    for name in ("average", *(["target"] if method == "lcm" else [])):
      self.nets[name] = load(make_net(), params["student"])
    if teacher:
      self.nets["teacher"] = load(make_net(), teacher)
    for name in self.nets.keys() - params.keys():
      self.nets[name].requires_grad_(False)
    self._grid = torch.tensor(np.asarray(options["grid"]), dtype=torch.float32)
    self._optimizers = {name: torch.optim.Adam(self.nets[name].parameters(), options["rates"][name], fused=True)
                        for name in params}
    self._denoisers = {name: functools.partial(denoiser, net) for name, net in self.nets.items()}

  def __call__(self, batch: Mapping[str, np.ndarray], states: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """One step; `states` instead of its own draws."""
    s = self.draw(batch) if states is None else states
    out = {}
    d = self._denoisers
    if self.method == "dmd2":
      due = self.count % self.o["period"] == 0
      loss, x = dmd2_generator(d, s) if due else (None, self._generate(s["x_t"], s["t"], s["label"]))
      critic = dmd2_critic(d, s, x, self.o["cap"])
      if due:
        out["student"] = self._update("student", loss)
      out["critic"] = self._update("critic", critic)
    else:
      loss = {"denoising": denoising, "lcm": lcm, "pd": functools.partial(pd, cap=self.o.get("cap"))}[self.method]
      out["student"] = self._update("student", loss(d, s))
    self.count += 1
    return out

  @torch.no_grad()
  def _generate(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return self._denoisers["student"](x_t, t, label)

  def _update(self, player: str, loss: Tensor) -> float:
    params, optimizer = list(self.nets[player].parameters()), self._optimizers[player]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(params, self.o["clip"], foreach=True)
    optimizer.step()
    if player == "student":
      decay = min(self.o["ema"], (1 + self.updates) / (10 + self.updates))
      self.updates += 1
      with torch.no_grad():
        for name, keep in (("average", decay), ("target", self.o.get("target_decay"))):
          if name in self.nets:
            torch._foreach_lerp_(list(self.nets[name].parameters()), params, 1 - keep)
    return loss.item()

  def draw(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Training states of a batch, with PyTorch's own random numbers."""
    x0, label = images(batch["image"]), torch.from_numpy(batch["label"]).long()
    count = len(label)
    if self.method == "denoising":
      t = self.o["t_min"] + (1 - self.o["t_min"]) * torch.rand(count)
      dropped = torch.rand(count) < self.o["label_dropout"]
      return {"x_t": add_noise(x0, torch.randn_like(x0), t), "t": t, "x0": x0,
              "label": torch.where(dropped, self.o["num_classes"], label)}
    if self.method == "dmd2":
      if self.count % self.o["refresh_every"] == 0:
        self._push(x0, label)
      low, high = (round(1000 * v) for v in self.o["dm_range"])
      noise = lambda: torch.randn_like(x0)  # noqa: E731
      return self._replayed() | {"dm_t": (torch.randint(low, high + 1, (count,)) + 1) / 1000, "dm_noise": noise(),
                                 "critic_t": (torch.randint(0, 1000, (count,)) + 1) / 1000, "critic_noise": noise()}
    k = torch.randint(0, len(self._grid) - 1, (count,))
    t = self._grid[k]
    return {"x_t": add_noise(x0, torch.randn_like(x0), t), "t": t, "label": label} | self.times(k)

  def times(self, k: Tensor) -> dict[str, Tensor]:
    """The later times that a label needs."""
    out = {"s": self._grid[k + 1]}
    if self.method == "pd":
      out["mid"] = torch.tensor(self.o["fine_grid"], dtype=torch.float32)[2 * k + 1]
    return out

  def _push(self, like: Tensor, label: Tensor) -> None:
    """A walk of the student from noise, which re-noises; all states that it visits go into the buffer."""
    count, slots, visited = len(label), self.o["slots"], len(self._grid) - 1
    if self._buffer is None:
      self._pushed = 0
      self._buffer = {"x_t": torch.zeros((count, slots) + like.shape[1:]), "t": torch.zeros(count, slots),
                      "label": torch.zeros(count, slots, dtype=torch.long)}
    x = torch.randn_like(like)
    for i in range(visited):
      t, slot = self._grid[i].expand(count), self._pushed % slots
      for name, value in (("x_t", x), ("t", t), ("label", label)):
        self._buffer[name][:, slot] = value
      self._pushed += 1
      if i + 1 < visited:
        x = add_noise(self._generate(x, t, label), torch.randn_like(x), self._grid[i + 1].expand(count))

  def _replayed(self) -> dict[str, Tensor]:
    lanes = torch.arange(len(self._buffer["t"]))
    slot = torch.randint(0, min(self._pushed, self.o["slots"]), lanes.shape)
    return {name: rows[lanes, slot] for name, rows in self._buffer.items()}


def images(array: np.ndarray) -> Tensor:
  """[B,H,W,C] as [B,C,H,W] in the memory format that PyTorch has for that, without a copy."""
  return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)
