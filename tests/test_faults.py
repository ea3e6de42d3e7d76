"""A short fault campaign on the real command line; `tests/faults.py` is the long one."""

import faults


def test_no_run_is_lost_or_wrong_after_a_fault(tmp_path):
    """kill -9 while a checkpoint is half written, a full disk, and a truncated file, from a fixed seed."""
    kinds = ["kill -9 during a save", "disk full", "truncated file"]
    outcomes = list(faults.campaign_of(len(kinds), 0, kinds, tmp_path))
    assert [kind for kind, _, _ in outcomes] == kinds
    assert {outcome for _, outcome, _ in outcomes} <= {"resumed", "refused"}, outcomes
