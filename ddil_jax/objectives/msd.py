"""Multi-student distillation (MSD): several students, each for a part of the conditions, around any method.

    G(x_t, t, c) = G_k(x_t, t, c),   k = partition[c]
    L            = the loss of the method `base` on states of all conditions

The students are one tree of parameters with a leading axis, over which the network is mapped (`jax.vmap`, or one after
the other); an example has the output of its own student alone, and only that student learns from it. An image costs one
student's steps when one picks the student before the call; here every student computes the whole batch, so training and
evaluation cost as much as all of them.

Everything else is the method's: its sources, its sampler, its critic, which sees the condition and serves all
students. One student is the method itself.

Source: arXiv 2410.23274, from secondary notes; no golden vectors. Verified: one student is the base method, students
learn from their own conditions alone, and two reach what one cannot on a mixture of two classes. As in the paper,
classes that follow each other belong together by default. Ours: the base is a choice (the paper's are DMD and DMD2),
the students share a critic, and gradients are clipped by the norm over all of them. DMD's regression is on the pairs
of a student's own conditions; the paper shows all pairs to each. Not here: smaller students and their first stage.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ddil_jax import keys as keys_lib
from ddil_jax.errors import UsageError
from ddil_jax.objectives.base import Objective, Parts, make_objective
from ddil_jax.types import Denoiser


def consecutive(num_classes: int, students: int) -> tuple[int, ...]:
  """The student of each class: parts of neighbouring classes whose sizes differ by at most one."""
  return tuple(c * students // num_classes for c in range(num_classes))


def routed(denoiser: Denoiser, partition: tuple[int, ...], vectorize: bool = True) -> Denoiser:
  """A denoiser of stacked params [K, ...]: each example has the output of student partition[label]."""
  def several(params, x_t, t, cond, keys=None, features=(), *reuse):
    def of_one(own):
      return denoiser(own, x_t, t, cond, keys, features, *reuse)

    if vectorize:
      every = jax.vmap(of_one)(params)  # [K, B, ...]
    else:
      found = [of_one(jax.tree.map(lambda v, i=i: v[i], params)) for i in range(max(partition) + 1)]
      every = jax.tree.map(lambda *v: jnp.stack(v), *found)
    k = jnp.asarray(partition, jnp.int32)[cond["label"]]
    return jax.tree.map(lambda v: v[k, jnp.arange(len(k))], every)

  return several


def make(parts: Parts, students: int = 2, partition: tuple[int, ...] = (), base: str = "dmd2",
         vectorize: bool = True, **options: Any) -> Objective:
  """`base` for several students.

  Args:
    students: K.
    partition: the student of each class, 0 .. K-1; () is `consecutive`.
    base: a method; the other options are its own.
    vectorize: the students are computed at once; False is one after the other, which compiles each of them and is what
      CPUs want: the gradient of a convolution with several kernels is 15 times slower there.

  Raises:
    UsageError: data without classes, a partition that leaves out a class or a student, a method whose students are no
      networks of their own, options that the method does not have.
  """
  if not 1 <= students <= parts.num_classes:
    raise UsageError(f"msd: students {students} must lie between 1 and the number of classes, {parts.num_classes}")
  partition = partition or consecutive(parts.num_classes, students)
  if len(partition) != parts.num_classes or set(partition) != set(range(students)):
    raise UsageError(f"msd: partition {partition} must name one of the students 0 to {students - 1} for each of the"
                     f" {parts.num_classes} classes, and each student at least once")

  def init_students(key, teacher):
    keys = [key] + [keys_lib.named(key, f"student {k}") for k in range(1, students)]
    return jax.tree.map(lambda *v: jnp.stack(v), *(parts.init_student(each, teacher) for each in keys))

  several = parts._replace(student=routed(parts.student, partition, vectorize), init_student=init_students)
  objective = make_objective(base, several, options)
  if objective.teacher is None or objective.complete is not None:
    raise UsageError(f"msd: base '{base}' trains no student networks of its own; there is nothing to divide")
  return objective._replace(name="msd")
