"""Annotations and label maps with one random mutation: the right numbers, or one line that names file and fault."""

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed")
pytest.importorskip("mmseg", reason="mmseg is not installed")

from annotation_faults import Campaign, quiet
from campaign import SEED, count
from label_faults import LabelCampaign

PARTS = 10


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    ("name", "kind", "short", "long"), [("annotations", Campaign, 300, 5000), ("label_maps", LabelCampaign, 60, 1000)]
)
def test_mutations(name, kind, short, long, part, tmp_path, campaign, one_thread):
    tally, cases = campaign(name), kind(tmp_path)
    wrong = []
    with quiet():
        for number in range(part, count(name, short=short, long=long), PARTS):
            outcome, mutation, details = cases.case(SEED * 10**6 + number)
            tally(mutations=1, **{outcome.lower(): 1})
            if outcome == "WRONG":
                wrong.append(f"{SEED * 10**6 + number}: {mutation}: {details}")
    assert not wrong, f"repeated by python tests/support/annotation_faults.py {name} NUMBER:\n" + "\n".join(wrong)
