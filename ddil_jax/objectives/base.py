"""What a distillation method is: players with losses, a training grid, a student's sampler.

A method is one file with `make(parts, **options) -> Objective`. Its losses are per example; the
mean, the optimizers and the devices are the training step's business. The state distribution is
independent of it: any objective takes its states from any mixture, except that one with
`needs_x0` (its loss uses the clean image) is defined on forward states and teacher pairs only.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddil_jax import keys as keys_lib
from ddil_jax import lora as lora_lib
from ddil_jax import registry
from ddil_jax.diffusion.process import Process
from ddil_jax.diffusion.rollout import finish
from ddil_jax.diffusion.solvers import Solver, renoise
from ddil_jax.diffusion.transforms import Transform
from ddil_jax.errors import UsageError
from ddil_jax.states.base import Context, States
from ddil_jax.types import Array, Cond, Denoiser, DenoiseFn, Params

Metrics = dict[str, Array]


class Adapted(NamedTuple):
  """The teacher's network with adapters in its blocks.

  Attributes:
    denoiser: of {"base": the teacher's params, "adapter": the adapters'}.
    init: (key, teacher params) -> the adapters' params, which change nothing at first.
    learns: whether an adapter's parameter, by its path, is trained.
  """
  denoiser: Denoiser
  init: Callable[[Array, Params], Params]
  learns: Callable[[str], bool]


class FeatureNet(NamedTuple):
  """A network that reads images and whose layers are features of them.

  Attributes:
    init: key -> params at random.
    load: () -> its trained params; reads files, so not inside a traced function.
    layers: (params, images [B,H,W,C] in [-1, 1], names) -> {name: [B,h,w,c]}.
  """
  init: Callable[[Array], Params]
  load: Callable[[], Params]
  layers: Callable[[Params, Array, tuple[str, ...]], dict[str, Array]]


class Parts(NamedTuple):
  """The networks and maths that `build` hands to every objective.

  Attributes:
    process: the forward process.
    make_grid: n -> decreasing times [n+1], the last the clean end.
    student, teacher, critic: denoisers; teacher is None when there is none (teacher training).
    init_student, init_critic: (key, teacher params, () where there are none) -> params.
    init_head: (key, feature [B,h,w,c]) -> params of the GAN head; head: (params, feature) -> logits [B].
    guidance: scale (number or None = per state) -> Transform of the teacher.
    null: cond -> the same examples without label and prompt.
    cond: what the data is conditioned on, as shapes of a batch of 1.
    num_classes: 0 for unconditional data; else the null label.
    reflect_teacher, reflect_target, reflect_sampler: the transforms at the three places.
    adapt: hidden width -> Adapted; None where the teacher's network takes no adapters.
    feature_net: name -> FeatureNet; "" is the data set's own classifier.
  """
  process: Process
  make_grid: Callable[[int], np.ndarray]
  student: Denoiser
  init_student: Callable[[Array, Params], Params]
  teacher: Denoiser | None
  critic: Denoiser | None
  init_critic: Callable[[Array, Params], Params] | None
  head: Callable[[Params, Array], Array] | None
  init_head: Callable[[Array, Array], Params] | None
  guidance: Callable[[float | None], Transform]
  null: Callable[[Cond], Cond]
  cond: Cond
  guidance_scale: float
  num_classes: int
  image_shape: tuple[int, int, int]
  reflect_teacher: Transform
  reflect_target: Transform
  reflect_sampler: Transform
  adapt: Callable[[int], Adapted] | None = None
  feature_net: Callable[[str], FeatureNet] | None = None


def of_others(values: Array, mean: Array, count: int) -> Array:
  """For each of `count` values, of which [B, ...] are given and `mean` [...] is the mean, the mean of all others."""
  return mean[None] + (mean[None] - values) / max(count - 1, 1)


class View(NamedTuple):
  """What a loss sees besides the parameters that it trains: everything as of the start of the step.

  `mean` averages values [B, ...] over the batch on all devices (of one pass where gradients are accumulated), and
  `others` gives each example [B, ...] the mean without its own; carry no gradient through them. `key` is the
  step's, the same on every device, for what a batch has in common. `unroll`: loops with gradients are to be written
  out (`training/step.py::Layout`).
  """
  params: Mapping[str, Params]
  ema: Mapping[str, Params]
  teacher: Params
  step: Array
  mean: Callable[[Array], Array] = functools.partial(jnp.mean, axis=0)
  others: Callable[[Array], Array] = lambda values: of_others(values, values.mean(axis=0), len(values))
  key: Array | None = None
  unroll: bool = False


class Player(NamedTuple):
  """A network that trains: `loss(params, view, states, batch, keys [B]) -> (loss [B], {metric: [B]})`.

  It is updated at the steps divisible by `period`, in the order of the objective's players.
  `trainable`, on a parameter's path such as "net/W1" or "adapter/0/kernel", says which of its
  parameters learn; None is all. The others keep their values, whatever the optimizer.
  """
  name: str
  loss: Callable[[Params, View, States, dict[str, Array], Array], tuple[Array, Metrics]]
  period: int = 1
  trainable: Callable[[str], bool] | None = None


class Objective(NamedTuple):
  """A method.

  Attributes:
    name: the file's name.
    grid: [N+1] training times; states are at grid[:-1].
    sampler_grid: [K+1] times of the student's sampler.
    solver: the student's sampler.
    student: its denoiser as sampled, boundary scalings included.
    teacher: teacher params -> guided and reflected DenoiseFn; None without a teacher.
    init: (key, teacher params) -> {player: params}.
    players: in update order; the first is the student.
    draw: keys [B] -> (k int32 [B], t [B]) training times.
    condition: (keys [B], cond) -> cond of a training state.
    targets: {name: decay}: EMAs of the student that the losses read from `view.ema`.
    needs_x0: the loss uses the clean image, which forward states and teacher pairs have.
    reads: entries of the condition, beyond the label, that the student's network has to be told:
      "guidance_scale", "end_time".
    prior_first: forward states at index 0 are pure noise.
    own_source: the states on which the base method trains.
    diagnose: (View, states, Context) -> {name: [B]}: what the method measures of itself now and then,
      outside the step (`training/step.py::make_diagnose`); None for nothing.
    complete: (the student's params, the teacher's) -> those of `student`, for a student that is a part of a
      network whose rest is the frozen teacher; None: its own are all.
  """
  name: str
  grid: np.ndarray
  sampler_grid: np.ndarray
  solver: Solver
  student: Denoiser
  teacher: Callable[[Params], DenoiseFn] | None
  init: Callable[[Array, Params], dict[str, Params]]
  players: tuple[Player, ...]
  draw: Callable[[Array], tuple[Array, Array]]
  condition: Callable[[Array, Cond], Cond]
  targets: Mapping[str, float] = {}
  needs_x0: bool = False
  reads: tuple[str, ...] = ()
  prior_first: bool = False
  own_source: str = "forward"
  diagnose: Callable[[View, States, Context], Metrics] | None = None
  complete: Callable[[Params, Params], Params] | None = None


def make_objective(name: str, parts: Parts, options: Mapping[str, Any]) -> Objective:
  """A method by the name of its file, with its options.

  Raises:
    UsageError: no such file or option.
  """
  known = _options_of(name, options)
  for option in options:
    if option not in known:
      raise UsageError(registry.unknown(f"option of objective {name}:", option, known))
  return registry.load("objectives", name).make(parts, **options)


def _options_of(name: str, given: Mapping[str, Any]) -> list[str]:
  """Names of a method's options; one that takes any has those of its `base` too."""
  taken = list(inspect.signature(registry.load("objectives", name).make).parameters.values())[1:]
  names = [option.name for option in taken if option.kind != option.VAR_KEYWORD]
  if len(names) == len(taken):
    return names
  default = next(option.default for option in taken if option.name == "base")
  return names + _options_of(given.get("base", default), {})


