import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.diffusion import process as processes

MAKERS = {
    "cosine": processes.cosine, "linear": processes.linear, "stable_diffusion": processes.stable_diffusion,
    "edm": processes.edm, "flow": processes.flow, "noise_level": lambda: processes.noise_level()}


def times(process, n=7):
  low = max(process.t_min, process.t_max * 1e-3)
  return jnp.linspace(low, 0.99 * process.t_max, n)


@pytest.fixture(params=sorted(MAKERS))
def process(request):
  return MAKERS[request.param]()


def test_noise_grows_with_time(process):
  log_snr = process.log_snr(times(process))
  assert np.all(np.diff(log_snr) < 0)


def test_log_snr_agrees_with_the_scales(process):
  t = times(process)
  from_scales = 2 * jnp.log(process.alpha(t) / process.sigma(t))
  np.testing.assert_allclose(process.log_snr(t), from_scales, atol=1e-4, rtol=2e-4)


def test_variance_preserving_means_what_it_says(process):
  t = times(process)
  total = process.alpha(t) ** 2 + process.sigma(t) ** 2
  if process.variance_preserving:
    np.testing.assert_allclose(total, 1, atol=1e-6)
  else:
    assert np.max(np.abs(total - 1)) > 0.1


def test_the_clean_end_is_exactly_clean(process):
  end = jnp.full((1,), process.t_clean)
  assert process.alpha(end) == 1 and process.sigma(end) == 0


def test_the_prior_is_the_marginal_of_unit_data_at_t_max(process):
  """Noise dominates at t_max, and its scale is prior_std."""
  end = jnp.full((1,), process.t_max)
  std = np.sqrt((0.5 * process.alpha(end)) ** 2 + process.sigma(end) ** 2)
  np.testing.assert_allclose(std, process.prior_std, rtol=0.01)


def test_times_around(process):
  of = lambda t: jnp.arctan2(process.sigma(t), process.alpha(t))  # noqa: E731
  ends = jnp.array([process.t_min, process.t_max])
  t, (low, high), step = jnp.concatenate([ends, times(process)]), of(ends), 0.02
  back, on = processes.times_around(process, of, t, step)
  assert back[0] == t[0] and on[1] == t[1] and np.all(back <= t) and np.all(on >= t)
  np.testing.assert_allclose(of(t) - of(back), jnp.where(of(t) - step >= low, step, 0), atol=2e-6)
  np.testing.assert_allclose(of(on) - of(t), jnp.where(of(t) + step <= high, step, 0), atol=2e-6)
  later = 0.5 * (back + t)  # than the time below
  np.testing.assert_array_equal(processes.times_around(process, of, t, step, later)[0], t)


def test_cosine_stays_within_its_limits():
  process = processes.cosine(-15, 15)
  np.testing.assert_allclose(process.log_snr(jnp.array([0.0, 0.5, 1.0])), [15, 0, -15], atol=2e-3)
  with pytest.raises(ValueError, match="must be below"):
    processes.cosine(20, -20)


def test_discrete_interpolates_and_ends_as_told():
  table = np.array([0.9, 0.5, 0.1])
  one, table_end = processes.discrete(table), processes.discrete(table, final_alpha_one=False)
  t = jnp.array([-1.0, 0.0, 0.5, 2.0])
  np.testing.assert_allclose(one.alpha(t) ** 2, [1, 0.9, 0.7, 0.1], rtol=1e-6)
  np.testing.assert_allclose(table_end.alpha(t) ** 2, [0.9, 0.9, 0.7, 0.1], rtol=1e-6)


def test_zero_terminal_snr_keeps_the_first_and_zeroes_the_last():
  table = processes.sd_alphas_cumprod()
  scaled = processes.rescale_zero_terminal_snr(table)
  assert scaled[-1] == 0 and np.isclose(scaled[0], table[0], rtol=1e-6) and np.all(np.diff(scaled) < 0)


def test_eps_from_x0_inverts_add_noise(process):
  rng = np.random.default_rng(0)
  x0, eps = (jnp.asarray(rng.normal(size=(7, 2, 2, 1)), jnp.float32) for _ in range(2))
  t = jnp.linspace(0.3, 0.9, 7) * process.t_max
  x_t = processes.add_noise(process, x0, eps, t)
  np.testing.assert_allclose(processes.eps_from_x0(process, x_t, x0, t), eps, atol=1e-5)


def test_eps_at_the_clean_end_is_zero(process):
  x0 = jnp.ones((1, 2, 2, 1))
  assert np.all(processes.eps_from_x0(process, x0, x0, jnp.full((1,), process.t_clean)) == 0)


@pytest.mark.parametrize("final_alpha_one", [True, False])
def test_a_tables_derivative_is_the_slope_of_its_interval(final_alpha_one):
  """Also at its knots and at both ends, where a method by Jacobian-vector products divides by it."""
  table = np.array([0.9, 0.7, 0.4, 0.2])
  alpha = processes.discrete(table, final_alpha_one).alpha
  t = jnp.array([0.0, 0.25, 1.0, 1.5, 2.0, 3.0])
  value, slope = jax.jvp(alpha, (t,), (jnp.ones_like(t),))
  np.testing.assert_allclose(value**2, np.interp(t, range(4), table), rtol=1e-6)
  np.testing.assert_allclose(2 * value * slope, [-0.2, -0.2, -0.3, -0.3, -0.2, -0.2], rtol=1e-5)
  np.testing.assert_allclose(alpha(jnp.array([-1.0, 5.0])) ** 2, [1.0 if final_alpha_one else 0.9, 0.2], rtol=1e-6)
