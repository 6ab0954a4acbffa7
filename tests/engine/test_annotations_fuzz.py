"""Annotation files with one random mutation: the right numbers, or one line that names the file and the fault."""

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed")

from annotation_faults import Campaign, quiet
from campaign import SEED, count

PARTS = 10


@pytest.mark.parametrize("part", range(PARTS))
def test_mutations(part, tmp_path, campaign, one_thread):
    tally, cases = campaign("annotations"), Campaign(tmp_path)
    quiet()
    wrong = []
    for number in range(part, count("annotations", short=500, long=5000), PARTS):
        seed = SEED * 10**6 + number
        outcome, mutation, details = cases.case(seed)
        tally(mutations=1, **{outcome.lower(): 1})
        if outcome == "WRONG":
            wrong.append(f"{seed}: {mutation}: {details}")
    assert not wrong, "python tests/support/annotation_faults.py NUMBER repeats:\n" + "\n".join(wrong)