def bind(denoiser: Denoiser, params: Params, keys: Array | None = None) -> DenoiseFn:
  """A DenoiseFn of fixed parameters and dropout keys."""
  return lambda x_t, t, cond: denoiser(params, x_t, t, cond, keys)


def completed(objective: Objective, student: Params, teacher: Params) -> Params:
  """The parameters with which `objective.student` runs, from those of the student and of the teacher."""
  return objective.complete(student, teacher) if objective.complete else student


def draw_index(grid: np.ndarray) -> Callable[[Array], tuple[Array, Array]]:
  """Uniform training index on a grid, the clean end excluded."""
  def draw(keys):
    k = keys_lib.randint(keys_lib.named(keys, "k"), 0, len(grid) - 1)
    return k, jnp.asarray(grid, jnp.float32)[k]
  return draw


def time_table(process: Process, size: int = 1000, karras=None) -> np.ndarray:
  """Ascending times [size] from which noise levels are drawn: the discrete steps, EDM's Karras
  levels (`karras`: n -> decreasing levels), or even spacing."""
  if process.name in ("discrete", "stable_diffusion"):
    return np.arange(int(process.t_max) + 1, dtype=np.float64)
  if process.name == "edm":
    return karras(size)[::-1].copy()
  return process.t_max * (np.arange(size) + 1) / size


