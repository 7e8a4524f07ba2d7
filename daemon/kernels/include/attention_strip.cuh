// One warp's attention over strips of 16 tokens, for up to 16 query heads of one KV head.
//
// StripRing brings strips of a page from device memory to shared memory, K then V, as they lie
// there (kv_format.cuh). StripAttention keeps running maxima, sums and outputs in registers. Dims
// are taken in whatever order makes 16-byte shared loads give whole fragments: any order will do
// for the sum over dims in q·k, and `dim_of_place` says which dim an output is.
#pragma once
#include "approximations.cuh"
#include "kv_format.cuh"
#include "mma.cuh"
#include "warp.cuh"

constexpr int STRIP = 16;
constexpr int OUTPUT_STRIDE = HEAD_DIM + 4;  // heads of a warp's lanes then fall into other banks

// Outputs are kept in the order of tensor-core fragments; the dim that place `p` of 256 holds.
template <int V_FMT>
__device__ __forceinline__ int dim_of_place(int p) {
    if constexpr (V_FMT == KV_BF16) return p;
    if constexpr (V_FMT == KV_Q4_0) return 32 * (p & 7) + (p >> 3);
    return 128 * (p >> 7) + 16 * (p & 7) + ((p >> 3) & 15);
}

__host__ __device__ constexpr int strip_bytes(int format) {
    return kv_block_bytes(format) / PAGE * STRIP;
}

template <int FORMAT>
__device__ __forceinline__ int strip_chunk(int token, int chunk) {
    if constexpr (FORMAT == KV_BF16) {
        return (chunk >> 3) * (STRIP * 128) + token * 128 + (((chunk & 7) ^ (token & 7)) << 4);
    } else {
        return kv_chunk_offset<FORMAT>(token, chunk);
    }
}

template <int FORMAT>
__device__ __forceinline__ uint4 load_chunk(const u8* strip, int token, int chunk) {
    return *reinterpret_cast<const uint4*>(strip + strip_chunk<FORMAT>(token, chunk));
}

template <int FORMAT>
__device__ __forceinline__ u32 strip_scale(const u8* strip, int token, int group) {
    const int offset = STRIP * kv_row_bytes(FORMAT) + (token * SCALE_GROUPS + group) * 2;
    return *reinterpret_cast<const u16*>(strip + offset);
}

// A warp's copy of one strip; strip `quarter` of the page's head block.
template <int FORMAT>
__device__ __forceinline__ void copy_strip(u32 target, const u8* block, int quarter, int lane) {
    constexpr int ROWS = STRIP * kv_row_bytes(FORMAT);
#pragma unroll
    for (int at = 0; at < ROWS; at += 512) {
        const int panel = FORMAT == KV_BF16 ? at / (STRIP * 128) : 0;
        const int source = FORMAT == KV_BF16
                               ? panel * (PAGE - STRIP) * 128 + quarter * STRIP * 128 + at
                               : quarter * ROWS + at;
        copy_async_16(target + at + lane * 16, block + source + lane * 16);
    }
    if constexpr (kv_has_scales(FORMAT)) {
        const u8* scales = block + PAGE * kv_row_bytes(FORMAT) + quarter * 256;
        if (lane < 16) copy_async_16(target + ROWS + lane * 16, scales + lane * 16);
    }
}

template <int K_FMT, int V_FMT, int DEPTH, int STRIDE>
struct StripRing {
    u8* slots;
    const u8 *k_plane, *v_plane;  // of page 0; pages lie page_bytes apart
    const int* pages;
    long long page_bytes;
    int slot_bytes, first, end, lane;
    int next_load = 0, next_use = 0;  // half strips: even is K, odd is V
    int lane_page = 0;                // page of the lane's round of 32

    __device__ StripRing(u8* slots, int slot_bytes, const u8* k_plane, const u8* v_plane,
                         const int* pages, long long page_bytes, int first, int end, int lane)
        : slots(slots), k_plane(k_plane), v_plane(v_plane), pages(pages), page_bytes(page_bytes),
          slot_bytes(slot_bytes), first(first), end(end), lane(lane) {}

