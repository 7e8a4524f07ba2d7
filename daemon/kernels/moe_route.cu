// Which experts each row goes to, and with what weight. All in float32: a rounded score could
// change a choice.
//
// moe_route, for up to 16 rows: norm, scores, choice and the lists that moe_gate_up and moe_down
// work from, in one launch. A block has two experts' rows of the router in registers before it
// waits for the previous kernel; the last block to finish chooses for all rows. Bound: latency.
// For prompts, after moe_scores: moe_choose (a warp a row), and moe_group (a block an expert finds
// the line of each row that chose it).
// The choice: softmax over all experts, the USED largest shares (ties: lower index), divided by
// their sum, which is held above 2^-14. Every sum has one order, whatever the other rows are.
//
// Macros: EXPERTS (at most 1024), USED (at most 32), COLUMNS (a multiple of 256), SHARED (1: a row
// after those of the experts is the shared expert's gate).
#include "half.cuh"
#include "operand.cuh"
#include "quads.cuh"
#include "warp.cuh"

constexpr int PER_LANE = (EXPERTS + 31) / 32;
constexpr float MIN_SUM = 6.103515625e-05f;
constexpr int MAX_ROWS = 16;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int QUADS = (COLUMNS + 4 * THREADS - 1) / (4 * THREADS);  // of a row, a thread
constexpr int SCORES = EXPERTS + SHARED;
constexpr int FAR = 0x7fffffff;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ u32 warp_max(u32 value) { return __reduce_max_sync(~0u, value); }
__device__ __forceinline__ int warp_min(int value) { return __reduce_min_sync(~0u, value); }

// An expert and its weight for each of the first USED lanes.
struct Choice {
    int expert;
    float weight;
};

// A warp chooses for one row. Shares that are no number count as none, so that a broken row cannot
// name an expert that does not exist.
__device__ __forceinline__ Choice choose(const float* scores, int lane) {
    float share[PER_LANE], best = -__int_as_float(0x7f800000), sum = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        share[i] = i * 32 + lane < EXPERTS ? __ldcg(scores + i * 32 + lane) : best;
        best = fmaxf(best, share[i]);
    }
    best = warp_max(best);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        share[i] = i * 32 + lane < EXPERTS ? expf(share[i] - best) : 0.0f;
        sum += share[i];
    }
    sum = warp_sum(sum);
    // Shares are not negative, so their bits are in order. Key 0 is taken, or no expert.
    u32 key[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const float part = share[i] / sum;
        key[i] = i * 32 + lane < EXPERTS ? __float_as_uint(part >= 0 ? part : 0.0f) + 1 : 0;
    }
    Choice own = {0, 0.0f};
    for (int rank = 0; rank < USED; ++rank) {
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) largest = key[i] > largest ? key[i] : largest;
        largest = warp_max(largest);
        int expert = FAR;
#pragma unroll
        for (int i = PER_LANE - 1; i >= 0; --i) expert = key[i] == largest ? i * 32 + lane : expert;
        expert = warp_min(expert);
        if (lane == rank) own = {expert, __uint_as_float(largest - 1)};
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) key[i] = i * 32 + lane == expert ? 0 : key[i];
    }
    own.weight /= fmaxf(warp_sum(own.weight), MIN_SUM);
    return own;
}

// Two experts' scores before scaling, and the row's sum of squares, by warp.
typedef float RowSums[MAX_ROWS][3][WARPS];

__device__ __forceinline__ float total(const float (&by_warp)[WARPS]) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += by_warp[w];
    return sum;
}

__device__ __forceinline__ float norm_scale(const RowSums& sums, int row, float eps) {
    return rsqrtf(total(sums[row][2]) / COLUMNS + eps);
}

