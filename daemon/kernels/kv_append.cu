// Queries, keys and values of new tokens: norm, rotation, and append to the KV pages.
//
// Eight heads of a row a block, one warp a head: RMS norm over 256 dims of queries and keys,
// rotary embedding of dims 0 … 63 in pairs (i, i + 32), queries written out in 16 bit for the
// attention kernels (bf16 when keys are bf16, else f16), keys and values stored in their format
// (kv_format.cuh). Bytes a row: the projections read once, queries and 2 x kv_heads page rows
// written; latency-bound in decode. A row's bits depend on nothing but the row.
//
// Compile-time: K_FORMAT, V_FORMAT (KvFormat), PROJECTION_F16 (0: f32 rows, 1: f16 rows).
#include "kv_format.cuh"
#include "warp.cuh"

constexpr int WARPS = 8;
constexpr int ROTARY_PAIRS = 32;

// Lane l holds dims 8 l … 8 l + 7 of a head.
__device__ __forceinline__ void load_head(float (&x)[8], const void* row, size_t first, int lane) {
#if PROJECTION_F16
    uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const u16*>(row) + first + lane * 8);
    u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
    for (int i = 0; i < 4; ++i) {
        const float2 pair = half2_to_floats(words[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
#else
    const float4* source =
        reinterpret_cast<const float4*>(static_cast<const float*>(row) + first + lane * 8);
    float4 low = source[0], high = source[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
#endif
}

__device__ __forceinline__ void normalize(float (&x)[8], const float* weight, float eps, int lane) {
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
    float factor = rsqrtf(warp_sum(sum) * (1.0f / HEAD_DIM) + eps);
    for (int i = 0; i < 8; ++i) x[i] *= factor * weight[lane * 8 + i];
}

// Lanes 0 … 3 hold the first dims of the pairs, lanes 4 … 7 the second ones.
__device__ __forceinline__ void rotate(float (&x)[8], const float* cosines, const float* sines,
                                       int lane) {
    for (int i = 0; i < 8; ++i) {
        float other = __shfl_xor_sync(~0u, x[i], 4);
        int pair = (lane & 3) * 8 + i;
        float turned = x[i] * cosines[pair] + (lane < 4 ? -other : other) * sines[pair];
        x[i] = lane < 8 ? turned : x[i];
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) kv_append(
    const void* projections,                 // f32 or f16 [rows, row_stride]: (q | gate)s, k, v
    const int* __restrict__ positions,       // i32 [rows]; negative: the row is padding
    const int* __restrict__ sequences,       // i32 [rows]: the row's line of page_table
    const int* __restrict__ page_table,      // i32 [sequences, table_stride]
    u8* pool,                                // u8 [pages, page_bytes]
    u16* queries,                            // bf16 or f16 [rows, q_heads, 256]
    const float* __restrict__ q_norm,        // f32 [256]
    const float* __restrict__ k_norm,        // f32 [256]
    const double* __restrict__ frequencies,  // f64 [32]: angle per position
    float magnitude,                         // multiplies sine and cosine (YaRN), else 1
    float eps,
    int row_stride,                          // in elements
    int table_stride,
    int q_heads,
    int kv_heads,
    long long page_bytes,
    long long layer_offset)                  // bytes from a page's start to this layer's K plane
{
    __shared__ float cosines[ROTARY_PAIRS], sines[ROTARY_PAIRS];
    const int row = blockIdx.x, lane = threadIdx.x & 31;
    // Positions and tables were written before this step's graph began: no need to wait for them.
    const int position = positions[row];
    if (position < 0) return;
    if (threadIdx.x < ROTARY_PAIRS) {
        // float64: at position 262,143 a float32 angle is off by up to 0.008 rad.
        double turns = position * frequencies[threadIdx.x] * 0.15915494309189535;
        float sine, cosine;
        sincospif(2.0f * float(turns - rint(turns)), &sine, &cosine);
        cosines[threadIdx.x] = cosine * magnitude;
        sines[threadIdx.x] = sine * magnitude;
    }
    __syncthreads();
    const int page = page_table[size_t(sequences[row]) * table_stride + position / PAGE];
    const int token = position % PAGE;
    u8* k_plane = pool + page * page_bytes + layer_offset;
    u8* v_plane = k_plane + size_t(kv_heads) * kv_block_bytes(K_FORMAT);
    wait_for_previous_kernel();
    allow_next_kernel();
    const size_t first = size_t(row) * row_stride;
    const size_t k_first = first + size_t(q_heads) * 2 * HEAD_DIM;

    const int head = blockIdx.y * WARPS + (threadIdx.x >> 5);
    if (head >= q_heads + 2 * kv_heads) return;
    float x[8];
    if (head < q_heads) {
        load_head(x, projections, first + size_t(head) * 2 * HEAD_DIM, lane);
        normalize(x, q_norm, eps, lane);
        rotate(x, cosines, sines, lane);
        constexpr bool BF16 = K_FORMAT == KV_BF16;
        uint4 packed = {pair_of<BF16>(x[0], x[1]), pair_of<BF16>(x[2], x[3]),
                        pair_of<BF16>(x[4], x[5]), pair_of<BF16>(x[6], x[7])};
        u16* target = queries + (size_t(row) * q_heads + head) * HEAD_DIM + lane * 8;
        *reinterpret_cast<uint4*>(target) = packed;
    } else {
        const int kv = head - q_heads;
        load_head(x, projections, k_first + size_t(kv) * HEAD_DIM, lane);
        if (kv < kv_heads) {
            normalize(x, k_norm, eps, lane);
            rotate(x, cosines, sines, lane);
            u8* block = k_plane + size_t(kv) * kv_block_bytes(K_FORMAT);
            kv_store_row<K_FORMAT>(block, token, lane, x);
        } else {
            u8* block = v_plane + size_t(kv - kv_heads) * kv_block_bytes(V_FORMAT);
            kv_store_row<V_FORMAT>(block, token, lane, x);
        }
    }
}