    __device__ __forceinline__ void load() {
        const int round = next_load >> 1;
        const int strip = first + round * STRIDE;
        if ((next_load & 63) == 0) {
            const int ahead = strip + lane * STRIDE;
            lane_page = ahead < end ? pages[ahead / (PAGE / STRIP)] : 0;
        }
        if (strip < end) {
            const long long page = __shfl_sync(~0u, lane_page, round & 31);
            const u32 target = shared_address(slots + (next_load % DEPTH) * slot_bytes);
            const int quarter = strip % (PAGE / STRIP);
            if (next_load & 1) {
                copy_strip<V_FMT>(target, v_plane + page * page_bytes, quarter, lane);
            } else {
                copy_strip<K_FMT>(target, k_plane + page * page_bytes, quarter, lane);
            }
        }
        copy_async_commit();
        ++next_load;
    }

    __device__ __forceinline__ void fill() {
        for (int i = 0; i < DEPTH; ++i) load();
    }

    __device__ __forceinline__ u8* wait() {
        copy_async_wait<DEPTH - 1>();
        __syncwarp();
        return slots + (next_use % DEPTH) * slot_bytes;
    }

    // The half strip that `wait` gave is not needed any more.
    __device__ __forceinline__ void advance() {
        __syncwarp();
        ++next_use;
        load();
    }
};

template <int K_FMT, int V_FMT, int HEADS>
struct StripAttention {
    static constexpr int TILES = (HEADS + 7) / 8;    // of eight query heads
    static constexpr int CHAINS = TILES == 1 ? 4 : 2;  // independent sums of products
    static constexpr bool K_BF16 = K_FMT == KV_BF16, V_BF16 = V_FMT == KV_BF16;

    u32 q[TILES][16][2];
    float out[TILES][16][4];
    float score[TILES][CHAINS][4];
    float maximum[TILES][2], sum[TILES][2];
    u32 share[TILES][2];

    // First of the two adjacent dims of query fragment (step, half) in lane column `j`.
    __device__ __forceinline__ static int query_dim(int step, int half, int j) {
        if constexpr (K_BF16) return step * 16 + half * 8 + j * 2;
        if constexpr (K_FMT == KV_Q4_0) {
            return 32 * (4 * (step >> 3) + j) + 8 * ((step >> 1) & 3) + 4 * (step & 1) + 2 * half;
        }
        return 16 * (4 * (step >> 2) + j) + 4 * (step & 3) + 2 * half;
    }

