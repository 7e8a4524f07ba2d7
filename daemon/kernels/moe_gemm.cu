// The experts of a prompt: each expert's matrix times the rows that chose it, and the shared
// expert's times all rows, in one launch.
//
// The products are those of gemm_tiles.cuh; here is which tiles there are. A group is the lines of
// one expert (moe_group), the last group is the shared expert's. The tiles of a group are those of
// COLUMNS lines one after the other, so that its activations are read from cache; how many there
// are is counted from the groups' lengths when a block begins. Bound: tensor cores.
//
// Macros: those of gemm_tiles.cuh; EXPERTS.
#include "gemm_tiles.cuh"

constexpr int GROUPS = EXPERTS + 1;

// The matrices of all routed experts, or the shared expert's.
struct Matrix {
    const u8* tiles;
    int type, tile_bytes;
    int stripes, num_blocks;  // of one expert
};

struct Work {
    Matrix routed, shared;
    const int* first;  // [GROUPS + 1]: where the lines of a group begin; in global memory
    const int* ends;   // [GROUPS]: where its tiles end; in shared memory
    int lines;

    __device__ __forceinline__ const Matrix& matrix(int group) const {
        return group == EXPERTS ? shared : routed;
    }

    __device__ __forceinline__ bool find(int index, Tile& tile) const {
        int group = 0;
        for (int step = 1024; step > 0; step >>= 1)
            if (group + step <= EXPERTS && ends[group + step - 1] <= index) group += step;
        const int begin = group > 0 ? ends[group - 1] : 0;
        const int row_tiles = matrix(group).stripes / TILE_STRIPES;
        const int column = row_tiles > 0 ? (index - begin) / row_tiles : 0;
        tile = {group, index - begin - column * row_tiles, first[group] + column * COLUMNS,
                first[group + 1], lines, matrix(group).num_blocks};
        return index < ends[EXPERTS];
    }

    __device__ __forceinline__ Stripe stripe(const Tile& tile, int number) const {
        const Matrix& m = matrix(tile.group);
        const int index = tile.row_tile * TILE_STRIPES + number;
        const int before = tile.group == EXPERTS ? 0 : tile.group * m.stripes;
        const long long units = (long long)(before + index) * m.num_blocks;
        const int rows = 4 * tile_height(m.type);
        return {m.tiles + units * 4 * m.tile_bytes, m.type, m.tile_bytes, index * rows, rows};
    }
};

// One warp: the running sum of the groups' tiles.
__device__ __forceinline__ void count_tiles(int* ends, const Work& work, int lane) {
    int before = 0;
    for (int base = 0; base < GROUPS; base += 32) {
        const int group = base + lane;
        int count = 0;
        if (group < GROUPS) {
            const int length = work.first[group + 1] - work.first[group];
            count = (length + COLUMNS - 1) / COLUMNS * (work.matrix(group).stripes / TILE_STRIPES);
        }
        for (int step = 1; step < 32; step <<= 1) {
            const int other = __shfl_up_sync(~0u, count, step);
            if (lane >= step) count += other;
        }
        if (group < GROUPS) ends[group] = before + count;
        before += __shfl_sync(~0u, count, 31);
    }
}

// x: fp16 chunks [blocks * 4, lines, 64], swizzled by a line's number in its group; rows, chunks:
// see Output. Stripes of four tiles; routed or shared may have none.
extern "C" __global__ void GEMM_BOUNDS moe_gemm(
    const u8* routed, const u8* shared, const int* first, const u8* x, float* rows, u8* chunks,
    int routed_type, int routed_bytes, int routed_stripes, int routed_blocks, int shared_type,
    int shared_bytes, int shared_stripes, int shared_blocks, int lines, int stride) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ int ends[GROUPS];
    allow_next_kernel();
    wait_for_previous_kernel();
    const Work work = {{routed, routed_type, routed_bytes, routed_stripes, routed_blocks},
                       {shared, shared_type, shared_bytes, shared_stripes, shared_blocks},
                       first, ends, lines};
    if (threadIdx.x < 32) count_tiles(ends, work, threadIdx.x);
    __syncthreads();
    multiply_all(memory, work, x, {rows, chunks, stride, lines});
}
