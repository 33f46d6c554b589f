import numpy as np
import pytest

from ddil_jax.diffusion import curriculum, grids
from ddil_jax.diffusion import process as processes
from ddil_jax.errors import UsageError


def test_uniform_reaches_both_ends_exactly():
  assert list(grids.uniform(4, processes.cosine())) == [1, 0.75, 0.5, 0.25, 0]
  assert list(grids.uniform(4, processes.stable_diffusion())) == [999, 749, 499, 249, -1]


def test_uniform_without_a_clean_end_still_ends():
  assert grids.uniform(2, processes.stable_diffusion(final_alpha_one=False))[-1] == -1


@pytest.mark.parametrize("n, spacing, offset, expected", [
    (4, "leading", 0, [750, 500, 250, 0, -1]),
    (3, "leading", 1, [667, 334, 1, -1]),
    (4, "trailing", 0, [999, 749, 499, 249, -1]),
    (7, "trailing", 0, [999, 856, 713, 570, 428, 285, 142, -1]),
    (3, "linspace", 0, [999, 500, 0, -1]),
])
def test_ddim_spacings(n, spacing, offset, expected):
  assert list(grids.ddim(n, spacing, offset)) == expected


def test_every_ddim_grid_is_decreasing():
  for spacing in grids.SPACINGS:
    for n in range(1, 1001):
      assert len(grids.ddim(n, spacing)) == n + 1


def test_diffusers_surplus_timestep_and_step_size():
  """What its scheduler does, where that is not the plain definition."""
  assert list(grids.ddim_timesteps(61, keep_surplus=True)[-2:]) == [15, -1]
  assert len(grids.ddim_timesteps(61)) == 61
  assert list(grids.ddim_previous(grids.ddim_timesteps(3), 3)) == [666, 333, -1]


def test_lcm_dmd2_and_training_times():
  assert list(grids.lcm(4)) == [999, 759, 499, 259, -1]
  assert list(grids.lcm(2, strength=0.5)) == [499, 259, -1]
  assert list(grids.dmd2(4)) == [999, 749, 499, 249, -1]
  assert list(grids.dmd2_timesteps(7))[-1] == 5 and len(grids.dmd2(7)) == 8
  times = grids.lcm_training_timesteps()
  assert times[0] == 19 and times[-1] == 999 and np.all(np.diff(times) == 20)


def test_karras_is_even_in_the_root():
  grid = grids.karras(18)
  np.testing.assert_allclose(grid[[0, -2, -1]], [80, 0.002, 0])
  assert len(grid) == 19
  np.testing.assert_allclose(np.diff(grid[:-1] ** (1 / 7), 2), 0, atol=1e-12)
  open_end = grids.karras(18, clean_end=False)
  assert len(open_end) == 19 and open_end[-1] == pytest.approx(0.002)


@pytest.mark.parametrize("levels", ["interpolated", "karras", "exponential"])
def test_discrete_levels_agree_with_their_times(levels):
  table = processes.sd_alphas_cumprod()
  times, sigmas = grids.discrete_levels(table, 5, levels=levels)
  at_times = np.interp(times, np.arange(1000), np.sqrt((1 - table) / table))
  np.testing.assert_allclose(sigmas[:-1], at_times, rtol=1e-4)
  assert times[0] == pytest.approx(999) and sigmas[-1] == 0


@pytest.mark.parametrize("bad", [[1, 0.5, 0.5, 0], [0, 1], [1, np.nan, 0]])
def test_a_grid_that_does_not_decrease_is_refused(bad):
  with pytest.raises(UsageError, match="grid not decreasing at index"):
    grids.check_grid(bad)


@pytest.mark.parametrize("name", sorted(grids.GRIDS))
def test_zero_steps_are_refused(name):
  process = processes.edm() if name == "karras" else processes.stable_diffusion()
  with pytest.raises(UsageError, match="0 steps"):
    grids.make(name, 0, process)
  assert len(grids.make(name, 3, process)) == 4


def test_names_and_processes_are_checked():
  with pytest.raises(UsageError, match="there are: ddim, dmd2, karras, lcm, uniform"):
    grids.make("trailing", 4, processes.cosine())
  with pytest.raises(UsageError, match="use 'uniform'"):
    grids.make("ddim", 4, processes.cosine())
  with pytest.raises(UsageError, match="not of 'cosine'"):
    grids.make("karras", 4, processes.cosine())
  with pytest.raises(UsageError, match="leading, linspace, trailing"):
    grids.ddim(4, "middle")
  with pytest.raises(UsageError, match="1001 steps of a process that has 1000"):
    grids.ddim(1001)
  with pytest.raises(UsageError, match="there are: exponential"):
    grids.discrete_levels(processes.sd_alphas_cumprod(), 4, levels="beta")
  with pytest.raises(UsageError, match="0 < sigma_min < sigma_max"):
    grids.karras(4, sigma_min=0)


def test_ema_and_scales():
  adaptive = curriculum.ema_and_scales("adaptive", 0.95, "progressive", 2, 200, 800_000)
  rates, scales = zip(*(adaptive(step) for step in range(0, 800_001, 50_000)))
  assert scales[0] == 2 and scales[-1] == 201 and list(scales) == sorted(scales)
  assert list(rates) == sorted(rates) and rates[0] == pytest.approx(0.95**2)
  halving = curriculum.ema_and_scales("fixed", 0.0, "progdist", 16, 1, 0, 100)
  assert [halving(step)[1] for step in (0, 99, 100, 200, 300, 499, 500)] == [16, 16, 8, 4, 2, 2, 1]
  assert curriculum.ema_and_scales("fixed", 0.9, "fixed", 40, 40, 1)(7) == (0.9, 40)
  with pytest.raises(UsageError, match="unknown schedule adaptive\\+fixed"):
    curriculum.ema_and_scales("adaptive", 0.9, "fixed", 2, 2, 1)
