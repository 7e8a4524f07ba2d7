// Tiles of fp16 that the delta net's prefill kernels hand to each other, and how lanes
// address them.
//
// A panel is [64 rows][64 columns] of fp16, 8 KiB, its 16-byte units permuted within each row so
// that eight rows of one column block fall into different banks; the same bytes lie in global and
// shared memory, so panels move by plain copies. A tile of 64 x 128 is two panels side by side.
// fp16 and not bf16: keys and queries have length one, inverse and scores stay near one, and values
// are saturated at 65504; eight times less rounding than bf16. Accumulators are float32.
#pragma once
#include "delta_math.cuh"
#include "mma.cuh"
#include "warp.cuh"

constexpr int CHUNK = 64;
constexpr int PANEL_BYTES = CHUNK * CHUNK * 2;
constexpr int TILE_BYTES = 2 * PANEL_BYTES;
constexpr int DECAY_BYTES = 2 * CHUNK * 4;  // e^G of each token, then e^(G_end - G)

// What the prepare kernel needs to know of a chunk, and the scan of a span: rows of int32.
struct ChunkEntry {
    int first_row;   // in the projected rows
    int num_rows;    // 1 to 64, or 0 for padding of the launch
    int history;     // slot that holds the rows before, or -1: they precede `first_row`
    int capture;     // slot that gets a copy of the state at the chunk's end, or -1
};

struct SpanEntry {
    int first_chunk;
    int num_chunks;
    int slot;
    int unused;
};

// Offsets in bytes into the workspace; heads and chunks are laid out one after another.
struct Workspace {
    u8* base;
    int k_heads, v_heads;

    __device__ long long chunk_bytes() const {
        return k_heads * 2ll * TILE_BYTES + v_heads * (2ll * TILE_BYTES + DECAY_BYTES);
    }
    __device__ u8* keys(int chunk, int k_head) const {
        return base + chunk * chunk_bytes() + k_head * 2ll * TILE_BYTES;
    }
    __device__ u8* queries(int chunk, int k_head) const { return keys(chunk, k_head) + TILE_BYTES; }
    __device__ u8* values(int chunk, int v_head) const {  // outputs after the scan
        return keys(chunk, k_heads) + v_head * (2ll * TILE_BYTES + DECAY_BYTES);
    }
    __device__ u8* inverse(int chunk, int v_head) const {
        return values(chunk, v_head) + TILE_BYTES;
    }
    __device__ u8* scores(int chunk, int v_head) const {
        return inverse(chunk, v_head) + PANEL_BYTES;
    }
    __device__ u8* decays(int chunk, int v_head) const {
        return scores(chunk, v_head) + PANEL_BYTES;
    }
};

// Byte offset of 16-byte unit `unit` (0..7) of `row` in a panel.
__device__ __forceinline__ int panel_offset(int row, int unit) {
    return row * 128 + ((unit ^ (row & 7)) << 4);
}

// Lane's row addresses for right operands out of panels: b[k][n] of 16 k by two tiles of 8 n.
// `by_rows`: the panel's rows are n (k lies along a row). `by_columns`: its rows are k.
struct PanelLanes {
    int row_n, unit_n, row_k, unit_k, lane7;

    __device__ explicit PanelLanes(int lane)
        : row_n((lane & 7) + (lane >> 4 << 3)),
          unit_n(lane >> 3 & 1),
          row_k((lane & 7) + (lane >> 3 & 1) * 8),
          unit_k(lane >> 4),
          lane7(lane & 7) {}

    // n tiles `pair` * 2 and + 1, k step `step`.
    __device__ __forceinline__ u32 by_rows(u32 panel, int pair, int step) const {
        return panel + (pair * 16 + row_n) * 128 + (((step * 2 + unit_n) ^ lane7) << 4);
    }
    __device__ __forceinline__ u32 by_columns(u32 panel, int pair, int step) const {
        return panel + (step * 16 + row_k) * 128 + (((pair * 2 + unit_k) ^ lane7) << 4);
    }
};
