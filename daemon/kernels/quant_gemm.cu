// Many rows times quantized matrices, for prompts: y[token, row] = W[row, :] . x[token, :].
//
// The products are those of gemm_tiles.cuh; here is which tiles there are: all stripes of a matrix
// times all tokens. Bound: tensor cores; weights are read once per COLUMNS tokens, from cache but
// for the first time. Macros: see gemm_tiles.cuh.
#include "gemm_tiles.cuh"

struct Work {
    const Stripe* stripes;
    int num_blocks, row_tiles, num_tokens, padded_tokens;

    __device__ __forceinline__ bool find(int index, Tile& tile) const {
        const int column_tiles = (num_tokens + COLUMNS - 1) / COLUMNS;
        tile = {0, index / column_tiles, index % column_tiles * COLUMNS, num_tokens, padded_tokens,
                num_blocks};
        return index < row_tiles * column_tiles;
    }

    __device__ __forceinline__ Stripe stripe(const Tile& tile, int number) const {
        return stripes[tile.row_tile * TILE_STRIPES + number];
    }
};

// stripes: Stripe [row_tiles * TILE_STRIPES]; x: fp16 chunks [num_blocks * 4, padded_tokens, 64],
// swizzled; rows, chunks: see Output. On sm_90a a block takes several tiles, elsewhere one.
extern "C" __global__ void GEMM_BOUNDS quant_gemm(
    const Stripe* stripes, const u8* x, float* rows, u8* chunks, int num_blocks, int row_tiles,
    int num_tokens, int padded_tokens, int stride) {
    extern __shared__ __align__(128) u8 memory[];
    allow_next_kernel();
    wait_for_previous_kernel();
    const Work work = {stripes, num_blocks, row_tiles, num_tokens, padded_tokens};
    multiply_all(memory, work, x, {rows, chunks, stride, padded_tokens});
}
