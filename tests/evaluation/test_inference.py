"""The table of inference transforms: means, paired differences, evaluations."""

from ddil_jax.evaluation import inference


def row(variant, steps, seed, distance, evaluations, scale=1.0):
  return {"variant": variant, "steps": steps, "guidance_scale": scale, "eval_seed": seed,
          "metrics": {"fd@9/train/x": distance, "coverage@9/train/x": 0.5}, "network_evaluations": evaluations}


def test_each_transform_against_the_sampler_itself():
  rows = [row(variant, steps, seed, distance + seed + by * (1 + 0.1 * seed), share * steps)
          for variant, by, share in (("", 0, 1), ("+cached(deep0,every:2)", 1, 0.75))
          for steps, distance in ((8, 1), (4, 5)) for seed in range(3)]
  rows += [row("", 4, seed, 9.0 + seed, 8, scale=3.0) for seed in range(3)]
  lines = inference.markdown(rows).splitlines()
  cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
  # t(0.975, 2) = 4.303: distances 1, 2, 3 have a half interval of 2.48; 2, 3.1, 4.2 one of 2.73.
  assert cells[0] == ["sampler", "guidance", "fd, evaluations: 8 steps", "fd, evaluations: 4 steps"]
  assert cells[2:] == [
      [inference.PLAIN, "1", "2.00 ± 2.48, 8", "6.00 ± 2.48, 4"],
      # By 1, 1.1, 1.2: the distances alone overlap, the differences exclude 0.
      ["cached(deep0,every:2)", "1", "3.10 ± 2.73 *, 6", "7.10 ± 2.73 *, 3"],
      [inference.PLAIN, "3", "-", "10.00 ± 2.48, 8"], ["cached(deep0,every:2)", "3", "-", "-"]]
  assert "over 3 seeds of sampling" in lines[-3]
