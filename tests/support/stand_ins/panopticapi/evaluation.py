"""Panoptic quality (Kirillov et al., CVPR 2019, eq. 1): sum of IoU / (TP + FP / 2 + FN / 2), averaged over classes.

As in the package itself, a kind (things, stuff) without any segment is a division by zero.
"""

from collections import defaultdict
from types import SimpleNamespace

OFFSET, VOID = 256**3, 0


class PQStat(defaultdict):
    """Per category: the sum of the IoUs, and the numbers of true positives, false positives and false negatives."""

    def __init__(self):
        super().__init__(lambda: SimpleNamespace(iou=0.0, tp=0, fp=0, fn=0))

    def __iadd__(self, other):
        for category, counts in other.items():
            for name, value in vars(counts).items():
                setattr(self[category], name, getattr(self[category], name) + value)
        return self

    def __reduce__(self):  # to other processes
        return _with, (dict(self),)

    def pq_average(self, categories, isthing):
        each = {}
        for category, settings in categories.items():
            if isthing in (None, settings["isthing"] == 1):
                counts = self[category]
                total = counts.tp + counts.fp / 2 + counts.fn / 2
                sq, rq = counts.iou / max(counts.tp, 1), counts.tp / max(total, 0.5)
                each[category] = dict(pq=sq * rq, sq=sq, rq=rq, found=total > 0)
        n = sum(result.pop("found") for result in each.values())
        return {key: sum(r[key] for r in each.values()) / n for key in ("pq", "sq", "rq")} | dict(n=n), each


def _with(content):
    stat = PQStat()
    stat.update(content)
    return stat