def draw_times(parts: Parts, size: int = 1000) -> Callable[..., Array]:
  """`(keys [B], name, (low, high)) -> t [B]`: uniform entries of `time_table`, of a share of it (default all).

  Build one for all draws of a method: each holds its table, a constant of the program.
  """
  table = jnp.asarray(time_table(parts.process, size, karras=lambda n: parts.make_grid(n)[:n]), jnp.float32)

  def times(keys, name, share=(0.0, 1.0)):
    first, last = (round(f * len(table)) for f in share)
    index = keys_lib.randint(keys_lib.named(keys, name), first, min(last + 1, len(table)))
    return table[index]

  return times


def unchanged(keys: Array, cond: Cond) -> Cond:
  """The condition of a method that adds nothing."""
  del keys
  return cond


def drop_condition(parts: Parts, keys: Array, share: float) -> Callable[[Cond], Cond]:
  """cond -> cond, that of a `share` of the examples replaced by none, so that a network can be guided by it."""
  dropped = keys_lib.uniform(keys_lib.named(keys, "label_dropout")) < share

  def drop(null, value):
    return jnp.where(dropped.reshape((-1,) + (1,) * (value.ndim - 1)), null, value)

  return lambda cond: jax.tree.map(drop, parts.null(cond), cond)


def draw_guidance(name: str, guidance_range: tuple[float, ...]) -> Callable[[Array, Cond], Cond]:
  """(keys, cond) -> cond with "guidance_scale" ~ U[g_min, g_max] per example.

  Args:
    name: of the objective, for the message.
    guidance_range: (g_min, g_max); () adds nothing.

  Raises:
    UsageError: not two increasing numbers.
  """
  if not guidance_range:
    return unchanged
  if len(guidance_range) != 2 or guidance_range[0] > guidance_range[1]:
    raise UsageError(f"{name}: guidance_range {guidance_range} must be (g_min, g_max) with g_min <= g_max")

  def condition(keys, cond):
    g = keys_lib.uniform(keys_lib.named(keys, "guidance"), *guidance_range)
    return {**cond, "guidance_scale": g.astype(jnp.float32)}

  return condition


def next_time(grid: np.ndarray, k: Array, like: Array) -> Array:
  """grid[k + 1] in the dtype of `like`."""
  return jnp.asarray(grid, like.dtype)[k + 1]


def subset(grid: np.ndarray, num_steps: int) -> np.ndarray:
  """`num_steps` evenly spaced times of a training grid and its end, as LCM's scheduler picks them."""
  picked = np.floor(np.linspace(0, len(grid) - 1, num_steps, endpoint=False)).astype(int)
  return np.concatenate([grid[:-1][picked], grid[-1:]])


def guided_teacher(parts: Parts, guidance_scale: float | None) -> Callable[[Params], DenoiseFn]:
  """teacher params -> DenoiseFn: guidance first, then the teacher's reflection."""
  def bound(params: Params) -> DenoiseFn:
    return parts.reflect_teacher(parts.guidance(guidance_scale)(bind(parts.teacher, params)))
  return bound


def draw_noise(keys: Array, name: str, like: Array) -> Array:
  """Standard normals like [B, ...] for one purpose."""
  return keys_lib.normal_like(keys_lib.named(keys, name), like)


def generate(parts: Parts, params: Params, states: States, keys: Array) -> Array:
  """The student's image [B,H,W,C] from training states, in one call."""
  return parts.student(params, states.x_t, states.t, states.cond, keys_lib.named(keys, "dropout"))


IMAGES = ("walk", "jump")


def student_image(parts: Parts, objective: Objective, params: Params, view: View, states: States, keys: Array,
                  how: str = "walk") -> Array:
  """The image [B,H,W,C] to which the student's sampler leads from training states; gradients go through all of it.

  Args:
    how: an entry of IMAGES: "walk" takes the steps of the sampler that are left, with which every method ends at an
      image; "jump" one step to the end, for students that give an image at every time: that re-noise it, or jump.
  """
  own = completed(objective, params, stop(view.teacher))
  policy = objective.solver(parts.process, bind(objective.student, own, keys_lib.named(keys, "dropout")))
  grid = objective.sampler_grid if how == "walk" else objective.sampler_grid[[0, -1]]
  return finish(policy, states.x_t, states.t, grid, states.cond, keys_lib.named(keys, "finish"), view.unroll)


