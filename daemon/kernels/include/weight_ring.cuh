// A warp's ring of weight tiles in shared memory, filled by the copy engine or by its own lanes.
//
// Macros: SLOTS and SLOT_BYTES (of a warp's ring), BULK_COPIES (1: the copy engine, sm_90 on; 0:
// cp.async, where a turn without a copy is counted too).
#pragma once
#include "warp.cuh"
#if BULK_COPIES
#include "barriers.cuh"
#endif

struct Ring {
    u8* slots;  // of this warp
    u64* full;  // one barrier a slot, sm_90 on
    int slot, phase;

    __device__ __forceinline__ const u8* tile() const { return slots + slot * SLOT_BYTES; }

    __device__ __forceinline__ void advance() {
        if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
};

#if BULK_COPIES
__device__ __forceinline__ void start_ring(Ring& ring, int lane) {
    if (lane == 0) {
        for (int s = 0; s < SLOTS; s++) barrier_init(ring.full + s, 1);
        barrier_init_done();
        publish_shared();
    }
    __syncwarp();
}

__device__ __forceinline__ void issue_copy(
    Ring& ring, int slot, const u8* from, int bytes, int lane) {
    if (lane != 0) return;
    barrier_expect(ring.full + slot, bytes);
    copy_bulk(ring.slots + slot * SLOT_BYTES, from, bytes, ring.full + slot);
}

__device__ __forceinline__ void issue_nothing() {}

__device__ __forceinline__ void wait_for_slot(Ring& ring) {
    barrier_wait(ring.full + ring.slot, ring.phase);
}
#else
__device__ __forceinline__ void start_ring(Ring&, int) {}

__device__ __forceinline__ void issue_copy(
    Ring& ring, int slot, const u8* from, int bytes, int lane) {
    const u32 to = shared_address(ring.slots + slot * SLOT_BYTES);
    for (int at = lane * 16; at < bytes; at += 512) copy_async_16(to + at, from + at);
    copy_async_commit();
}

__device__ __forceinline__ void issue_nothing() { copy_async_commit(); }

__device__ __forceinline__ void wait_for_slot(Ring&) {
    copy_async_wait<SLOTS - 1>();
    __syncwarp();
}
#endif
