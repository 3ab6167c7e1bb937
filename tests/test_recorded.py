"""Changes that should leave the training alone leave it alone: a short run gives the numbers it gave before.

Without AVX they move by 3e-6 of their size; with learning rates of MR.Q that are 1% larger, by 1e-3 or more. If an
algorithm changes on purpose, record anew and say in CHANGELOG.md why results of before no longer compare.
"""

import pytest
from conftest import all_scripts, evaluations, scalars

RETURNS_AND_CRITIC_LOSS = {  # at agent steps 0, 50, 100 and 130, and at 130; commit ebd789d, torch 2.13.0, 2026-11-25
    "mst_sac": ([6.116825, 1.298344, 1.318380, 1.862466], 0.003171046),
    "mst_ddpg": ([6.527475, 1.573465, 2.097785, 2.912232], 0.004156706),
    "mst_mrq": ([5.075032, 5.018826, 2.324601, 0.932619], 2.034600),
    "mst_mrsac": ([2.887878, 3.510269, 5.422519, 5.920511], 2.209712),
}


@all_scripts
def test_a_short_run_gives_the_returns_and_the_loss_recorded(script, reference):
    returns, critic_loss = RETURNS_AND_CRITIC_LOSS[script]
    assert [float(mean) for _, _, mean, *_ in evaluations(reference)[1:]] == pytest.approx(returns, rel=1e-4)
    assert scalars(reference)["losses/critic_loss", 130] == pytest.approx(critic_loss, rel=1e-4)
