// Running softmax of 16 query rows a warp, over pages of 64 keys, for the prefill kernels.
//
// Keys come in segments of SEGMENT_PAGES pages, at absolute positions. Each is summed from nothing,
// and what comes of it joined to what came of those before it, in order. So segments may be one
// block's work or several blocks', with the same bits.
#pragma once
#include "approximations.cuh"
#include "attention_output.cuh"
#include "quads.cuh"
#include "warp.cuh"

// What came of some segments, in global memory: [blocks of 8 dims, then maxima and sums][thread].
constexpr int HEAD_THREADS = 128;  // that have a head's 64 rows
constexpr int PARTIAL_VECTORS = 33 * HEAD_THREADS;  // float4; attention_tiles.py knows it too

// Part of a query tile's keys. Of several segments in all: one, whose sums go to the slot; or all
// of them, joined in the slot.
struct QueryItem {
    QueryTile tile;
    int first_segment, end_segment, slot, num_slots;

    // packed: the tile; first segment, end, slot, slots that the merge kernel has to join.
    __device__ explicit QueryItem(const int4* packed)
        : tile(packed[0]), first_segment(packed[1].x), end_segment(packed[1].y),
          slot(packed[1].z), num_slots(packed[1].w) {}

    __device__ bool is_only_segment() const { return tile.last_page < SEGMENT_PAGES; }
    __device__ int first_page() const { return first_segment * SEGMENT_PAGES; }
    __device__ int last_page() const { return last_page_of(end_segment - 1); }
    __device__ int last_page_of(int segment) const {
        return min((segment + 1) * SEGMENT_PAGES - 1, tile.last_page);
    }
    __device__ float4* partial(float4* partials, int head, int q_heads, int thread) const {
        return partials + (size_t(slot) * q_heads + head) * PARTIAL_VECTORS + thread;
    }
};

// How the sums of two stretches of keys are brought to one maximum and added, row by row.
struct Join {
    float maximum[2], earlier[2], later[2];

    __device__ __forceinline__ Join(const float (&a)[2], const float (&b)[2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            maximum[h] = fmaxf(a[h], b[h]);
            earlier[h] = exp2_approx((a[h] - maximum[h]) * LOG2_SCALE);
            later[h] = exp2_approx((b[h] - maximum[h]) * LOG2_SCALE);
        }
    }

    __device__ __forceinline__ float sum(float a, float b, int h) const {
        return fmaf(a, earlier[h], __fmul_rn(b, later[h]));
    }
    __device__ __forceinline__ float4 of_outputs(float4 a, float4 b) const {
        return make_float4(sum(a.x, b.x, 0), sum(a.y, b.y, 0), sum(a.z, b.z, 1), sum(a.w, b.w, 1));
    }
    __device__ __forceinline__ float4 of_ends(float4 a, float4 b) const {
        return make_float4(maximum[0], maximum[1], sum(a.z, b.z, 0), sum(a.w, b.w, 1));
    }
    // Of what `SoftRows::save` writes last.
    __device__ static __forceinline__ Join of(float4 a, float4 b) {
        const float first[2] = {a.x, a.y}, second[2] = {b.x, b.y};
        return Join(first, second);
    }
};

