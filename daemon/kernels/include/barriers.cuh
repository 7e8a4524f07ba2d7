// Barriers in shared memory (mbarrier), bulk copies that count on them, and what the copy engine
// and the tensor cores see of ordinary stores. sm_90 on.
//
// A barrier is named by its address in shared memory or by a pointer, as a kernel has it: the
// compiler makes other code of offsets from the one than from the other.
#pragma once
#include "warp.cuh"

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// Makes initialised barriers visible to the copy engine; then synchronise the threads that wait.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of the given parity has completed.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
        : "memory");
}

__device__ __forceinline__ void barrier_init(u64* barrier, int arrivals) {
    barrier_init(shared_address(barrier), arrivals);
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    barrier_arrive(shared_address(barrier));
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    barrier_wait(shared_address(barrier), parity);
}

// Arrives, and lets the phase wait for so many bytes of copies.
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

// Copies contiguous bytes (a multiple of 16) and counts them on the barrier.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// Makes ordinary stores to shared memory visible to the copy engine and to wgmma.
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