__device__ __forceinline__ void sum_row(
    RowSums& sums, const float* x, const float4 (&router)[2][QUADS], int row) {
    float first = 0, second = 0, squares = 0;
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const float4 v = quad_of(x + row * COLUMNS, 4 * (threadIdx.x + q * THREADS), COLUMNS);
        add_product(first, router[0][q], v);
        add_product(second, router[1][q], v);
        add_product(squares, v, v);
    }
    first = warp_sum(first), second = warp_sum(second), squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) {
        const int warp = threadIdx.x / 32;
        sums[row][0][warp] = first, sums[row][1][warp] = second, sums[row][2][warp] = squares;
    }
}

// The normed row as an operand of products: fp16 panels, as quant_activations writes them.
__device__ __forceinline__ void write_panel_row(
    u8* panels, const float* x, const float* norm, int row, float scale) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const int c = 4 * (threadIdx.x + q * THREADS);
        if (c >= COLUMNS) continue;
        const float4 v = product(quad_of(x + row * COLUMNS, c, COLUMNS), quad_of(norm, c, COLUMNS));
        *(uint2*)panel_place(panels, row, c, COLUMNS) = make_uint2(
            half2_of(v.x * scale, v.y * scale), half2_of(v.z * scale, v.w * scale));
    }
}

// What moe_gate_up and moe_down work from. A slot is an expert that any row chose; slot 0 is the
// shared expert.
struct Lists {
    int* experts;  // i32 [1 + slots]: how many, then the expert of slot 1, 2, ...
    u8* ranks;     // u8 [1 + slots, MAX_ROWS]: the slot's rank for each row, or 255
    float* weights;  // f32 [rows, USED + 1], the shared expert's last
};

__device__ void list_experts(const Lists& lists, const int* chosen, int num_pairs) {
    __shared__ int first_pair[EXPERTS], slot_of[EXPERTS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int e = threadIdx.x; e < EXPERTS; e += THREADS) first_pair[e] = FAR;
    for (int i = threadIdx.x; i < (1 + num_pairs) * MAX_ROWS; i += THREADS)
        lists.ranks[i] = i < MAX_ROWS ? USED : 255;
    __syncthreads();
    for (int p = threadIdx.x; p < num_pairs; p += THREADS) atomicMin(first_pair + chosen[p], p);
    __syncthreads();
    if (warp == 0) {
        int count = 0;
        for (int base = 0; base < num_pairs; base += 32) {
            const int p = base + lane;
            const bool is_first = p < num_pairs && first_pair[chosen[p]] == p;
            const u32 all = __ballot_sync(~0u, is_first);
            const int slot = 1 + count + __popc(all & ((1u << lane) - 1));
            if (is_first) lists.experts[slot] = chosen[p], slot_of[chosen[p]] = slot;
            count += __popc(all);
        }
        if (lane == 0) lists.experts[0] = count;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < num_pairs; p += THREADS)
        lists.ranks[slot_of[chosen[p]] * MAX_ROWS + p / USED] = p % USED;
}

