"""What the first values of CARAFE++ and of the operators beside it must be."""

import pytest

ZEROS = (
    "channel_compressor.bias",
    "content_encoder.bias",
    "guidance.weight",
    "guidance.bias",
    "log_alpha",
    "log_lambda",
)


def wrong_starts(model):
    """What is wrong with the first values of a model's CARAFE++, GUM, DPP and LIP (with a bottleneck), by name."""
    for name, parameter in model.named_parameters():
        deviation, largest = parameter.std(correction=0).item(), parameter.abs().max().item()
        right = True
        if name.endswith("content_encoder.weight"):
            right = deviation == pytest.approx(0.001, rel=0.1)
        elif name.endswith("channel_compressor.weight"):
            bound = (6 / sum(parameter.shape[:2])) ** 0.5  # Xavier's, of a uniform distribution
            right = largest <= bound and deviation == pytest.approx(bound / 3**0.5, rel=0.1)
        elif name.endswith((*ZEROS, "logits.6.weight")):
            right = largest == 0
        if not right:
            yield f"{name}: standard deviation {deviation:.4g}, largest {largest:.4g}"
