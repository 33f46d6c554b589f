import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddil_jax.errors import UsageError
from ddil_jax.evaluation import sampling
from ddil_jax.training import parallel

SHAPE = (8, 8, 1)


class Net(nn.Module):
  """A small convolutional denoiser with a class embedding."""

  @nn.compact
  def __call__(self, x, labels):
    h = nn.Conv(16, (3, 3))(x) + nn.Embed(4, 16)(labels)[:, None, None, :]
    h = nn.Conv(16, (3, 3), strides=2)(nn.silu(h))
    h = jnp.repeat(jnp.repeat(nn.silu(h), 2, axis=1), 2, axis=2)
    return nn.Conv(1, (3, 3))(h)


@pytest.fixture(scope="module")
def sample_fn():
  """Four re-noising steps from each example's own key."""
  net = Net()
  params = net.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros((1,), jnp.int32))

  @jax.jit
  def sample(keys, labels):
    def noise(i):
      return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), SHAPE))(keys)

    x = noise(0)
    for i in range(1, 5):
      x0 = jnp.tanh(net.apply(params, x, labels))
      x = x0 + 0.5 * noise(i) * (i < 4)
    return x

  return sample


def test_images_do_not_depend_on_the_batch_size(sample_fn):
  n = 100
  labels = sampling.balanced_labels(n, 4)
  whole = sampling.sample_images(sample_fn, n, SHAPE, seed=3, given=labels, batch_size=n)
  assert whole.shape == (n, *SHAPE) and whole.dtype == np.float32
  for batch_size in (7, 64, 256):
    got = sampling.sample_images(sample_fn, n, SHAPE, seed=3, given=labels, batch_size=batch_size)
    np.testing.assert_allclose(got, whole, atol=1e-6, rtol=0)
  # Fewer samples are a beginning of more, another seed is another set, no two images are alike.
  few = sampling.sample_images(sample_fn, 10, SHAPE, seed=3, given=labels[:10], batch_size=64)
  np.testing.assert_allclose(few, whole[:10], atol=1e-6, rtol=0)
  other = sampling.sample_images(sample_fn, n, SHAPE, seed=4, given=labels, batch_size=64)
  assert np.abs(other - whole).max(axis=(1, 2, 3)).min() > 1e-2
  assert len(np.unique(whole.reshape(n, -1), axis=0)) == n


def test_noise_is_bitwise_the_same_for_every_batch_size():
  draw = jax.jit(lambda keys, labels: jax.vmap(lambda k: jax.random.normal(k, SHAPE))(keys))
  sets = [sampling.sample_images(draw, 50, SHAPE, seed=0, batch_size=b) for b in (7, 50, 64)]
  np.testing.assert_array_equal(sets[0], sets[1])
  np.testing.assert_array_equal(sets[0], sets[2])
  first = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), SHAPE)
  np.testing.assert_array_equal(sets[0][0], first)


def test_labels_reach_their_samples():
  paint = lambda keys, labels: jnp.ones((len(labels), 2, 2, 1)) * labels.reshape(-1, 1, 1, 1)  # noqa: E731
  labels = np.arange(10)
  batches = list(sampling.sample_batches(paint, 10, (2, 2, 1), 0, labels, batch_size=4))
  assert [len(batch) for batch in batches] == [4, 4, 2]
  np.testing.assert_array_equal(np.concatenate(batches)[:, 0, 0, 0], labels)


def test_batches_are_drawn_when_they_are_asked_for():
  calls = []

  def draw(keys, labels):
    calls.append(len(keys))
    return jnp.zeros((len(keys), *SHAPE))

  batches = sampling.sample_batches(draw, 10**9, SHAPE, 0, batch_size=4)
  next(batches), next(batches)
  assert calls == [4, 4]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_images_do_not_depend_on_the_devices(sample_fn, count):
  n, labels = 50, sampling.balanced_labels(50, 4)
  whole = sampling.sample_images(sample_fn, n, SHAPE, seed=3, given=labels, batch_size=n)
  devices = parallel.spread("mesh", jax.devices()[:count])
  spread = []

  def draw(keys, labels):
    spread.append((len(keys), len(keys.sharding.device_set)))
    return sample_fn(keys, labels)

  got = sampling.sample_images(draw, n, SHAPE, 3, labels, 16, devices)
  np.testing.assert_allclose(got, whole, atol=1e-6, rtol=0)
  assert set(spread) == {({1: 16, 3: 18, 8: 16}[count], count)}


def test_balanced_labels():
  labels = sampling.balanced_labels(25, 10)
  assert labels.dtype == np.int32
  assert np.bincount(labels).tolist() == [3] * 5 + [2] * 5
  assert np.bincount(labels[:10]).tolist() == [1] * 10


def test_bad_input_is_named(sample_fn):
  with pytest.raises(UsageError, match="0 samples in batches of 8"):
    sampling.sample_images(sample_fn, 0, SHAPE, 0, batch_size=8)
  with pytest.raises(UsageError, match=r"labels has shape \(3,\)"):
    sampling.sample_images(sample_fn, 4, SHAPE, 0, given=np.zeros(3, int))
  with pytest.raises(UsageError, match=r"gave images of shape \(4, 8, 8, 1\); expected \(4, 28, 28, 1\)"):
    sampling.sample_images(sample_fn, 4, (28, 28, 1), 0, given=np.zeros(4, int), batch_size=4)
  with pytest.raises(UsageError, match="5 labels of 0 classes"):
    sampling.balanced_labels(5, 0)
