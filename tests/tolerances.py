"""The one table of tolerances: largest error against float64, relative to the largest true value.

`close(actual, expected, dtype)` raises with the worst element. Never loosen it in a test.
"""

import torch

#             forward, backward
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 5e-6),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (8e-3, 1.6e-2),
}

# Whole models against stored float64 outputs: largest absolute error of logits and normalised maps.
MODEL = {torch.float64: 1e-12, torch.float32: 2e-5}


def close(actual, expected, dtype, what="output", backward=False):
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    if actual.numel() == 0:
        return
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    bound = TOLERANCES[dtype][backward] * max(1.0, expected.abs().max().item())
    error = (actual - expected).abs()
    error = torch.where(actual == expected, 0.0, error)  # equal infinities differ by nan
    worst = error.max().item()
    at = int(error.argmax())
    assert worst <= bound, (
        f"{what} in {dtype}: error {worst:.3g} > {bound:.3g} at flat index {at}: "
        f"{actual.flatten()[at].item()} instead of {expected.flatten()[at].item()}"
    )
