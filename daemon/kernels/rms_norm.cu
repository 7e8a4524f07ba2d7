// y = x / sqrt(mean(x²) + eps) * weight for each row, when ADD after residual += x and of that.
//
// One block a row; a thread keeps its values in registers between the two passes. Sums run over
// the columns in an order that COLUMNS alone fixes. Bytes: the row in, the row out (twice when
// ADD).
//
// Compile-time: COLUMNS (a multiple of 4), THREADS, ADD (0 or 1), OUTPUT_BF16 (0: f32, 1: bf16).
#include "attention_numeric.cuh"

constexpr int VECTORS = COLUMNS / 4;
constexpr int ROUNDS = (VECTORS + THREADS - 1) / THREADS;
constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ float block_sum(float value) {
    __shared__ float sums[WARPS];
    value = warp_sum(value);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = value;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += sums[w];
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    const float* x,                    // f32 [rows, COLUMNS]; when ADD, what to add
    float* residual,                   // f32 [rows, COLUMNS], updated when ADD; else unused
    const float* __restrict__ weight,  // f32 [COLUMNS]
    void* output,                      // f32 or bf16 [rows, COLUMNS]
    float eps)
{
    float4 values[ROUNDS];
    const size_t row = size_t(blockIdx.x) * VECTORS;
    float squares = 0;
    wait_for_previous_kernel();
    allow_next_kernel();
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * THREADS + threadIdx.x;
        float4 v = {0, 0, 0, 0};
        if (i < VECTORS) {
            v = reinterpret_cast<const float4*>(x)[row + i];
#if ADD
            const float4 r = reinterpret_cast<const float4*>(residual)[row + i];
            v = {v.x + r.x, v.y + r.y, v.z + r.z, v.w + r.w};
            reinterpret_cast<float4*>(residual)[row + i] = v;
#endif
        }
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        values[round] = v;
    }
    const float factor = rsqrtf(block_sum(squares) * (1.0f / COLUMNS) + eps);
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        const int i = round * THREADS + threadIdx.x;
        if (i >= VECTORS) break;
        const float4 v = values[round], w = reinterpret_cast<const float4*>(weight)[i];
        const float4 y = {v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z,
                          v.w * factor * w.w};
#if OUTPUT_BF16
        reinterpret_cast<uint2*>(output)[row + i] = {pack_bf16(y.x, y.y), pack_bf16(y.z, y.w)};
#else
        reinterpret_cast<float4*>(output)[row + i] = y;
#endif
    }
}
