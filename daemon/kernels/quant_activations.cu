// Float32 rows to the fp16 operands of quant_gemv (panels) or quant_gemm (chunks), maybe normed,
// or halves of rows gated by each other.
//
// One block a token. Reads the row twice (the second time from cache) and writes half of it:
// latency at one token, bandwidth at many. The order of the sum of squares depends on the number
// of columns alone. Macros: KIND (0 plain, 1 RMS norm, 2 SwiGLU of [gate | up] rows), LAYOUT
// (0 panels, 1 chunks).
//
// Panels: [token / 8, columns / 256, 8 chunks, lane 4 (token % 8) + t, 8], columns 64t + 8 chunk.
// Chunks: [columns / 64, padded tokens, 64]. The columns of each 256 are permuted: position
// 16 j + 8 h + 2 t + e holds column 64 t + 4 j + 2 h + e, which is what lane t of step j
// multiplies; and 16-byte units of a line are exchanged by XOR with token % 8, as the tensor
// cores read shared memory, so that a tile is one contiguous copy.
#include "mma.cuh"
#include "warp.cuh"

constexpr int THREADS = 256;  // few registers in all, to fit beside two blocks of quant_gemv
constexpr float ACTIVATION_SCALE = 0.125f;

__device__ float block_sum(float value) {
    __shared__ float of_warp[THREADS / 32];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
    for (int w = 0; w < THREADS / 32; w++) total += of_warp[w];
    return total;
}

__device__ __forceinline__ float square(float4 v) {
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

__device__ __forceinline__ float gated(float gate, float up) {
    return gate / (1.0f + __expf(-gate)) * up;
}

__device__ __forceinline__ float4 gated(float4 g, float4 u) {
    return make_float4(gated(g.x, u.x), gated(g.y, u.y), gated(g.z, u.z), gated(g.w, u.w));
}

__device__ __forceinline__ void write_panel(u8* out, int token, int column, int columns, uint4 v) {
    const long long unit = (long long)(token / 8) * (columns / 256) + column / 256;
    const int t = column % 256 / 64, chunk = column % 64 / 8;
    *(uint4*)(out + (unit * 8 + chunk) * 512 + (token % 8 * 4 + t) * 16) = v;
}

__device__ __forceinline__ void write_chunk(u8* out, int token, int column, int padded, uint4 v) {
    const int t = column % 256 / 64, step = column % 64 / 4, unit = step % 4 * 2;
    const long long line = (long long)(column / 256 * 4 + step / 4) * padded + token;
    u8* at = out + line * 128 + 4 * t;
    const int swizzle = token % 8;
    *(u32*)(at + (unit ^ swizzle) * 16) = v.x;
    *(u32*)(at + ((unit + 1) ^ swizzle) * 16) = v.y;
    *(u32*)(at + ((unit + 2) ^ swizzle) * 16) = v.z;
    *(u32*)(at + ((unit + 3) ^ swizzle) * 16) = v.w;
}

// x: float32 [tokens, columns], of KIND 2 [tokens, 2 columns]; norm: float32 [columns], read by
// KIND 1 alone; out: fp16.
extern "C" __global__ void __launch_bounds__(THREADS) quant_activations(
    const float* x, const float* norm, u8* out, int columns, int padded_tokens,
    float eps) {
    allow_next_kernel();
    wait_for_previous_kernel();
    const int token = blockIdx.x, i = threadIdx.x;
    const float* row = x + (long long)token * columns * (KIND == 2 ? 2 : 1);
    float scale = ACTIVATION_SCALE;
    if (KIND == 1) {
        float sum = 0.0f;
        for (int c = i * 4; c < columns; c += THREADS * 4) sum += square(*(const float4*)(row + c));
        scale *= rsqrtf(block_sum(sum) / columns + eps);
    }
    for (int group = i; group < columns / 8; group += THREADS) {
        const int c = group / 32 * 256 + group % 4 * 64 + group % 32 / 4 * 8;
        float4 a = *(const float4*)(row + c), b = *(const float4*)(row + c + 4);
        if (KIND == 1) {
            const float4 p = *(const float4*)(norm + c), q = *(const float4*)(norm + c + 4);
            a.x *= p.x, a.y *= p.y, a.z *= p.z, a.w *= p.w;
            b.x *= q.x, b.y *= q.y, b.z *= q.z, b.w *= q.w;
        }
        if (KIND == 2) {
            a = gated(a, *(const float4*)(row + columns + c));
            b = gated(b, *(const float4*)(row + columns + c + 4));
        }
        const uint4 v = {half2_of(a.x * scale, a.y * scale), half2_of(a.z * scale, a.w * scale),
                         half2_of(b.x * scale, b.y * scale), half2_of(b.z * scale, b.w * scale)};
        if (LAYOUT == 0) write_panel(out, token, c, columns, v);
        else write_chunk(out, token, c, padded_tokens, v);
    }
}
