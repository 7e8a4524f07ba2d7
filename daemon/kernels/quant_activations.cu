// Float32 rows to the fp16 operands of quant_gemv (panels) or quant_gemm (chunks), maybe normed,
// or halves of rows gated by each other.
//
// One block a token, which keeps the row in registers: read once, half of it written. Latency at
// one token, bandwidth at many. The order of the sum of squares depends on columns and layout.
// Macros: KIND (0 plain, 1 RMS norm, 2 SwiGLU of [gate | up] rows), LAYOUT (0 panels, 1 chunks),
// THREADS, GROUPS (of 8 columns, a thread).
#include "operand.cuh"
#include "warp.cuh"

__device__ float block_sum(float value) {
    __shared__ float of_warp[THREADS / 32];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) total += of_warp[w];
    return total;
}

// Eight neighbouring columns.
struct Eight {
    float4 low, high;

    __device__ __forceinline__ void load(const float* at) {
        low = *(const float4*)at;
        high = *(const float4*)(at + 4);
    }

    __device__ __forceinline__ float square() const {
        return low.x * low.x + low.y * low.y + low.z * low.z + low.w * low.w + high.x * high.x +
               high.y * high.y + high.z * high.z + high.w * high.w;
    }

    __device__ __forceinline__ void multiply(const Eight& w, float scale) {
        low.x *= w.low.x * scale, low.y *= w.low.y * scale;
        low.z *= w.low.z * scale, low.w *= w.low.w * scale;
        high.x *= w.high.x * scale, high.y *= w.high.y * scale;
        high.z *= w.high.z * scale, high.w *= w.high.w * scale;
    }

    // SiLU(gate) of these, times `up`.
    __device__ __forceinline__ void gate(const Eight& up) {
        low.x *= up.low.x / (1.0f + __expf(-low.x)), low.y *= up.low.y / (1.0f + __expf(-low.y));
        low.z *= up.low.z / (1.0f + __expf(-low.z)), low.w *= up.low.w / (1.0f + __expf(-low.w));
        high.x *= up.high.x / (1.0f + __expf(-high.x));
        high.y *= up.high.y / (1.0f + __expf(-high.y));
        high.z *= up.high.z / (1.0f + __expf(-high.z));
        high.w *= up.high.w / (1.0f + __expf(-high.w));
    }

    __device__ __forceinline__ uint4 packed() const {
        return {operand_pair(low.x, low.y), operand_pair(low.z, low.w),
                operand_pair(high.x, high.y), operand_pair(high.z, high.w)};
    }
};

// The permuted row in shared memory, from where it leaves in whole lines.
__device__ __forceinline__ void stage(u8* row, int column, uint4 v) {
    u8* at = row + column / 256 * 512 + permuted_byte(column);
    *(u32*)at = v.x;
    *(u32*)(at + 16) = v.y;
    *(u32*)(at + 32) = v.z;
    *(u32*)(at + 48) = v.w;
}

__device__ __forceinline__ void write_chunks(
    u8* out, const u8* row, int token, int columns, int padded_tokens) {
    __syncthreads();
    for (int unit = threadIdx.x; unit < columns / 8; unit += THREADS) {
        const long long line = (long long)(unit / 8) * padded_tokens + token;
        u8* at = out + line * 128 + (unit % 8 ^ token % 8) * 16;
        *(uint4*)at = *(const uint4*)(row + unit * 16);
    }
}

// x: float32 [tokens, columns], or [tokens, 2 columns] of gates and what they gate; norm: float32
// [columns] for KIND 1; out: fp16 operand.
extern "C" __global__ void __launch_bounds__(THREADS) quant_activations(
    const float* x, const float* norm, u8* out, int columns, int padded_tokens, float eps) {
    allow_next_kernel();
    __shared__ __align__(16) u8 row[LAYOUT == 1 ? THREADS * GROUPS * 16 : 16];
    const int token = blockIdx.x, num_groups = columns / 8;
    const float* from = x + (long long)token * columns * (KIND == 2 ? 2 : 1);
    Eight value[GROUPS], other[GROUPS];  // of a norm's weight, or what is gated
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int group = threadIdx.x + g * THREADS;
        if (KIND == 1 && group < num_groups) other[g].load(norm + group * 8);
    }
    wait_for_previous_kernel();
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int group = threadIdx.x + g * THREADS;
        if (group >= num_groups) continue;
        value[g].load(from + group * 8);
        if (KIND == 1) sum += value[g].square();
        if (KIND == 2) other[g].load(from + columns + group * 8);
    }
    const float scale = KIND == 1 ? rsqrtf(block_sum(sum) / columns + eps) : 1.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int group = threadIdx.x + g * THREADS;
        if (group >= num_groups) continue;
        if (KIND == 1) value[g].multiply(other[g], scale);
        if (KIND == 2) value[g].gate(other[g]);
        if (LAYOUT == 1) stage(row, group * 8, value[g].packed());
        else *(uint4*)panel_place(out, token, group * 8, columns) = value[g].packed();
    }
    if (LAYOUT == 1) write_chunks(out, row, token, columns, padded_tokens);
}
