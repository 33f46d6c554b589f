"""Covariate shift of a run: which states student, teacher and forward process visit, and how far apart they are.

`evaluation/covariate_shift.py` has the distances; this module makes the states.
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddil_jax import build as build_lib
from ddil_jax import samplers
from ddil_jax.diffusion.process import add_noise
from ddil_jax.diffusion.rollout import prior, rollout
from ddil_jax.errors import UsageError
from ddil_jax.evaluation import covariate_shift
from ddil_jax.objectives.base import bind

LABELS = 200  # samples of the label errors, each of which costs a walk of the teacher


class Probe:
  """Student, teacher and forward process at a sampler's times, on the same noise and labels.

  What does not depend on the student is computed once, so that measuring again during training is cheap.

  Args:
    built, sampler, teacher: of the run; it has to have a teacher.
    num_samples: N, lowered to what the data set holds: the forward marginal and its floor are of distinct
      images, since copies would look like a shift, and of the same labels, since what differs in labels
      would too.
    teacher_steps: of the teacher's walk; it passes through the sampler's times too.
    batch_size: of every call of a network.
    seed: of noise and of the choice of images.
  """

  def __init__(self, built: build_lib.Built, sampler: samplers.Sampler, teacher, num_samples: int,
               teacher_steps: int, batch_size: int = 500, seed: int = 0):
    parts, data, grid = built.parts, built.dataset, sampler.grid
    teacher = jax.tree.map(jnp.asarray, teacher)  # once, not at every call
    first, second = _pairs_of_a_class(data.labels, num_samples, seed)
    n = len(first)
    self.grid, self._n, self._batch_size = grid, n, batch_size
    fine = np.unique(np.concatenate([grid, parts.make_grid(teacher_steps)]).round(9))[::-1]
    self._at = [int(np.argmin(abs(fine - t))) for t in grid]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed + 1), jnp.arange(n))
    self._keys = keys
    self._cond = {name: jnp.asarray(rows[first]) for name, rows in {"label": data.labels, **data.cond}.items()}

    def start(keys):
      return prior(parts.process, keys, jnp.zeros(keys.shape + parts.image_shape))

    def student_walk(params, keys, cond):
      return rollout(sampler.policy(params), start(keys), grid, sampler.condition(cond), keys, path=True)

    def teacher_walk(teacher, keys, cond):
      walk = samplers.teacher_policy(built, teacher)
      return rollout(walk, start(keys), fine, sampler.condition(cond), keys, path=True)[jnp.asarray(self._at)]

    def estimate(teacher, x, k, cond):
      t = jnp.full(x.shape[:1], jnp.asarray(grid, x.dtype)[k])
      return bind(parts.teacher, teacher)(x, t, cond)

    def label_and_end(teacher, x, at, cond):
      cond, times = sampler.condition(cond), jnp.asarray(fine, x.dtype)
      time, policy = lambda i: jnp.full(x.shape[:1], times[i]), samplers.teacher_policy(built, teacher)  # noqa: E731

      def step(i, x):
        # A start that is traced: one program for all times. DDIM carries nothing and reads no noise.
        return policy.step((), x, time(i), time(i + 1), cond, jnp.zeros_like(x))[0]

      return built.objective.teacher(teacher)(x, time(at), cond), jax.lax.fori_loop(at, len(fine) - 1, step, x)

    self._teacher = teacher
    self._student_walk, self._estimate, self._label_and_end = map(jax.jit, (student_walk, estimate, label_and_end))
    self._paths = {"teacher": self._path(jax.jit(teacher_walk), teacher)}
    for number, (name, chosen) in enumerate({"forward": first, "floor": second}.items(), start=1):
      x0 = jnp.asarray(data.images[chosen])
      eps = np.random.default_rng([seed, number]).standard_normal(x0.shape).astype(np.float32)
      self._paths[name] = np.stack([np.asarray(add_noise(parts.process, x0, eps, jnp.full(n, t, jnp.float32)))
                                    for t in grid])

  def _path(self, walk, params) -> np.ndarray:
    """[K+1,N,H,W,C]."""
    by_sample = lambda keys, cond: jnp.moveaxis(walk(params, keys, cond), 0, 1)  # noqa: E731
    return np.moveaxis(self._in_batches(by_sample, self._keys, self._cond), 0, 1)

  def _in_batches(self, fn, *trees):
    """fn over batches of one size of arrays [N,...], the last filled up and cut."""
    n, out = len(jax.tree.leaves(trees)[0]), []
    size = min(self._batch_size, n)
    for first in range(0, n, size):
      rows = np.minimum(np.arange(first, first + size), n - 1)
      part = jax.device_get(fn(*jax.tree.map(lambda v: v[rows], trees)))
      out.append(jax.tree.map(lambda v: v[:n - first], part))
    return jax.tree.map(lambda *v: np.concatenate(v), *out)

  def drift(self, params) -> dict[str, float]:
    """What is worth following during training: {"shift/<pair>/sw2@<k>"} from k = 1 on, since k = 0 is noise.

    The values are those of `rows`; NaN where the student's states are not finite.
    """
    student = self._path(self._student_walk, params)

    def distance(k, name):
      finite = np.isfinite(student[k]).all()
      return covariate_shift.sliced_wasserstein2(student[k], self._paths[name][k]) if finite else float("nan")

    return {f"shift/student_{name}/sw2@{k}": distance(k, name) for name in ("forward", "teacher")
            for k in range(1, len(self.grid))}

  def rows(self, params, features=None, labels: bool = True) -> list[dict]:
    """Everything, per sampling time: state space, feature space, label errors.

    Args:
      features: images [N,H,W,C] -> [N,D]; None leaves the feature space out. A noisy state is not an
        image that an extractor knows, and x_t / alpha is as noisy, or infinite. So it is seen through the
        teacher's estimate E[x0 | x_t, label]: an image at every time, the state itself at t = 0, and one
        map for all policies and variants (without guidance and reflection), so that equal distributions
        of states stay equal. It hides what the teacher does not see in a state, which is what no label
        depends on.
      labels: the label errors too.

    Returns:
      Rows as of `covariate_shift.shift_curves`, those of features with the prefix "feature_", and
      "label_error_<source>" at each time but the clean end: the root mean square per pixel between the
      teacher's one-step x0 estimate, guided and reflected as in training, and where its own walk of
      `teacher_steps` leads from that state. The two differ on the teacher's own states too, so compare
      sources with each other.
    """
    paths = {"student": self._path(self._student_walk, params), **self._paths}
    curves = [self._curves(paths)]
    if features is not None:
      curves.append(self._curves({name: self._features(features, path) for name, path in paths.items()}, "feature_"))
    if labels:
      curves.append(self._label_errors(paths))
    return [row | {name: v for each in curves[1:] if k < len(each) for name, v in each[k].items()}
            for k, row in enumerate(curves[0])]

  def _curves(self, paths, space=""):
    return covariate_shift.shift_curves(paths["student"], paths["teacher"], paths["forward"], self.grid,
                                        paths["floor"], space=space, paired=True)

  def _features(self, features, path):
    clean = [self._in_batches(lambda x, cond, k=k: self._estimate(self._teacher, x, k, cond), path[k], self._cond)
             for k in range(len(self.grid) - 1)]
    return np.stack([features(x) for x in [*clean, path[-1]]])

  def _label_errors(self, paths):
    n, last = min(self._n, LABELS), len(self.grid) - 1
    labels, ends = {}, {}
    for source in ("forward", "student", "teacher"):
      found = [self._in_batches(lambda x, cond, k=k: self._label_and_end(self._teacher, x, self._at[k], cond),
                                paths[source][k][:n], {name: v[:n] for name, v in self._cond.items()})
               for k in range(last)]
      labels[source], ends[source] = map(np.stack, zip(*found))
    return covariate_shift.label_error_curves(labels, ends, self.grid[:last])


def _pairs_of_a_class(labels, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices [n], [n] of distinct examples such that the i-th of both have one label; n <= num."""
  rng = np.random.default_rng(seed)
  index = rng.permutation(len(labels))
  index = index[np.argsort(labels[index], kind="stable")]
  even = [of[:len(of) // 2 * 2] for of in np.split(index, np.flatnonzero(np.diff(labels[index])) + 1)]
  pairs = rng.permutation(np.concatenate(even).reshape(-1, 2))[:num]
  if len(pairs) < 2:
    raise UsageError(f"covariate shift of {len(pairs)} samples: at least 2 are needed (config.eval.shift_samples), and"
                     " twice as many images, two and two of one class")
  return pairs[:, 0], pairs[:, 1]


def probe(config: ConfigDict, built: build_lib.Built, sampler: samplers.Sampler, teacher) -> Probe:
  """The config's probe."""
  return Probe(built, sampler, teacher, config.eval.shift_samples, config.states.teacher_steps,
               config.eval.batch_size, config.eval.seed)
