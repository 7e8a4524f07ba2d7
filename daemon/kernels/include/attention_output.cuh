// What the attention kernels share besides the pages: the tiles of a prompt, and the gated output.
// Needs PROJECTION_F16 (0: f32 rows, 1: f16 rows) and OUTPUT (0: f32, 1: an operand of products).
#pragma once
#include "kv_format.cuh"
#include "operand.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// Consecutive tokens of one sequence within one page-sized tile of positions.
struct QueryTile {
    int first_row, first_token, num_rows, sequence, last_page;

    // packed: first row of the batch, first position, rows, sequence.
    __device__ explicit QueryTile(int4 packed)
        : first_row(packed.x), first_token(packed.y % PAGE), num_rows(packed.z),
          sequence(packed.w), last_page(packed.y / PAGE) {}

    // `row` counts positions from the tile's start.
    __device__ bool has(int row) const {
        return row >= first_token && row < first_token + num_rows;
    }

    __device__ int source_row(int row) const { return first_row + row - first_token; }

    __device__ int valid_keys(int page) const {
        return page < last_page ? PAGE : first_token + num_rows;
    }
};

// One head of one row: its gate in the projections, where a head is 256 queries and 256 gates, and
// its place in the output. Decode writes an operand's panels, prefill its chunks of `padded_rows`.
template <bool is_decode>
struct GatedRow {
    const void* projections;
    void* output;
    size_t gate, target;  // elements before the head's first
    int row, first_column, columns, padded_rows;

    __device__ GatedRow(const void* projections, void* output, int row, int row_stride, int head,
                        int q_heads, int padded_rows)
        : projections(projections), output(output),
          gate(size_t(row) * row_stride + size_t(head) * 2 * HEAD_DIM + HEAD_DIM),
          target((size_t(row) * q_heads + head) * HEAD_DIM), row(row),
          first_column(head * HEAD_DIM), columns(q_heads * HEAD_DIM), padded_rows(padded_rows) {}

    // Two adjacent dims, of which `dim` is even.
    __device__ __forceinline__ void write(int dim, float low, float high) const {
#if PROJECTION_F16
        const u32 gates = *reinterpret_cast<const u32*>(
            static_cast<const u16*>(projections) + gate + dim);
        low *= sigmoid(half_to_float(gates));
        high *= sigmoid(half_to_float(gates >> 16));
#else
        const float2 gates =
            *reinterpret_cast<const float2*>(static_cast<const float*>(projections) + gate + dim);
        low *= sigmoid(gates.x);
        high *= sigmoid(gates.y);
#endif
#if OUTPUT
        u8* place = is_decode ? panel_place(output, row, first_column + dim, columns)
                              : chunk_place(output, row, first_column + dim, padded_rows);
        *reinterpret_cast<u32*>(place) = operand_pair(low, high);
#else
        *reinterpret_cast<float2*>(static_cast<float*>(output) + target + dim) = {low, high};
#endif
    }
};
