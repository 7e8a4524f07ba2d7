// Down of every chosen expert and of the shared one, weighted, summed and added to the residual.
//
// An item is 16 rows of the output; a block makes it. Its jobs are the tiles of these rows: each
// block of k of each expert that any row chose. A warp takes every WARPS-th job and leaves the sums
// of the rows that chose the expert in shared memory; then each row's experts are added in the
// order of their rank, the shared one last. Neither depends on the other rows, so neither do a
// row's bits. Bound: bytes of the chosen experts.
//
// Macros besides those of moe_tiles.cuh: WARPS, USED, BLOCKS (of k, the most of either matrix).
#include "moe_tiles.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int RANKS = USED + 1;

// `part`: which of the tiles that make an item's 16 rows.
struct Job {
    int slot, block, part;
};

// Tiles of an expert that an item takes: two where they have 8 rows.
__device__ __forceinline__ int parts_of(const Matrix& m) { return 16 / tile_height(m.type); }

struct Work {
    Matrix routed, shared;
    const int* experts;  // in shared memory: how many, then each
    int num_items, num_jobs;  // jobs of an item

    __device__ __forceinline__ Job job(int index) const {
        const int first = shared.num_blocks * parts_of(shared);
        if (index < first) return {0, index / parts_of(shared), index % parts_of(shared)};
        const int parts = parts_of(routed), rest = (index - first) / parts;
        return {1 + rest / routed.num_blocks, rest % routed.num_blocks, (index - first) % parts};
    }

    __device__ __forceinline__ const Matrix& matrix(const Job& job) const {
        return job.slot == 0 ? shared : routed;
    }

    __device__ __forceinline__ const u8* tile(int item, const Job& job) const {
        const int row = item * parts_of(matrix(job)) + job.part;
        if (job.slot == 0) return shared.tile(0, row, job.block);
        return routed.tile(experts[job.slot], row, job.block);
    }
};

// The tile that a warp will ask for next.
struct Ahead {
    int item, index;
};

__device__ __forceinline__ void issue_next(
    Ring& ring, int slot, Ahead& ahead, const Work& work, int warp, int lane) {
    if (ahead.index >= work.num_jobs) {
        ahead.item += gridDim.x;
        ahead.index = warp;
    }
    if (ahead.item >= work.num_items || ahead.index >= work.num_jobs) return issue_nothing();
    const Job job = work.job(ahead.index);
    issue_copy(ring, slot, work.tile(ahead.item, job), work.matrix(job).tile_bytes, lane);
    ahead.index += WARPS;
}

// [row][rank][block of k][16 rows of the item]
typedef float Parts[TOKENS][RANKS][BLOCKS][16];

__device__ __forceinline__ void leave_sums(
    Parts& parts, const Sums& sum, const Job& job, int height, const u8* ranks, int lane) {
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            if (c / 2 * 8 >= height) continue;
            const int token = 8 * n + lane % 4 * 2 + c % 2;
            const int row = job.part * height + lane / 4 + c / 2 * 8;
            const int rank = ranks[job.slot * MAX_ROWS + token];
            if (rank < RANKS) parts[token][rank][job.block][row] = sum[n][0][c] + sum[n][1][c];
        }
}

__device__ __forceinline__ float total(const float (&blocks)[BLOCKS][16], int count, int row) {
    float all = 0.0f;
    for (int b = 0; b < count; b++) all += blocks[b][row];
    return all;
}

__device__ __forceinline__ void finish(
    const Parts& parts, const Work& work, const float* weights, float* residual, int item,
    int num_rows) {
    for (int i = threadIdx.x; i < num_rows * 16; i += THREADS) {
        const int token = i / 16, row = i % 16;
        float* at = residual + token * work.num_items * 16 + item * 16 + row;
        const float before = *at, *weight = weights + token * RANKS;
        float sum = 0.0f;
#pragma unroll
        for (int rank = 0; rank < USED; rank++)
            sum = __fmaf_rn(
                weight[rank], total(parts[token][rank], work.routed.num_blocks, row), sum);
        if (work.shared.num_blocks > 0)
            sum = __fmaf_rn(
                weight[USED], total(parts[token][USED], work.shared.num_blocks, row), sum);
        *at = __fmaf_rn(sum, 1.0f / ACTIVATION_SCALE, before);
    }
}

// routed, shared: tiles of all experts, of the shared one (no blocks: there is none). list, ranks,
// weights: moe_route's, which ended before the previous kernel let this one begin. hidden:
// moe_gate_up's.
// residual: f32 [num_rows, 16 * num_items].
extern "C" __global__ void __launch_bounds__(THREADS, 1) moe_down(
    const u8* routed, const u8* shared, const int* list, const u8* ranks, const float* weights,
    const u8* hidden, float* residual, int routed_type, int routed_bytes, int routed_blocks,
    int shared_type, int shared_bytes, int shared_blocks, int num_items, int hidden_blocks,
    int max_slots, int num_rows) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 full[WARPS * SLOTS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Parts& parts = *(Parts*)(memory + WARPS * SLOTS * SLOT_BYTES);
    u8* own_ranks = memory + WARPS * SLOTS * SLOT_BYTES + sizeof(Parts);
    int* experts = (int*)(own_ranks + max_slots * MAX_ROWS);
    for (int i = threadIdx.x; i < max_slots; i += THREADS) {
        experts[i] = __ldcg(list + i);
        ((uint4*)own_ranks)[i] = __ldcg((const uint4*)ranks + i);
    }
    Ring ring = {memory + warp * SLOTS * SLOT_BYTES, full + warp * SLOTS, 0, 0};
    start_ring(ring, lane);
    __syncthreads();
    Work work = {{routed, routed_type, routed_bytes, 0, routed_blocks},
                 {shared, shared_type, shared_bytes, 0, shared_blocks},
                 experts, num_items, 0};
    const int routed_parts = parts_of(work.routed), shared_parts = parts_of(work.shared);
    work.routed.tile_rows = num_items * routed_parts;
    work.shared.tile_rows = num_items * shared_parts;
    work.num_jobs = shared_blocks * shared_parts + experts[0] * routed_blocks * routed_parts;
    Ahead ahead = {int(blockIdx.x), warp};
    for (int s = 0; s < SLOTS; s++) issue_next(ring, s, ahead, work, warp, lane);
    wait_for_previous_kernel();
    allow_next_kernel();
    const int panel_bytes = hidden_blocks * 4096;
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
        for (int index = warp; index < work.num_jobs; index += WARPS) {
            const Job job = work.job(index);
            const u8* slot = hidden + (long long)job.slot * NUM_PANELS * panel_bytes;
            const Input in = {slot + job.block * 4096, panel_bytes, num_rows};
            Sums sum = {};
            Rows x;
            load_rows(x, in, 0, lane);
            wait_for_slot(ring);
            multiply(work.matrix(job).type, sum, ring.tile(), x, in, lane);
            __syncwarp();
            issue_next(ring, ring.slot, ahead, work, warp, lane);
            ring.advance();
            const int height = tile_height(work.matrix(job).type);
            leave_sums(parts, sum, job, height, own_ranks, lane);
        }
        __syncthreads();
        finish(parts, work, weights, residual, item, num_rows);
        if (item + gridDim.x < num_items) __syncthreads();
    }
}
