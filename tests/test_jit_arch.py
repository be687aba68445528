"""Which binary for which GPU, compiler and driver: the whole matrix, on version numbers alone."""

import pytest

from natcupy.cuda.arch import DeviceError, Target, choose_target, with_suffix

# What nvrtcGetSupportedArchs answers, by CUDA version.
KNOWN = {
    (11, 8): (35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    (12, 0): (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90),
    (12, 8): (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 120),
    (12, 9): (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121),
    (13, 0): (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121),
    (14, 0): (80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121, 130),
}
DEVICES = [(5, 2), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0)]
DEVICES += [(10, 3), (11, 0), (12, 0), (12, 1), (13, 0), (15, 2)]
DRIVERS = [None, (11, 8), (12, 0), (12, 8), (12, 9), (13, 0), (13, 1), (14, 0)]


@pytest.mark.parametrize("compiler", KNOWN)
@pytest.mark.parametrize("device", DEVICES)
def test_every_combination_runs_or_says_what_to_change(device, compiler):
    for driver in DRIVERS:
        capability = device[0] * 10 + device[1]
        try:
            target = choose_target(device, KNOWN[compiler], compiler, driver)
        except DeviceError as error:
            text = str(error)
            remedy = ("install", "update", "Update", "backend='cpu'")
            assert any(word in text for word in remedy), text
            if driver is not None:
                assert f"{device[0]}.{device[1]}" in text
                assert f"NVRTC {compiler[0]}.{compiler[1]}" in text
                known = capability in KNOWN[compiler] and capability >= 75
                assert not known or driver[0] < compiler[0]
            continue
        assert driver is not None
        assert driver[0] >= compiler[0]
        assert target.capability in KNOWN[compiler]
        assert 75 <= target.capability <= capability
        if capability in KNOWN[compiler]:
            assert target == Target(with_suffix(capability))
        else:  # PTX: no suffix, the nearest below, a driver that reads it, a word to the user
            assert target.ptx
            assert target.arch.isdigit()
            assert target.capability == max(a for a in KNOWN[compiler] if a <= capability)
            assert driver >= compiler
            assert f"compute_{target.arch}" in target.note


@pytest.mark.parametrize(
    ("device", "compiler", "driver", "target"),
    [
        ((7, 5), (13, 0), (13, 0), "sm_75"),
        ((8, 9), (12, 8), (13, 0), "sm_89"),
        ((9, 0), (13, 0), (13, 0), "sm_90a"),
        ((9, 0), (12, 0), (12, 0), "sm_90a"),
        ((10, 0), (12, 8), (12, 8), "sm_100a"),
        ((12, 0), (13, 0), (13, 1), "sm_120a"),
        ((12, 1), (12, 8), (12, 9), "compute_120"),  # newer than the compiler
        ((13, 0), (13, 0), (14, 0), "compute_121"),
        ((10, 0), (12, 0), (12, 8), "compute_90"),
    ],
)
def test_examples(device, compiler, driver, target):
    assert str(choose_target(device, KNOWN[compiler], compiler, driver)) == target


@pytest.mark.parametrize(
    ("device", "compiler", "driver", "words"),
    [
        ((9, 0), (13, 0), None, "no NVIDIA driver was found"),
        ((6, 1), (12, 8), (13, 0), "compute capability 6.1"),
        ((6, 1), (12, 8), (13, 0), "backend='cpu'"),
        ((7, 5), (14, 0), (14, 0), "natcupy[cuda12]"),
        ((9, 0), (13, 0), (12, 8), "natcupy[cuda12]"),
        ((9, 0), (13, 0), (12, 8), "needs a driver for CUDA 13.0 or newer"),
        ((9, 0), (12, 8), (11, 8), "the CPU backend"),
        ((13, 0), (13, 0), (12, 9), "Update the driver"),
        ((12, 1), (12, 8), (12, 0), "an NVRTC not newer than 12.0"),
    ],
)
def test_messages(device, compiler, driver, words):
    with pytest.raises(DeviceError) as error:
        choose_target(device, KNOWN[compiler], compiler, driver)
    assert words in str(error.value)


def test_a_compiler_that_knows_nothing_usable_is_named():
    with pytest.raises(DeviceError, match="knows no architecture from sm_75 on, it knows sm_50"):
        choose_target((9, 0), (50,), (10, 0), (13, 0))


def test_ptx_can_be_forced_and_keeps_the_chips_own_features():
    target = choose_target((9, 0), KNOWN[13, 0], (13, 0), (13, 0), force_ptx=True)
    assert str(target) == "compute_90a"
    with pytest.raises(DeviceError, match="to run PTX"):
        choose_target((9, 0), KNOWN[12, 9], (12, 9), (12, 8), force_ptx=True)