// x: f32 [rows, COLUMNS], rows at most 16; router: f32 [SCORES, COLUMNS]; scores: f32 [rows,
// SCORES], scratch; counter: i32, zero. Grid: two experts a block.
extern "C" __global__ void __launch_bounds__(THREADS) moe_route(
    const float* x, const float* norm, const float* router, u8* panels, float* scores,
    int* experts, u8* ranks, float* weights, int* counter, int rows, float eps) {
    __shared__ RowSums sums;
    __shared__ int chosen[MAX_ROWS * USED], is_last;
    const int first = blockIdx.x * 2, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4 own[2][QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const int c = 4 * (threadIdx.x + q * THREADS);
        const int second = first + 1 < SCORES ? first + 1 : first;
        const float4 gain = quad_of(norm, c, COLUMNS);
        own[0][q] = product(quad_of(router + first * COLUMNS, c, COLUMNS), gain);
        own[1][q] = product(quad_of(router + second * COLUMNS, c, COLUMNS), gain);
    }
    wait_for_previous_kernel();
    allow_next_kernel();
#pragma unroll 4
    for (int row = 0; row < rows; ++row) sum_row(sums, x, own, row);
    __syncthreads();
    if (threadIdx.x < 2 * rows) {
        const int row = threadIdx.x / 2, which = threadIdx.x % 2;
        const float score = total(sums[row][which]) * norm_scale(sums, row, eps);
        if (first + which < SCORES) __stcg(scores + row * SCORES + first + which, score);
    }
    for (int row = blockIdx.x; row < rows; row += gridDim.x)
        write_panel_row(panels, x, norm, row, ACTIVATION_SCALE * norm_scale(sums, row, eps));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(counter, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    if (threadIdx.x == 0) *counter = 0;
    __threadfence();
    const Lists lists = {experts, ranks, weights};
    for (int row = warp; row < rows; row += WARPS) {
        const Choice own = choose(scores + row * SCORES, lane);
        float* weight = weights + row * (USED + 1);
        if (lane < USED) chosen[row * USED + lane] = own.expert, weight[lane] = own.weight;
        if (lane == 0)
            weight[USED] = SHARED ? sigmoid(__ldcg(scores + row * SCORES + EXPERTS)) : 0.0f;
    }
    __syncthreads();
    list_experts(lists, chosen, rows * USED);
}

// chosen: i32 [rows, USED], best first; weights: f32 [rows, USED + 1], all but the last written.
extern "C" __global__ void __launch_bounds__(THREADS) moe_choose(
    const float* scores, int* chosen, float* weights, int rows) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    allow_next_kernel();
    wait_for_previous_kernel();
    if (row >= rows) return;
    const Choice own = choose(scores + (long long)row * EXPERTS, lane);
    if (lane < USED) {
        chosen[row * USED + lane] = own.expert;
        weights[row * (USED + 1) + lane] = own.weight;
    }
}

// Lines: all pairs (row, rank) by expert, in order within it; after them the rows themselves, for
// the shared expert. chosen: i32 [rows, USED] = [num_pairs]; first: i32 [EXPERTS + 2], where the
// lines of each expert and of the shared one begin, and the end; places: i32 [num_pairs], a pair's
// line times 8, plus the low bits of its number within the expert. Grid: a block an expert.
extern "C" __global__ void __launch_bounds__(THREADS) moe_group(
    const int* chosen, int* first, int* places, int num_pairs, int rows) {
    __shared__ int lower_of[WARPS], equal_of[WARPS];
    const int expert = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    allow_next_kernel();
    wait_for_previous_kernel();
    const int share = (num_pairs + THREADS - 1) / THREADS * 32;
    const int begin = min(warp * share, num_pairs), end = min(begin + share, num_pairs);
    int lower = 0, equal = 0;
#pragma unroll 4
    for (int i = begin + lane; i < end; i += 32) {
        lower += chosen[i] < expert;
        equal += chosen[i] == expert;
    }
    lower = __reduce_add_sync(~0u, lower), equal = __reduce_add_sync(~0u, equal);
    if (lane == 0) lower_of[warp] = lower, equal_of[warp] = equal;
    __syncthreads();
    int start = 0, number = 0;
    for (int w = 0; w < WARPS; ++w) {
        start += lower_of[w];
        number += w < warp ? equal_of[w] : 0;
    }
    if (threadIdx.x == 0) first[expert] = start;
    if (threadIdx.x == 0 && expert == 0) {
        first[EXPERTS] = num_pairs;
        first[EXPERTS + 1] = num_pairs + SHARED * rows;
    }
#pragma unroll 4
    for (int base = begin; base < end; base += 32) {
        const int i = base + lane;
        const bool mine = i < end && chosen[i] == expert;
        const u32 all = __ballot_sync(~0u, mine);
        const int own = number + __popc(all & ((1u << lane) - 1));
        if (mine) places[i] = (start + own) * 8 + own % 8;
        number += __popc(all);
    }
}
