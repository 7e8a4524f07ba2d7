// Hopper's asynchronous tensor-core products and barriers, for prefill attention. sm_90a only.
//
// Operands in shared memory are 16-bit tiles of 128-byte rows with the 128-byte swizzle, in panels
// of 64 columns (attention_tile.cuh). Accumulators lie as those of mma.sync: element [n][c] is
// column 8 n + 2 (lane & 3) + (c & 1) of row 16 warp + lane / 4 + 8 (c >> 1).
#pragma once
#include "attention_tile.cuh"

constexpr u64 PANEL_BYTES = PAGE * 128;

// Rows of 128 bytes along the summed dimension (K-major): 8-row groups are 1,024 bytes apart.
__device__ __forceinline__ u64 row_descriptor(u32 address) {
    return u64(address >> 4 & 0x3fff) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// Rows across the summed dimension (MN-major): panels of 64 columns lie PANEL_BYTES apart.
__device__ __forceinline__ u64 column_descriptor(u32 address) {
    return u64(address >> 4 & 0x3fff) | (PANEL_BYTES >> 4) << 16 | u64(1024 >> 4) << 32 |
           u64(1) << 62;
}

#define FOUR(a, i) "+f"(a[i][0]), "+f"(a[i][1]), "+f"(a[i][2]), "+f"(a[i][3])
#define THIRTY_TWO(a, i) \
    FOUR(a, i), FOUR(a, i + 1), FOUR(a, i + 2), FOUR(a, i + 3), FOUR(a, i + 4), FOUR(a, i + 5), \
        FOUR(a, i + 6), FOUR(a, i + 7)

#define REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define MULTIPLY_SCORES(TYPE) \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; " \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" REGISTERS_32 \
                 "}, %32, %33, p, 1, 1, 0, 0;}" \
                 : THIRTY_TWO(score, 0) : "l"(a), "l"(b), "r"(accumulate))

#define MULTIPLY_VALUES(TYPE, FIRST) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" REGISTERS_64 \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;" \
                 : THIRTY_TWO(out, FIRST), THIRTY_TWO(out, FIRST + 8) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), \
                   "l"(column_descriptor(b + FIRST / 8 * u32(PANEL_BYTES))))

// score [64 x 64] (+)= 16 columns of a [64 rows] times 16 columns of b [64 rows], transposed.
template <bool BF16>
__device__ __forceinline__ void multiply_scores(float (&score)[8][4], u64 a, u64 b,
                                                int accumulate) {
    if constexpr (BF16) {
        MULTIPLY_SCORES("bf16");
    } else {
        MULTIPLY_SCORES("f16");
    }
}

// out [64 x 256] += a [64 x 16], in registers, times 16 rows at address b; in two halves, since one
// instruction may not name more registers than a thread has at launch.
template <bool BF16>
__device__ __forceinline__ void multiply_values(float (&out)[32][4], const u32 (&a)[4], u32 b) {
    if constexpr (BF16) {
        MULTIPLY_VALUES("bf16", 0);
        MULTIPLY_VALUES("bf16", 16);
    } else {
        MULTIPLY_VALUES("f16", 0);
        MULTIPLY_VALUES("f16", 16);
    }
}

__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of accumulators across the wait.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : FOUR(x, i)::"memory");
}

// Makes ordinary stores to shared memory visible to the tensor cores' asynchronous reads.
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for the completion of phase `round`, counted from 0.
__device__ __forceinline__ void barrier_wait(u32 barrier, int round) {
    asm volatile(
        "{.reg .pred done; again%=: "
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1; "
        "@!done bra again%=;}" ::"r"(barrier), "r"(round & 1) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
