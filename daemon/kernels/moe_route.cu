// Which experts each row goes to, with what weight; and the rows of each expert, for prefill.
//
// moe_route: one warp a row. Softmax over all experts, the `USED` largest shares (ties: lower
// index), divided by their sum, which is held above 2^-14. moe_group: one warp an expert lists the
// (row, rank) pairs that chose it, in order, after those of all lower experts; it counts them
// itself, so that no block waits for another. Bytes: router logits once; latency-bound in decode.
//
// Compile-time: EXPERTS (a multiple of 32, at most 1024), USED (at most 32).
#include "attention_numeric.cuh"

constexpr int PER_LANE = EXPERTS / 32;
constexpr int WARPS = 4;
constexpr float MIN_SUM = 6.103515625e-05f;

extern "C" __global__ void __launch_bounds__(WARPS * 32) moe_route(
    const float* scores,  // f32 [rows, row_stride]: router logits, EXPERTS of each row
    int* chosen,          // i32 [rows, USED], largest share first
    float* weights,       // f32 [rows, USED]
    int rows, int row_stride)
{
    const int row = blockIdx.x * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    wait_for_previous_kernel();
    allow_next_kernel();
    if (row >= rows) return;
    float share[PER_LANE], best = NEGATIVE_INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        share[i] = scores[size_t(row) * row_stride + i * 32 + lane];
        best = fmaxf(best, share[i]);
    }
    best = warp_max(best);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) sum += share[i] = expf(share[i] - best);
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) share[i] /= sum;

    int my_expert = 0;
    float my_share = 0;
    for (int rank = 0; rank < USED; ++rank) {
        // Shares are not negative, so their bits are in order; the complement prefers low indices.
        u64 largest = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const u64 key = u64(__float_as_uint(share[i])) << 32 | u32(~(i * 32 + lane));
            largest = share[i] >= 0 && key > largest ? key : largest;
        }
        for (int step = 16; step > 0; step >>= 1) {
            const u64 other = __shfl_xor_sync(~0u, largest, step);
            largest = other > largest ? other : largest;
        }
        const int expert = int(~u32(largest));
        if (lane == rank) {
            my_expert = expert;
            my_share = __uint_as_float(u32(largest >> 32));
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            if (i * 32 + lane == expert) share[i] = -1;
        }
    }
    const float total = fmaxf(warp_sum(my_share), MIN_SUM);
    if (lane < USED) {
        chosen[row * USED + lane] = my_expert;
        weights[row * USED + lane] = my_share / total;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) moe_group(
    const int* chosen,  // i32 [pairs] = [rows, USED]
    int* first,         // i32 [EXPERTS + 1]: where an expert's pairs begin in `pairs`
    int* pairs,         // i32 [pairs]: row * USED + rank, by expert, then in order
    int num_pairs)
{
    const int expert = blockIdx.x * WARPS + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    wait_for_previous_kernel();
    allow_next_kernel();
    int lower = 0;
    for (int i = lane; i < num_pairs; i += 32) lower += chosen[i] < expert;
    for (int step = 16; step > 0; step >>= 1) lower += __shfl_xor_sync(~0u, lower, step);
    if (lane == 0) first[expert] = lower;
    if (lane == 0 && expert == EXPERTS - 1) first[EXPERTS] = num_pairs;
    for (int base = 0; base < num_pairs; base += 32) {
        const int i = base + lane;
        const bool mine = i < num_pairs && chosen[i] == expert;
        const u32 all = __ballot_sync(~0u, mine);
        if (mine) pairs[lower + __popc(all & ((1u << lane) - 1))] = i;
        lower += __popc(all);
    }
}
