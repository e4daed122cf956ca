"""Peaks of GPUs are dense, and known for those of the table alone."""

import pytest

from titans_pretrain.plan import hardware


@pytest.mark.parametrize(
    ("gpu", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362.05e12),
    ],
)
def test_a_gpu_is_found_by_its_driver_s_name(gpu, bf16):
    assert hardware.peak_flops(gpu, "bf16") == bf16


def test_each_kind_of_numbers_has_a_peak_of_its_own():
    peaks = [hardware.peak_flops("NVIDIA H100 80GB HBM3", kind) for kind in hardware.NUMBERS]
    assert peaks == [989.5e12, 494.5e12, 67e12]
    with pytest.raises(ValueError, match="'fp8' is none of"):
        hardware.peak_flops("NVIDIA H200", "fp8")


@pytest.mark.parametrize(
    "gpu",
    ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM-64GB", "NVIDIA A10G", "NVIDIA H20", ""],
)
def test_a_relative_or_a_part_of_a_gpu_is_not_known(gpu):
    assert hardware.peak_flops(gpu, "bf16") is None


@pytest.mark.parametrize("peak", hardware.PEAKS.values())
def test_tensor_cores_multiply_bfloat16_twice_as_fast_as_tf32(peak):
    """Up to rounding; a figure with sparsity beside one without would not."""
    assert peak.bf16 / peak.tf32 == pytest.approx(2, rel=0.03)
    assert peak.tf32 >= peak.fp32
