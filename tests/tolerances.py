"""The one table of tolerances: largest error against float64, relative to the largest true value.

`close(actual, expected, dtype)` raises with the worst element. Never loosen it in a test.
"""

import math

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


# The error rule: against float64, a kernel's largest error is at most so many times that of plain
# torch in the same dtype on the same device, plus a floor. `overflow`: logits far beyond the usual.
# Of a bias table of few numbers the error of one run of plain torch is a matter of luck. So `plain`
# may be several runs that are equal but for their rounding, of which the largest error counts: the
# more, the smaller the table. And the floor of gradients is at least half the spacing of the dtype
# at the largest true number, which any result may be off by.
RULE = {"forward": (2, 0.0), "backward": (3, 0.0), "overflow": (5, 1e-3)}
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}


def by_rule(actual, true, plain, what, kind="forward"):
    """Check `actual` against float64 `true` by the error rule; returns error / allowed error."""
    assert actual.shape == true.shape, f"{what}: {actual.shape} is not {true.shape}"
    if actual.dtype == torch.float64:
        return close(actual, true, actual.dtype, what, backward=kind != "forward") or 0.0
    if actual.numel() == 0:
        return 0.0
    spoilt = ~actual.isfinite() & true.isfinite()
    assert not spoilt.any(), f"{what}: {int(spoilt.sum())} numbers are not finite, the truth is"
    seen = true.isfinite()
    runs = plain if isinstance(plain, (list, tuple)) else [plain]
    own = (actual.double() - true)[seen].abs()
    theirs = torch.stack([(x.double() - true)[seen].abs() for x in runs])
    theirs = theirs[theirs.isfinite()]  # plain torch may overflow where the kernel does not
    factor, more = RULE[kind]
    floor = FLOOR[actual.dtype] + more
    if kind == "backward" and len(own):
        _, exponent = math.frexp(true[seen].abs().max().item())
        floor = max(floor, torch.finfo(actual.dtype).eps * 2.0 ** (exponent - 1) / 2)
    allowed = factor * (theirs.max().item() if len(theirs) else 0.0) + floor
    worst = own.max().item() if len(own) else 0.0
    assert worst <= allowed, f"{what} in {actual.dtype}: error {worst:.3g} > {allowed:.3g} allowed"
    return worst / allowed
