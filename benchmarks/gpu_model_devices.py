"""What GPUs offer a kernel: the figures of data sheets, and how many warps a multiprocessor holds at once."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
SECTOR = 32  # bytes that the L2 cache hands out at once
RESERVED_SHARED = 1024  # bytes that CUDA keeps of every block's shared memory, from capability 8.0 on


@dataclass(frozen=True)
class Multiprocessor:
    """What belongs to a compute capability: CUDA's programming guide, "Technical specifications" and "Throughput"."""

    warps: int  # resident at once
    blocks: int
    shared: int  # bytes for all blocks
    shared_of_block: int  # at most, when asked for
    float_lanes: int  # float32 additions, multiplications and multiply-adds a clock
    double_lanes: int
    shared_bytes: int  # that shared memory and the L1 cache hand out a clock
    registers: int = 65536
    integer_lanes: int = 64  # additions, comparisons, shifts, logic
    product_lanes: int = 64  # 32-bit integer products
    special_lanes: int = 16  # roots, exponentials, conversions between integers and floats

    @property
    def wavefronts(self) -> float:
        """Wavefronts of 128 bytes a clock."""
        return self.shared_bytes / 128


KIB = 1024
CAPABILITIES = {
    "7.5": Multiprocessor(32, 16, 64 * KIB, 64 * KIB, 64, 2, 64),
    "8.0": Multiprocessor(64, 32, 164 * KIB, 163 * KIB, 64, 32, 128),
    "8.6": Multiprocessor(48, 16, 100 * KIB, 99 * KIB, 128, 2, 128),
    "8.9": Multiprocessor(48, 24, 100 * KIB, 99 * KIB, 128, 2, 128),
    "9.0": Multiprocessor(64, 32, 228 * KIB, 227 * KIB, 128, 64, 128),
    "10.0": Multiprocessor(64, 32, 228 * KIB, 227 * KIB, 128, 64, 128),
    "12.0": Multiprocessor(48, 24, 100 * KIB, 99 * KIB, 128, 2, 128),
}


@dataclass(frozen=True)
class Gpu:
    """One product."""

    title: str
    capability: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s of its memory
    l2_bytes_per_clock: int  # of all slices of the L2 cache together
    l2_bytes: int
    tensor: int  # multiply-adds of halves a clock and multiprocessor, summed up in float32, by mma.sync

    @property
    def multiprocessor(self) -> Multiprocessor:
        return CAPABILITIES[self.capability]

    @property
    def architecture(self) -> str:
        """As nvcc names it."""
        return "sm_" + self.capability.replace(".", "")

    @property
    def l2_bandwidth(self) -> float:
        """Bytes/s. A multiprocessor takes 64 bytes a clock, whatever the cache could give."""
        return min(self.l2_bytes_per_clock, 64 * self.multiprocessors) * self.clock


# NVIDIA's data sheets and architecture whitepapers: multiprocessors, boost clock (H100: 1.755 GHz, the whitepaper's
# preliminary one; H200: what ncu's counters in results/ show), memory bandwidth, L2 cache. L2 bytes a clock: A100's
# whitepaper says 5120, and H100's cache is no slower; for the others, of which NVIDIA says nothing, 64 for each
# multiprocessor. Copies within the L2 cache reach some two thirds of it.
#
# Tensor cores: the published dense TFLOPS of halves with float32 sums, over 2 x multiprocessors x boost clock: T4 65,
# A100 312, RTX 3090 71, L4 121, RTX 4090 165, RTX 5090 210 (a GeForce has half the rate where sums are float32). H100's
# 989, at 1.83 GHz 2048 a clock, and B200's 2250 are those of wgmma and tcgen05, which take their operands from shared
# memory; by mma.sync, microbenchmarks of Hopper reach 0.62 to 0.65 of it, for which 1280 stands. Of B200 nothing is
# known: A100's rate is assumed.
MIB = 1024 * KIB
GPUS = {
    "t4": Gpu("T4", "7.5", 40, 1.590e9, 320e9, 64 * 40, 4 * MIB, 512),
    "a100": Gpu("A100 80 GB SXM", "8.0", 108, 1.410e9, 2039e9, 5120, 40 * MIB, 1024),
    "rtx3090": Gpu("GeForce RTX 3090", "8.6", 82, 1.695e9, 936e9, 64 * 82, 6 * MIB, 256),
    "l4": Gpu("L4", "8.9", 58, 2.040e9, 300e9, 64 * 58, 48 * MIB, 512),
    "rtx4090": Gpu("GeForce RTX 4090", "8.9", 128, 2.520e9, 1008e9, 64 * 128, 72 * MIB, 256),
    "h100": Gpu("H100 SXM", "9.0", 132, 1.755e9, 3350e9, 5120, 50 * MIB, 1280),
    "h200": Gpu("H200 SXM", "9.0", 132, 1.980e9, 4800e9, 5120, 50 * MIB, 1280),
    "b200": Gpu("B200", "10.0", 148, 1.965e9, 8000e9, 5120, 126 * MIB, 1024),
    "rtx5090": Gpu("GeForce RTX 5090", "12.0", 170, 2.407e9, 1792e9, 64 * 170, 96 * MIB, 256),
}


@dataclass(frozen=True)
class Occupancy:
    """How much of a kernel a multiprocessor holds at once."""

    blocks: int
    warps: int
    share: float  # of the warps that it could hold
    limit: str  # what keeps more from fitting: 'warps', 'blocks', 'registers' or 'shared memory'


def occupancy(capability: str, threads: int, registers: int, shared: int) -> Occupancy:
    """Resident blocks of so many threads, registers a thread, and bytes of static and dynamic shared memory."""
    unit = CAPABILITIES[capability]
    warps = -(-threads // WARP)
    # A warp takes registers in units of 256, from the quarter of the file that belongs to its scheduler.
    of_warp = max(256, -(-registers * WARP // 256) * 256)
    of_scheduler = unit.registers // 4 // of_warp
    reserved, granule = (0, 256) if capability == "7.5" else (RESERVED_SHARED, 128)
    of_block = -(-(shared + reserved) // granule) * granule
    limits = {
        "warps": unit.warps // warps,
        "blocks": unit.blocks,
        "registers": 4 * of_scheduler // warps,
        "shared memory": unit.shared // of_block if of_block else unit.blocks,
    }
    if shared > unit.shared_of_block:
        limits["shared memory"] = 0
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit]
    return Occupancy(blocks, blocks * warps, blocks * warps / unit.warps, limit)
