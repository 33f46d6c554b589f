"""A run goes on on other devices than it began on."""

import jax
import numpy as np
import pytest

from ddil_jax.training.checkpoint import Checkpoints
from tests.splitting import FSDP, assert_close, reference, training

pytestmark = pytest.mark.xdist_group("splitting")


def test_8_to_1_to_4_devices(tmp_path):
  """Two steps on each, from checkpoint to checkpoint: the data, the buffers and all else as without a break."""
  stages = [training("mesh", FSDP), training("single"), training("mesh", FSDP, 4)]
  with Checkpoints(tmp_path) as checkpoints:
    for i, stage in enumerate(stages):
      restored = checkpoints.restore(stage.runner.shapes(*stage.start))
      state, position = (restored[0], restored[1]["position"]) if restored else (None, 0)
      assert position == 2 * i
      state = stage.run(2, state, position)
      assert checkpoints.save(position + 2, state, {"position": position + 2})
  expected = reference()[0][5]
  assert_close(state, expected)
  assert int(state.step) == 6
  assert int(state.dist.pushed) == 6 and int(state.dist.refreshed) == 4  # two states a walk, every second step
  assert np.abs(np.asarray(state.dist.states.x_t)).sum(axis=(0, 2, 3, 4)).min() > 0  # all slots are filled
  assert len(state.dist.states.x_t.sharding.device_set) == 4
  assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)} == {4}
