"""Accelerators and their published figures."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator's published figures.

    Attributes:
      name: in targets, such as 'v5e'.
      kinds: its names in `jax.Device.device_kind`.
      bfloat16, float32: peak FLOP/s of networks with that `dtype`, at JAX's default precision: TPUs
        multiply float32 in bfloat16, NVIDIA GPUs since Ampere in TensorFloat-32.
      gib: memory in GiB.
      interconnect: bytes/s that a chip can send, over all of its links.
      pod: number of chips that those links join; between pods there is a slower network.
      note: remarks on the figures.
      bandwidth: bytes/s of its memory; 0 where it is not used.
      clock: Hz, of the cycles in which a TPU's compiler counts; 0 for GPUs. From the peak and the
        matrix units: v5e has four of 128 x 128 multiply-adds per cycle, v4 and v5p four in each
        of two cores, v6e four times the operations of v5e per cycle.
    """

    name: str
    kinds: tuple[str, ...]
    bfloat16: float
    float32: float
    gib: float
    interconnect: float
    pod: int
    note: str = ""
    bandwidth: float = 0.0
    clock: float = 0.0

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s for a network's `dtype`."""
        return {"bfloat16": self.bfloat16, "float32": self.float32}[dtype]


_PASSES = "float32 is multiplied in one bfloat16 pass (JAX's default precision on TPU), at its rate"

_TF32 = "float32 is multiplied as TensorFloat-32 (JAX's default precision), at half bfloat16's rate"

_CORES = (
    "Google Cloud's names count TensorCores, two per chip: "
    "{name}-{chips} here is {name}-{cores} there"
)

CHIPS = (
    # cloud.google.com/tpu/docs/v4, and "TPU v4" (arXiv 2304.01433): six links of 50 GB/s each way.
    Chip(
        "v4", ("TPU v4",), 275e12, 275e12, 32.0, 300e9, 4096, f"{_PASSES}; {_CORES}", 1228e9, 1.05e9
    ),
    # cloud.google.com/tpu/docs/v5e: 400 GB/s of interconnect, both ways together.
    Chip(
        "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 197e12, 16.0, 200e9, 256, _PASSES, 819e9, 1.5e9
    ),
    # cloud.google.com/tpu/docs/v5p: 1200 GB/s of interconnect, both ways together.
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        459e12,
        459e12,
        95.0,
        600e9,
        6144,
        f"{_PASSES}; {_CORES}",
        2765e9,
        1.75e9,
    ),
    # cloud.google.com/tpu/docs/v6e: twice v5e's interconnect, four links.
    Chip(
        "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 918e12, 32.0, 400e9, 256, _PASSES, 1640e9, 1.75e9
    ),
    # NVIDIA A100 data sheet (SXM, dense): 312 TFLOP/s, TF32 156; NVLink 600 GB/s, both ways
    # together.
    Chip(
        "a100",
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        312e12,
        156e12,
        80.0,
        300e9,
        8,
        f"80 GB; {_TF32}",
    ),
    Chip(
        "a100-40gb",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        312e12,
        156e12,
        40.0,
        300e9,
        8,
        _TF32,
    ),
    # NVIDIA H100 data sheet: dense rates are half of those it prints, with sparsity; NVLink 900
    # GB/s, PCIe 5 128 GB/s, both ways.
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 494e12, 79.6, 450e9, 8, f"SXM; {_TF32}"),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 378e12, 79.6, 64e9, 8, _TF32),
    # NVIDIA H200 data sheet: H100 with 141 GB.
    Chip("h200", ("NVIDIA H200",), 989e12, 494e12, 140.4, 450e9, 8, _TF32),
    # NVIDIA T4 data sheet: float32 8.1 TFLOP/s; PCIe 3, 32 GB/s both ways together.
    Chip(
        "t4",
        ("Tesla T4",),
        8.1e12,
        8.1e12,
        15.0,
        16e9,
        8,
        "its 65 TFLOP/s are for float16; bfloat16 is no faster than float32",
    ),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS if device_kind.lower() in map(str.lower, chip.kinds)), None)