struct SoftRows {
    float out[32][4];  // [8-dim block][row g: 2 dims, row g + 8: 2 dims]
    float maximum[2], sum[2], factor[2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 128; ++i) out[i >> 2][i & 3] = 0;
        maximum[0] = maximum[1] = NEGATIVE_INFINITY;
        sum[0] = sum[1] = 0;
    }

    // Scores to shares of the running maximum; `first_row` counts within the diagonal page.
    __device__ __forceinline__ void soften(float (&score)[8][4], bool diagonal, int first_row,
                                           int lane) {
        float best[2] = {maximum[0], maximum[1]};
        if (diagonal) {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const int key = 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
                const int row = first_row + (lane >> 2) + 8 * ((i >> 1) & 1);
                if (key > row) score[i >> 2][i & 3] = NEGATIVE_INFINITY;
            }
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            best[(i >> 1) & 1] = fmaxf(best[(i >> 1) & 1], score[i >> 2][i & 3]);
        }
        float scaled[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
            best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 2));
            factor[h] = exp2_approx((maximum[h] - best[h]) * LOG2_SCALE);
            maximum[h] = best[h];
            scaled[h] = best[h] * LOG2_SCALE;
            sum[h] *= factor[h];
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            float& x = score[i >> 2][i & 3];
            x = exp2_approx(x * LOG2_SCALE - scaled[(i >> 1) & 1]);
            sum[(i >> 1) & 1] += x;
        }
    }

    // Outputs to the maximum that `soften` found.
    __device__ __forceinline__ void rescale() {
        // Multiplying by one changes no bit, so the vote is free to skip it.
        if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < 128; ++i) out[i >> 2][i & 3] *= factor[(i >> 1) & 1];
        }
    }

    __device__ __forceinline__ float4 block(int n) const {
        return make_float4(out[n][0], out[n][1], out[n][2], out[n][3]);
    }

    __device__ __forceinline__ void set(int n, float4 x) {
        out[n][0] = x.x, out[n][1] = x.y, out[n][2] = x.z, out[n][3] = x.w;
    }

    __device__ __forceinline__ void set_ends(float4 x) {
        maximum[0] = x.x, maximum[1] = x.y, sum[0] = x.z, sum[1] = x.w;
    }

    __device__ __forceinline__ void save(float4* partial) const {
#pragma unroll
        for (int n = 0; n < 32; ++n) partial[n * HEAD_THREADS] = block(n);
        partial[32 * HEAD_THREADS] = make_float4(maximum[0], maximum[1], sum[0], sum[1]);
    }

    __device__ __forceinline__ void load(const float4* partial) {
#pragma unroll
        for (int n = 0; n < 32; ++n) set(n, partial[n * HEAD_THREADS]);
        set_ends(partial[32 * HEAD_THREADS]);
    }

    // Joins these sums to those of the keys before, in memory.
    __device__ __forceinline__ void join_into(float4* partial) const {
        constexpr int BATCH = 8;
        const float4 own = make_float4(maximum[0], maximum[1], sum[0], sum[1]);
        const float4 ends = load_now(partial + 32 * HEAD_THREADS);
        const Join join = Join::of(ends, own);
#pragma unroll
        for (int first = 0; first < 32; first += BATCH) {
            float4 earlier[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                earlier[i] = load_now(partial + (first + i) * HEAD_THREADS);
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                store_now(partial + (first + i) * HEAD_THREADS,
                          join.of_outputs(earlier[i], block(first + i)));
            }
        }
        store_now(partial + 32 * HEAD_THREADS, join.of_ends(ends, own));
    }

    // Takes in the sums of keys after these.
    __device__ __forceinline__ void take_in(const float4* partial) {
        const float4 ends = partial[32 * HEAD_THREADS];
        const float4 own = make_float4(maximum[0], maximum[1], sum[0], sum[1]);
        const Join join = Join::of(own, ends);
#pragma unroll
        for (int n = 0; n < 32; ++n) set(n, join.of_outputs(block(n), partial[n * HEAD_THREADS]));
        set_ends(join.of_ends(own, ends));
    }

    __device__ __forceinline__ void write(const void* projections, void* output,
                                          const QueryTile& tile, int row_stride, int head,
                                          int q_heads, int padded_rows, int first_row,
                                          int lane) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
            sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
            const int row = first_row + (lane >> 2) + 8 * h;
            if (!tile.has(row)) continue;
            const GatedRow<false> target(projections, output, tile.source_row(row), row_stride,
                                         head, q_heads, padded_rows);
            const float inverse = 1.0f / sum[h];
#pragma unroll
            for (int n = 0; n < 32; ++n) {
                target.write(8 * n + 2 * (lane & 3), out[n][2 * h] * inverse,
                             out[n][2 * h + 1] * inverse);
            }
        }
    }
};

// Joins the slots of tiles with several segments, and writes their rows.
extern "C" __global__ void __launch_bounds__(HEAD_THREADS) attention_prefill_merge(
    const void* projections,         // f32 or f16 [rows, row_stride]: the gates
    const int4* __restrict__ tiles,  // i32 [tiles, 8]: see QueryItem
    float4* partials,                // f32 [slots, q_heads, PARTIAL_VECTORS * 4]
    void* __restrict__ output,       // [rows, q_heads, 256], or chunks of padded_rows
    int row_stride,                  // in elements
    int padded_rows) {
    const int head = blockIdx.y, q_heads = gridDim.y, lane = threadIdx.x & 31;
    wait_for_previous_kernel();
    allow_next_kernel();
    const QueryItem item(tiles + 2 * blockIdx.x);
    const float4* partial = item.partial(partials, head, q_heads, threadIdx.x);
    SoftRows rows;
    rows.load(partial);
#pragma unroll 1
    for (int i = 1; i < item.num_slots; ++i) {
        rows.take_in(partial + size_t(i) * q_heads * PARTIAL_VECTORS);
    }
    rows.write(projections, output, item.tile, row_stride, head, q_heads, padded_rows,
               threadIdx.x / 32 * 16, lane);
}
