"""Which runner computes which file."""

import re

from tests.oracle import cases_dmd2, cases_lcm, cases_maths, cases_samplers, cases_ve, cases_vp

RUNNERS = {
    r"schedules": cases_maths.schedules,
    r"timestep_tables": cases_maths.timestep_tables,
    r"conversions_vp": cases_maths.conversions_vp,
    r"reflected": cases_maths.reflected,
    r"edm_precond_loss_sampler": cases_maths.edm_precond_loss_sampler,
    r"ve_parts_cm": cases_maths.ve_parts,
    r"ddim_\d+_.*": cases_samplers.ddim,
    r"lcm_sampler_\d+_.*": cases_samplers.lcm_sampler,
    r"euler_\d+_.*": cases_samplers.euler,
    r"pd_sample_.*": cases_samplers.pd_sample,
    r"pd_vp_.*": cases_vp.pd_vp,
    r"vp_denoise_.*": cases_vp.vp_denoise,
    r"pd_ve_.*": cases_ve.pd_ve,
    r"(cd|ct)_ve_.*": cases_ve.consistency,
    r"lcm_parts_.*": cases_lcm.parts,
    r"lcm_\d+_.*": cases_lcm.lcm,
    r"dmd2_normalisation": cases_dmd2.normalisation,
    r"dmd2_sd_parts_.*": cases_dmd2.sd_parts,
    r"dmd2_edm_.*": cases_dmd2.edm,
    r"dmd2_sdxl_step_.*": cases_dmd2.sdxl_step,
}

NOT_COVERED = {
    r"sid_.*": "score identity distillation is not an objective of this version",
    r"edm_net_.*": "the EDM networks are not models of this version",
}


def not_covered(name: str) -> str | None:
  """The reason why a kind of file is not run, or None."""
  return next((reason for pattern, reason in NOT_COVERED.items() if re.fullmatch(pattern, name)), None)


def find(name: str):
  """The runner of a file by its stem; an unknown kind of file is a failure."""
  found = [runner for pattern, runner in RUNNERS.items() if re.fullmatch(pattern, name)]
  if len(found) != 1:
    raise AssertionError(f"golden vectors '{name}': {len(found)} runners know this kind of file; there are: "
                         f"{', '.join(RUNNERS)}")
  return found[0]