def init_head(parts: Parts, denoiser: Denoiser, key: Array, params: Params, feature: str) -> Params:
  """A GAN head for a feature of a denoiser."""
  like = jnp.zeros((1,) + parts.image_shape)
  t = jnp.full((1,), parts.process.t_max)
  found = jax.eval_shape(lambda p, cond: denoiser(p, like, t, cond, None, (feature,))[1], params, parts.cond)
  return parts.init_head(key, found[feature])


def init_generator(parts: Parts, feature: str | None = None) -> Callable[[Array, Params], dict[str, Params]]:
  """(key, teacher params) -> a student, and a critic {"net", "head"} that starts from the teacher too.

  Args:
    feature: of the critic, on which its head sits; None is no head.
  """
  def init(key, teacher_params):
    student = parts.init_student(keys_lib.named(key, "student"), teacher_params)
    critic = {"net": parts.init_critic(keys_lib.named(key, "critic"), teacher_params)}
    if feature is not None:
      critic["head"] = init_head(parts, parts.critic, keys_lib.named(key, "head"), critic["net"], feature)
    return {"student": student, "critic": critic}
  return init


def generator(name: str, parts: Parts, grid: np.ndarray, players: tuple[Player, ...],
              teacher: Callable[[Params], DenoiseFn] | None, init, **more) -> Objective:
  """The objective of a method whose student gives an image at each time of its sampler, which re-noises it.

  Its own states are those of the student's sampler; at the first time they are pure noise.
  """
  return Objective(**{**dict(
      name=name, grid=grid, sampler_grid=grid, solver=renoise(), student=parts.student, teacher=teacher, init=init,
      players=players, draw=draw_index(grid), condition=unchanged, prior_first=True, own_source="student"), **more})


def low_rank(objective: Objective, loras: Mapping[str, lora_lib.LoRA]) -> Objective:
  """The same method with players that train a LoRA over the frozen teacher, and what the teacher has not, instead of
  networks of their own.

  Its losses, states and samplers see whole networks as before; what trains, is averaged and is saved is the delta
  (`lora.py`). An average of a delta is that of its factors.

  Args:
    loras: {"student" or "critic": LoRA}; the student's parameters are a network, the critic's {"net": network, ...}.

  Raises:
    UsageError: no such player, no teacher; and of `init`: a player that is not made of the teacher's network.
  """
  names = [player.name for player in objective.players]
  if objective.teacher is None:
    raise UsageError(f"objective '{objective.name}' has no teacher over which a LoRA could train")
  if missing := [name for name in loras if name not in names]:
    raise UsageError(f"objective '{objective.name}' has no {missing[0]} that could train a LoRA")

  def base(name, teacher):
    return teacher if name == "student" else {"net": teacher}

  def whole(name, params, teacher):
    return lora_lib.merge(base(name, teacher), params, loras[name].scale) if name in loras else params

  def seen(view):
    params = {name: whole(name, own, view.teacher) for name, own in view.params.items()}
    return view._replace(params=params, ema={name: whole("student", own, view.teacher)
                                             for name, own in view.ema.items()})

  def wrapped(player):
    def loss(params, view, states, batch, keys):
      return player.loss(whole(player.name, params, view.teacher), seen(view), states, batch, keys)
    return player._replace(loss=loss)

  def init(key, teacher):
    params = objective.init(key, teacher)
    for player in objective.players:
      if lora := loras.get(name := player.name):
        try:
          params[name] = lora_lib.init(keys_lib.named(key, f"lora_{name}"), params[name], base(name, teacher), lora,
                                       player.trainable or (lambda path: True))
        except UsageError as error:
          raise UsageError(f"LoRA of the {name} of objective '{objective.name}': {error}") from None
    return params

  def complete(own, teacher):
    return completed(objective, whole("student", own, teacher), teacher)

  def diagnose(view, states, ctx):
    return objective.diagnose(seen(view), states, ctx)

  return objective._replace(init=init, players=tuple(map(wrapped, objective.players)),
                            complete=complete if "student" in loras else objective.complete,
                            diagnose=diagnose if objective.diagnose else None)


def stop(tree: Any) -> Any:
  """Stops gradients through every array of a tree."""
  return jax.lax.stop_gradient(tree)