    // queries: 16-bit [HEADS, 256] of this KV head.
    __device__ __forceinline__ void load_queries(const u16* queries, int lane) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int head = tile * 8 + (lane >> 2);
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const u16* source = queries + head * HEAD_DIM + query_dim(i >> 1, i & 1, lane & 3);
                q[tile][i >> 1][i & 1] = head < HEADS ? *reinterpret_cast<const u32*>(source) : 0;
            }
            for (int i = 0; i < 64; ++i) out[tile][i >> 2][i & 3] = 0;
            maximum[tile][0] = maximum[tile][1] = NEGATIVE_INFINITY;
            sum[tile][0] = sum[tile][1] = 0;
        }
    }

    __device__ __forceinline__ void multiply_scores(int step, const u32 (&a)[4]) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            mma_m16n8k16<K_BF16>(score[tile][step % CHAINS], a, q[tile][step][0], q[tile][step][1]);
        }
    }

    __device__ __forceinline__ void multiply_outputs(int block, const u32 (&a)[4]) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            mma_m16n8k16<V_BF16>(out[tile][block], a, share[tile][0], share[tile][1]);
        }
    }

    __device__ __forceinline__ void score_wide(const u8* keys, int lane) {
        const u32 base = shared_address(keys);
#pragma unroll
        for (int step = 0; step < 16; ++step) {
            u32 a[4];
            load_matrices(a, base + strip_chunk<KV_BF16>(lane & 15, 2 * step + (lane >> 4)));
            multiply_scores(step, a);
        }
    }

    __device__ __forceinline__ void score_bytes(const u8* keys, int g, int j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint4 raw[2];
            u32 scale[2] = {0, 0};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = g + 8 * half, chunk = 4 * i + j;
                raw[half] = load_chunk<K_FMT>(keys, token, chunk);
                if constexpr (K_FMT == KV_Q8_0) {
                    scale[half] = strip_scale<K_FMT>(keys, token, chunk >> 1) * 0x10001u;
                }
            }
            const u32 low[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
            const u32 high[4] = {raw[1].x, raw[1].y, raw[1].z, raw[1].w};
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const u32 a[4] = {half_low_bytes<K_FMT>(low[s], scale[0]),
                                  half_low_bytes<K_FMT>(high[s], scale[1]),
                                  half_high_bytes<K_FMT>(low[s], scale[0]),
                                  half_high_bytes<K_FMT>(high[s], scale[1])};
                multiply_scores(4 * i + s, a);
            }
        }
    }

    __device__ __forceinline__ void score_nibbles(const u8* keys, int g, int j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int chunk = 4 * i + j;
            const uint4 x = load_chunk<K_FMT>(keys, g, chunk);
            const uint4 y = load_chunk<K_FMT>(keys, g + 8, chunk);
            const u32 low[4] = {x.x, x.y, x.z, x.w}, high[4] = {y.x, y.y, y.z, y.w};
            const u32 low_scale = strip_scale<K_FMT>(keys, g, chunk) * 0x10001u;
            const u32 high_scale = strip_scale<K_FMT>(keys, g + 8, chunk) * 0x10001u;
#pragma unroll
            for (int part = 0; part < 8; ++part) {
                const int word = part >> 1, shift = 8 * (part & 1);
                const u32 a[4] = {half_nibbles(low[word] >> shift, low_scale),
                                  half_nibbles(high[word] >> shift, high_scale),
                                  half_nibbles(low[word] >> (shift + 4), low_scale),
                                  half_nibbles(high[word] >> (shift + 4), high_scale)};
                multiply_scores(8 * i + part, a);
            }
        }
    }

    // Scores of a strip whose first `valid` tokens exist; updates maxima, sums and output scale.
    __device__ __forceinline__ void scores(const u8* keys, int valid, int lane) {
        const int g = lane >> 2, j = lane & 3;
        for (int i = 0; i < TILES * CHAINS * 4; ++i) (&score[0][0][0])[i] = 0;
        if constexpr (K_BF16) {
            score_wide(keys, lane);
        } else if constexpr (K_FMT == KV_Q4_0) {
            score_nibbles(keys, g, j);
        } else {
            score_bytes(keys, g, j);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) update(tile, g < valid, g + 8 < valid);
    }

    __device__ __forceinline__ void update(int tile, bool low_valid, bool high_valid) {
        float p[4], factor[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            p[i] = score[tile][0][i] + score[tile][1][i];
            if constexpr (CHAINS == 4) p[i] += score[tile][2][i] + score[tile][3][i];
            p[i] = (i < 2 ? low_valid : high_valid) ? p[i] * LOG2_SCALE : NEGATIVE_INFINITY;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float best = fmaxf(p[i], p[i + 2]);
            for (int step = 4; step < 32; step *= 2) {
                best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
            }
            best = fmaxf(best, maximum[tile][i]);
            factor[i] = exp2_approx(maximum[tile][i] - best);
            maximum[tile][i] = best;
            p[i] = exp2_approx(p[i] - best);
            p[i + 2] = exp2_approx(p[i + 2] - best);
            sum[tile][i] = sum[tile][i] * factor[i] + (p[i] + p[i + 2]);
        }
        share[tile][0] = transpose_matrix(pair_of<V_BF16>(p[0], p[1]));
        share[tile][1] = transpose_matrix(pair_of<V_BF16>(p[2], p[3]));
        // Multiplying by one changes no bit, so the vote is free to skip it.
        if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < 64; ++i) out[tile][i >> 2][i & 3] *= factor[i & 1];
        }
    }

    __device__ __forceinline__ void mix_wide(const u8* values, int lane) {
        const u32 base = shared_address(values);
#pragma unroll
        for (int block = 0; block < 16; ++block) {
            const int token = (lane & 7) + 8 * (lane >> 4), chunk = 2 * block + ((lane >> 3) & 1);
            u32 a[4];
            load_matrices_transposed(a, base + strip_chunk<KV_BF16>(token, chunk));
            multiply_outputs(block, a);
        }
    }

    // The four tokens of lane column `j`: 2 j, 2 j + 1, 2 j + 8, 2 j + 9.
    __device__ __forceinline__ static int token_of(int i, int j) {
        return 2 * j + (i & 1) + 8 * (i >> 1);
    }

    __device__ __forceinline__ void load_values(const u8* values, int chunk, int group, int j,
                                                u32 (&words)[4][4], u32 (&scale)[2]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = token_of(i, j);
            const uint4 raw = load_chunk<V_FMT>(values, token, chunk);
            words[i][0] = raw.x, words[i][1] = raw.y, words[i][2] = raw.z, words[i][3] = raw.w;
        }
        if constexpr (kv_has_scales(V_FMT)) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                scale[i] = strip_scale<V_FMT>(values, token_of(2 * i, j), group) |
                           strip_scale<V_FMT>(values, token_of(2 * i + 1, j), group) << 16;
            }
        }
    }

    __device__ __forceinline__ void mix_bytes(const u8* values, int g, int j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 words[4][4], scale[2];
            load_values(values, 8 * half + g, 4 * half + (g >> 1), j, words, scale);
#pragma unroll
            for (int part = 0; part < 8; ++part) {
                const int word = part >> 1;
                const u32 selector = part & 1 ? 0x7362 : 0x5140;
                const u32 low = __byte_perm(words[0][word], words[1][word], selector);
                const u32 high = __byte_perm(words[2][word], words[3][word], selector);
                const u32 a[4] = {
                    half_low_bytes<V_FMT>(low, scale[0]), half_high_bytes<V_FMT>(low, scale[0]),
                    half_low_bytes<V_FMT>(high, scale[1]), half_high_bytes<V_FMT>(high, scale[1])};
                multiply_outputs(8 * half + part, a);
            }
        }
    }

    __device__ __forceinline__ void mix_nibbles(const u8* values, int g, int j) {
        u32 words[4][4], scale[2];
        load_values(values, g, g, j, words, scale);
#pragma unroll
        for (int part = 0; part < 16; ++part) {
            const int word = part >> 2, shift = 4 * (part & 3);
            const u32 even0 = __byte_perm(words[0][word], words[1][word], 0x5410) >> shift;
            const u32 odd0 = __byte_perm(words[0][word], words[1][word], 0x7632) >> shift;
            const u32 even1 = __byte_perm(words[2][word], words[3][word], 0x5410) >> shift;
            const u32 odd1 = __byte_perm(words[2][word], words[3][word], 0x7632) >> shift;
            const u32 a[4] = {half_nibbles(even0, scale[0]), half_nibbles(odd0, scale[0]),
                              half_nibbles(even1, scale[1]), half_nibbles(odd1, scale[1])};
            multiply_outputs(part, a);
        }
    }

    // Adds the strip's values, weighted by the scores just taken.
    __device__ __forceinline__ void mix(const u8* values, int lane) {
        if constexpr (V_BF16) {
            mix_wide(values, lane);
        } else if constexpr (V_FMT == KV_Q4_0) {
            mix_nibbles(values, lane >> 2, lane & 3);
        } else {
            mix_bytes(values, lane >> 2, lane & 3);
        }
    }

    // Whatever an earlier owner of the page left after token `valid` must not reach 0 x infinity.
    __device__ __forceinline__ void clear_values(u8* values, int valid, int lane) {
        constexpr int CHUNKS = kv_row_bytes(V_FMT) / 16;
        for (int i = valid * CHUNKS + lane; i < STRIP * CHUNKS; i += 32) {
            const int at = strip_chunk<V_FMT>(i / CHUNKS, i % CHUNKS);
            *reinterpret_cast<uint4*>(values + at) = {0, 0, 0, 0};
        }
        if constexpr (kv_has_scales(V_FMT)) {
            u8* scales = values + STRIP * kv_row_bytes(V_FMT);
            for (int i = valid + lane; i < STRIP; i += 32) {
                *reinterpret_cast<uint4*>(scales + i * 16) = {0, 0, 0, 0};
            }
        }
        __syncwarp();
    }

    // outputs f32 [HEADS, OUTPUT_STRIDE] in order of place, maxima and sums f32 [HEADS] of this
    // warp, in shared memory.
    __device__ __forceinline__ void store(float* outputs, float* maxima, float* sums, int lane) {
        const int g = lane >> 2, j = lane & 3;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 64; ++i) {
                const int head = tile * 8 + 2 * j + (i & 1);
                if (head < HEADS) {
                    outputs[head * OUTPUT_STRIDE + (i >> 1) * 8 + g] = out[tile][i >> 2][i & 3];
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float total = sum[tile][i];
                for (int step = 4; step < 32; step *= 2) {
                    total += __shfl_xor_sync(~0u, total, step);
                }
                const int head = tile * 8 + 2 * j + i;
                if (g == 0 && head < HEADS) maxima[head] = maximum[tile][i], sums[head] = total;
            }
        }
    }
};
