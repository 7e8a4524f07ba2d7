// Hopper's warpgroup products of 16-bit values with float32 sums (wgmma, sm_90a only): B in shared
// memory, A in registers or there. They run on by themselves: between wgmma_fence and wgmma_wait no
// register of theirs may be touched.
//
// A warpgroup is 4 consecutive warps. Lane 4g+t of warp w holds, of sum[n / 8][4]: rows 16w + g and
// (elements 2, 3) 16w + g + 8; columns 8i + 2t and 8i + 2t + 1. A as in mma.cuh, 16 rows a warp.
#pragma once
#include "mma.cuh"

// In shared memory, 1,024-byte aligned: rows of 128 bytes (64 values), groups of 8 rows apart by
// 1,024 bytes, 16-byte units of a row exchanged by XOR with row % 8 (the 128-byte swizzle). Rows
// are n, k along them; of a transposed B, rows are k, and the next 64 n `panel_bytes` further.
__device__ __forceinline__ u64 swizzled_operand(u32 address, u32 panel_bytes = 16) {
    return u64(address >> 4 & 0x3fff) | u64(panel_bytes >> 4) << 16 | u64(1024 >> 4) << 32 |
           u64(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `pending` committed groups are still under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, " \
    "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_128 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, " \
    "%77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, " \
    "%95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
    "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
    "%126, %127"

#define SUMS_4(s, i) "+f"(s[i][0]), "+f"(s[i][1]), "+f"(s[i][2]), "+f"(s[i][3])
#define SUMS_16(s, i) SUMS_4(s, i), SUMS_4(s, i + 1), SUMS_4(s, i + 2), SUMS_4(s, i + 3)
#define SUMS_64(s, i) SUMS_16(s, i), SUMS_16(s, i + 4), SUMS_16(s, i + 8), SUMS_16(s, i + 12)

#define OPERANDS(a, b) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)

#define WGMMA_64(TYPE) \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %37, 0; " \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" NAMES_32 "}, " \
                 "{%32, %33, %34, %35}, %36, add, 1, 1, %38;}" \
                 : SUMS_16(sum, 0), SUMS_16(sum, 4) \
                 : OPERANDS(a, b), "r"(accumulate), "n"(int(TRANSPOSED)))

// sum[64 x 64] (+)= a[64 x 16] b[16 x 64].
template <bool TRANSPOSED = false>
__device__ __forceinline__ void wgmma(
    float (&sum)[8][4], const u32 (&a)[4], u64 b, int accumulate = 1) {
    WGMMA_64("f16");
}

#define WGMMA_64_SHARED(TYPE) \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %34, 0; " \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" NAMES_32 "}, " \
                 "%32, %33, add, 1, 1, 0, 0;}" \
                 : SUMS_16(sum, 0), SUMS_16(sum, 4) : "l"(a), "l"(b), "r"(accumulate))

// The same with a in shared memory, too.
template <bool BF16 = false>
__device__ __forceinline__ void wgmma(float (&sum)[8][4], u64 a, u64 b, int accumulate) {
    if constexpr (BF16) {
        WGMMA_64_SHARED("bf16");
    } else {
        WGMMA_64_SHARED("f16");
    }
}

#define WGMMA_128(TYPE) \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" NAMES_64 "}, " \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, %69;" \
                 : SUMS_64(sum, 0) : OPERANDS(a, b), "n"(int(TRANSPOSED)))

// sum[64 x 128] += a[64 x 16] b[16 x 128].
template <bool TRANSPOSED = false, bool BF16 = false>
__device__ __forceinline__ void wgmma(float (&sum)[16][4], const u32 (&a)[4], u64 b) {
    if constexpr (BF16) {
        WGMMA_128("bf16");
    } else {
        WGMMA_128("f16");
    }
}

// sum[64 x 256] += a[64 x 16] b[16 x 256].
__device__ __forceinline__ void wgmma(float (&sum)[32][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" NAMES_128 "}, "
                 "{%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
                 : SUMS_64(sum, 0), SUMS_64(sum, 16) : OPERANDS(a, b));
}

// Moves registers between the warpgroups of a block, up or down to a multiple of 8 a thread.
template <int registers>
__device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
