"""Progressive and consistency distillation on Karras levels (OpenAI's two releases)."""

import jax
import jax.numpy as jnp

from ddil_jax.diffusion import distance, grids, prediction, solvers, weighting
from ddil_jax.diffusion import process as processes
from ddil_jax.diffusion.prediction import make_denoiser
from ddil_jax.objectives.base import bind
from ddil_jax.objectives.cd import consistency_loss
from ddil_jax.objectives.pd import pd_loss
from tests.oracle import toy

WEIGHTS = {"uniform": "constant", "snr": "snr", "snr+1": "snr_plus_one", "snrp1": "snr_plus_one",
           "truncated_snr": "snr_trunc", "truncated-snr": "snr_trunc", "karras": "edm"}


def setup(case):
  """What a file's loss is made of; the student of PD and every teacher have no boundary condition."""
  hyper = case.hyper
  jcm = "_jcm_" in case.name
  low, high = (hyper["t_min"], hyper["t_max"]) if jcm else (hyper["sigma_min"], hyper["sigma_max"])
  sigma_data = hyper["data_std" if jcm else "sigma_data"]
  process = processes.edm(low, high, time_scale=0.25 if jcm else 250.0)
  denoiser = make_denoiser(toy.net, process, prediction.edm(sigma_data))
  consistency_function = make_denoiser(toy.net, process, prediction.edm(sigma_data, boundary_sigma_min=low))
  weight_name = WEIGHTS[hyper["weighting"]]
  weight = weighting.make(weight_name, **({"sigma_data": sigma_data} if weight_name == "edm" else {}))

  def levels(n):
    return jnp.asarray(grids.karras(n, low, high, hyper["rho"], clean_end=False), case.dtype)

  return process, denoiser, consistency_function, weight, distance.make(hyper["loss_norm"]), levels


def compare(case, loss):
  params = case.net("student")
  per_example = loss(params)
  case.check("loss_per_example", per_example)
  case.check("loss", jnp.mean(per_example), mean_of="loss_per_example")
  case.check_grads("grad", jax.grad(lambda p: jnp.mean(loss(p)))(params))


def consistency(case):
  """Consistency distillation, and training where the clean image takes the teacher's place."""
  process, teacher, student, weight, metric, levels = setup(case)
  grid, x0 = levels(case.hyper["num_scales"] - 1), case["x"]
  t, s = grid[case["index"]], grid[case["index"] + 1]
  from_data = case.hyper.get("dsm_target", False) or case.name.startswith("ct_")
  denoise = (lambda x_t, t, cond: x0) if from_data else bind(teacher, case.net("teacher"))
  solver = solvers.heun() if case.hyper["solver"] == "heun" else solvers.ddim()
  x_t = processes.add_noise(process, x0, case["noise"], t)
  target = bind(student, case.net("target"))

  def loss(params):
    online = bind(student, params)
    return consistency_loss(process, online, target, denoise, solver, x_t, t, s, {}, metric, weight)[0]

  compare(case, loss)


def pd_ve(case):
  process, denoiser, _, weight, metric, levels = setup(case)
  n = case.hyper["num_scales"]
  fine = levels(2 * n)
  t, mid, s = (fine[2 * case["index"] + k] for k in range(3))
  x_t = processes.add_noise(process, case["x"], case["noise"], t)
  teacher = bind(denoiser, case.net("teacher"))
  compare(case, lambda params: pd_loss(process, bind(denoiser, params), teacher, x_t, t, mid, s, {}, weight,
                                       metric))


RUNNERS = {r"pd_ve_.*": pd_ve, r"(cd|ct)_ve_.*": consistency}
