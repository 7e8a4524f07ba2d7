// Running softmax of 16 query rows a warp, over pages of 64 keys, for the prefill kernels.
#pragma once
#include "attention_output.cuh"

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
