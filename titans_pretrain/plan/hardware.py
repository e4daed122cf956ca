"""What GPUs can do at most, from their makers' datasheets. No torch here."""

from dataclasses import dataclass

TERA = 10**12
NUMBERS = ("bf16", "tf32", "fp32")


@dataclass(frozen=True)
class Peak:
    """Products of dense matrices a second, in 10^12 FLOPs, without sparsity.

    Attributes:
        bf16: of bfloat16, on tensor cores.
        tf32: of float32 rounded to TF32, on tensor cores.
        fp32: of float32, which no tensor core computes.
    """

    bf16: float
    tf32: float
    fp32: float


_A100 = Peak(bf16=312, tf32=156, fp32=19.5)
_H100_SXM = Peak(bf16=989.5, tf32=494.5, fp32=67)
_H100_NVL = Peak(bf16=835.5, tf32=417.5, fp32=60)

# by the driver's name without "NVIDIA "; datasheets tell most figures with sparsity, which doubles
PEAKS = {
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    "A10": Peak(bf16=125, tf32=62.5, fp32=31.2),
    "A30": Peak(bf16=165, tf32=82, fp32=10.3),
    "A40": Peak(bf16=149.7, tf32=74.8, fp32=37.4),
    "L4": Peak(bf16=121, tf32=60, fp32=30.3),
    "L40": Peak(bf16=181.05, tf32=90.5, fp32=90.5),
    "L40S": Peak(bf16=362.05, tf32=183, fp32=91.6),
    "H100 80GB HBM3": _H100_SXM,
    "H100 PCIe": Peak(bf16=756.5, tf32=378, fp32=51),
    "H100 NVL": _H100_NVL,
    "H200": _H100_SXM,
    "H200 NVL": _H100_NVL,
    "GH200 480GB": _H100_SXM,
    "B200": Peak(bf16=2250, tf32=1100, fp32=75),
    "GB200": Peak(bf16=2500, tf32=1250, fp32=80),
}


def peak_flops(gpu: str, numbers: str) -> float | None:
    """The most FLOPs a second that matrix products reach on a GPU; None where it is not known.

    A name that is not in the table letter by letter is not known: relatives, and parts of a GPU
    (MIG), are slower.

    Args:
        gpu: as ``torch.cuda.get_device_name`` tells it.
        numbers: ``bf16``, ``tf32`` or ``fp32``.
    """
    if numbers not in NUMBERS:
        raise ValueError(f"{numbers!r} is none of {NUMBERS}")
    found = PEAKS.get(gpu.removeprefix("NVIDIA "))
    return None if found is None else float(getattr(found, numbers)) * TERA
