"""How much of each other's memory ranks use for small collectives (`peers.py`): slots of regions, and flags.

Apart from them, since this needs no Triton.
"""

from __future__ import annotations

from tessera.core.config.needs import Sketch

WINDOW = 2
SLOTS = 2 * WINDOW
CHANNELS = 64  # programs of a kernel: enough for the links, and half of the processors stay free
REGION = 1 << 17  # bytes of a channel in a slot
MOST_RANKS = 8


def slot_sizes(world: int, slots: int, channels: int, region: int) -> tuple[int, int]:
    """Bytes of the slots and of the flags of a rank in a group of `world`."""
    return slots * world * channels * region, world * channels * 4


def peers_bytes(sketch: Sketch) -> int:
    """Bytes of a rank in all groups whose small collectives go this way."""
    if not sketch.ranks.peers:
        return 0
    worlds = [len(group) for group in sketch.mesh.groups(0) if len(group) <= MOST_RANKS]
    return sum(sum(slot_sizes(world, SLOTS, CHANNELS, REGION)) + CHANNELS * 4 for world in worlds)
