"""LCM and DMD2 on DDIL's mixture over latents with prompts, in PyTorch with diffusers' UNet: what ours are compared with.

Written as one would there: channels-last, autocast to bfloat16 over float32 parameters, a bfloat16 teacher, fused AdamW,
foreach averages. The same step as ours (teacher with guidance, loss, clipping, averages, rollouts, replay), without its
metrics. Epsilon-prediction on the 1,000 times of Stable Diffusion; the student of LCM is told its guidance scale; DMD2
is without its GAN term.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def embed_guidance(scale: Tensor, width: int) -> Tensor:
  """[B, width] of LCM's guidance weight, `scale` - 1."""
  half = width // 2
  frequencies = torch.exp(-math.log(1e4) / (half - 1) * torch.arange(half, device=scale.device))
  angles = 1000 * (scale - 1)[:, None] * frequencies
  return torch.cat([angles.sin(), angles.cos()], dim=1)


def wide(v: Tensor) -> Tensor:
  return v[:, None, None, None]


class Step:
  """A training step with all that it changes: `step(batch) -> {player: loss}`.

  Args:
    method: "lcm" or "dmd2".
    nets: {"student", "teacher", "target" of LCM or "critic" of DMD2, "average"}, on their device.
    options: grid, sampler_grid and teacher_grid (times, the clean end last), alphas_cumprod [1000], priors {source:
      probability}, refresh_every, slots, rates {player: learning rate}, clip, ema, null (text [L,D]), guidance_scale;
      LCM: target_decay, huber, guidance_range, width; DMD2: period, dm_range, cap.
    run: net -> what is called in its place, `torch.compile` for instance.
    dtype: of autocast; None is without.
  """

  def __init__(self, method: str, nets: Mapping[str, nn.Module], options: Mapping[str, Any],
               run: Callable[[nn.Module], Callable] = lambda net: net, dtype: torch.dtype | None = torch.bfloat16):
    self.method, self.o, self.nets, self.count, self.updates = method, options, nets, 0, 0
    self.device, self._dtype, self._buffers = next(nets["student"].parameters()).device, dtype, {}
    players = ("student", "critic")[:1 + (method == "dmd2")]
    for name, net in nets.items():
      net.to(memory_format=torch.channels_last).requires_grad_(name in players)
    self._run = {name: run(net) for name, net in nets.items()}
    fused = {"fused": True} if self.device.type == "cuda" else {}
    self._optimizers = {name: torch.optim.AdamW(nets[name].parameters(), options["rates"][name], weight_decay=1e-4,
                                                **fused) for name in players}
    number = lambda v: torch.tensor(np.asarray(v), dtype=torch.float32, device=self.device)  # noqa: E731
    self._table = torch.cat([number(options["alphas_cumprod"]), number([1.0])])  # the clean end is at -1
    self._null = number(options["null"])
    self._grids = {name: number(options[name]) for name in ("grid", "sampler_grid", "teacher_grid")}

  # Maths ------------------------------------------------------------------------------------

  def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
    cumprod = self._table[t.long()]
    return wide(cumprod.sqrt()), wide((1 - cumprod).sqrt())

  def _noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = self._scales(t)
    return alpha * x0 + sigma * noise

  def _x0(self, name: str, x: Tensor, t: Tensor, text: Tensor, scale: Tensor | None = None) -> Tensor:
    told = {} if scale is None else {"timestep_cond": embed_guidance(scale, self.o["width"])}
    with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
      eps = self._run[name](x, t, encoder_hidden_states=text, return_dict=False, **told)[0]
    alpha, sigma = self._scales(t)
    return (x - sigma * eps.float()) / alpha

  def _guided(self, x: Tensor, t: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    both = torch.cat([text, self._null.expand_as(text)])
    with_prompt, without = self._x0("teacher", torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    return without + (wide(scale) if isinstance(scale, Tensor) else scale) * (with_prompt - without)

  def _ddim(self, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    (alpha_t, sigma_t), (alpha_s, sigma_s) = self._scales(t), self._scales(s)
    return alpha_s * x0 + sigma_s * (x - alpha_t * x0) / sigma_t

  def _consistency(self, name: str, x: Tensor, t: Tensor, s: Mapping[str, Tensor]) -> Tensor:
    scaled = wide(10 * t)
    total = scaled**2 + 0.25
    return 0.25 / total * x + scaled / total.sqrt() * self._x0(name, x, t, s["text"], s["guidance_scale"])

  # Losses -----------------------------------------------------------------------------------

  def _lcm(self, s: Mapping[str, Tensor]) -> Tensor:
    end = self._grids["grid"].clamp(min=0)[s["k"] + 1]
    with torch.no_grad():
      x_s = self._ddim(s["x_t"], self._guided(s["x_t"], s["t"], s["text"], s["guidance_scale"]), s["t"], end)
      goal = self._consistency("target", x_s, end, s)
    c = self.o["huber"]
    return (((self._consistency("student", s["x_t"], s["t"], s) - goal) ** 2 + c**2).sqrt() - c).mean()

  def _generator(self, s: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    x = self._x0("student", s["x_t"], s["t"], s["text"])
    with torch.no_grad():
      x_t = self._noised(x, s["dm_noise"], s["dm_t"])
      real = self._guided(x_t, s["dm_t"], s["text"], self.o["guidance_scale"])
      fake = self._x0("critic", x_t, s["dm_t"], s["text"])
      norm = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-8)
      goal = x - torch.nan_to_num((fake - real) / norm)
    return 0.5 * ((x - goal) ** 2).mean(), x.detach()

  def _critic(self, s: Mapping[str, Tensor], x: Tensor) -> Tensor:
    t = s["critic_t"]
    x0 = self._x0("critic", self._noised(x, s["critic_noise"], t), t, s["text"])
    alpha, sigma = self._scales(t)
    weight = (alpha / sigma).flatten() ** 2
    return (weight.clamp_max(self.o["cap"]) * ((x0 - x) ** 2).mean(dim=(1, 2, 3))).mean()

  # The step ---------------------------------------------------------------------------------

  def __call__(self, batch: Mapping[str, np.ndarray], states: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """One step on a batch with "image" [B,H,W,C] and "text" [B,L,D]; `states` instead of its own draws."""
    s = self.draw(batch) if states is None else states
    if self.method == "lcm":
      losses = {"student": self._update("student", self._lcm(s))}
    elif self.count % self.o["period"] == 0:
      loss, x = self._generator(s)
      critic = self._critic(s, x)
      losses = {"student": self._update("student", loss), "critic": self._update("critic", critic)}
    else:
      with torch.no_grad():
        x = self._x0("student", s["x_t"], s["t"], s["text"])
      losses = {"critic": self._update("critic", self._critic(s, x))}
    self.count += 1
    return {name: loss.item() for name, loss in losses.items()}

  def _update(self, player: str, loss: Tensor) -> Tensor:
    params, optimizer = list(self.nets[player].parameters()), self._optimizers[player]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(params, self.o["clip"], foreach=True)
    optimizer.step()
    if player == "student":
      kept = {"average": min(self.o["ema"], (1 + self.updates) / (10 + self.updates)),
              "target": self.o.get("target_decay")}
      self.updates += 1
      with torch.no_grad():
        for name, decay in kept.items():
          if name in self.nets:
            torch._foreach_lerp_(list(self.nets[name].parameters()), params, 1 - decay)
    return loss.detach()

  def draw(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Training states of a batch with PyTorch's own random numbers: of one source, chosen by the priors."""
    x0, text = self.images(batch["image"]), torch.from_numpy(batch["text"]).to(self.device)
    names, priors = zip(*self.o["priors"].items())
    source = names[int(torch.multinomial(torch.tensor(priors), 1))]
    if source == "forward":
      k = torch.randint(0, len(self._grids["grid"]) - 1, (len(text),), device=self.device)
      t = self._grids["grid"][k]
      s = {"x_t": self._noised(x0, torch.randn_like(x0), t), "t": t, "k": k, "text": text} | self._condition(text)
    else:
      s = self._replayed(source, x0, text)
    if self.method == "dmd2":
      low, high = (round(1000 * v) for v in self.o["dm_range"])
      count = (len(text),)
      s |= {"dm_t": torch.randint(low, high + 1, count, device=self.device), "dm_noise": torch.randn_like(x0),
            "critic_t": torch.randint(0, 1000, count, device=self.device), "critic_noise": torch.randn_like(x0)}
    return s

  def images(self, array: np.ndarray) -> Tensor:
    """[B,H,W,C] as [B,C,H,W] on the device, channels-last in memory."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(self.device).permute(0, 3, 1, 2)

  def _condition(self, text: Tensor) -> dict[str, Tensor]:
    if self.method != "lcm":
      return {}
    low, high = self.o["guidance_range"]
    return {"guidance_scale": low + (high - low) * torch.rand(len(text), device=self.device)}

  # Rollouts and replay ----------------------------------------------------------------------

  def _replayed(self, source: str, like: Tensor, text: Tensor) -> dict[str, Tensor]:
    buffer = self._buffers.get(source)
    if buffer is None or self.count - buffer["refreshed"] >= self.o["refresh_every"]:
      buffer = self._push(source, self._walk(source, like, text), buffer)
    lanes = torch.arange(len(text), device=self.device)
    slot = torch.randint(0, min(buffer["pushed"], self.o["slots"]), (len(text),), device=self.device)
    return {name: rows[lanes, slot] for name, rows in buffer["states"].items()}

  def _push(self, source: str, visited: list[dict[str, Tensor]], buffer: dict | None) -> dict:
    if buffer is None:
      empty = {name: v.new_zeros((len(v), self.o["slots"], *v.shape[1:])) for name, v in visited[0].items()}
      buffer = self._buffers[source] = {"states": empty, "pushed": 0}
    for state in visited:
      for name, rows in buffer["states"].items():
        rows[:, buffer["pushed"] % self.o["slots"]] = state[name]
      buffer["pushed"] += 1
    buffer["refreshed"] = self.count
    return buffer

  @torch.no_grad()
  def _walk(self, source: str, like: Tensor, text: Tensor) -> list[dict[str, Tensor]]:
    """A walk from noise, and of each of its intervals the state at one training time, if there is one."""
    grid, times = self._grids["teacher_grid" if source == "teacher" else "sampler_grid"], self._grids["grid"][:-1]
    condition, x, visited = self._condition(text), torch.randn_like(like), []
    scale = condition.get("guidance_scale", self.o["guidance_scale"])
    at = lambda time: time.expand(len(text))  # noqa: E731
    for now, then in zip(grid[:-1], grid[1:]):
      t = at(now)
      if source == "teacher":
        x0 = self._guided(x, t, text, scale)
        move = lambda s, x=x, x0=x0, t=t: self._ddim(x, x0, t, s)  # noqa: E731
      else:
        x0 = (self._consistency("student", x, t, {"text": text} | condition) if self.method == "lcm"
              else self._x0("student", x, t, text))
        noise = torch.randn_like(x)
        move = lambda s, x0=x0, noise=noise: self._noised(x0, noise, s)  # noqa: E731
      inside = ((times <= now + 1e-3) & (times > then + 1e-3)).nonzero().flatten()
      if len(inside):
        k = inside[torch.randint(0, len(inside), (len(text),), device=self.device)]
        own = wide(times[k] == now)
        visited.append({"x_t": torch.where(own, x, move(times[k])), "t": times[k], "k": k, "text": text} | condition)
      x = move(at(then))
    return visited
