// A warp's tensor-core products of 16-bit values with float32 sums (mma.sync, sm_80 on), and how
// their operands come from shared memory or from other lanes.
//
// Lane 4g+t holds, as pairs of 16-bit values, of a [16 x 16]: rows g, g+8; k pairs 2t and 2t+8; of
// b [16 x 8]: column g, the same k pairs; of the sums [16 x 8]: rows g, g+8; columns 2t and 2t+1.
#pragma once
#include "numbers.cuh"

#define MMA_M16N8K16(TYPE) \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 " \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c[16 x 8] += a[16 x 16] b[16 x 8].
template <bool BF16 = false>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (BF16) {
        MMA_M16N8K16("bf16");
    } else {
        MMA_M16N8K16("f16");
    }
}

// Four matrices of 8 x 8 values in shared memory: lane 8m + r has the address of row r of matrix m,
// and gets of each matrix a pair of row lane / 4.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same, of each matrix's transpose.
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// An 8 x 8 matrix that lies in the warp's registers, a pair of row lane / 4 in each lane.
__device__ __forceinline__ u32 transpose_matrix(u32 x) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Keeps arithmetic on accumulators on its side of asynchronous products, which the compiler does
// not see to concern registers.
template <int tiles>
__device__ __forceinline__ void hold(float (&c)[tiles][4]) {
#pragma unroll
    for (int n = 0; n < tiles; ++n)
        asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}
