// The next token of each row of logits, by the stages of engine/sampler.py in their order:
// penalties, logit_bias, mask, temperature, top-k, top-p, min-p, draw; and log-probabilities.
//
// BLOCKS blocks share a row, each with its slice of the vocabulary in shared memory; they meet at
// barriers in global memory, so the launcher never starts more blocks than the card holds at once.
// Nothing is sorted. Tokens are ordered by (logit, then lower id); every stage keeps a prefix of
// that order, and is a search for the token at which a running count or mass passes a target. A
// search adds up histograms of ever finer ranges of logits. Masses are 2^40ths of the best token's
// share as integers, so that no sum depends on the order of its terms.
//
// Bytes: the logits once; some ten barriers of about 2 us decide the time.
//
// Compile-time: BLOCKS (of a row), SLICE (tokens of a block, at most), MAX_ALTERNATIVES.
#include "sample_search.cuh"

struct Row {
    float temperature;  // 0: the best token, lowest id first
    int top_k;          // 0: all
    float top_p, min_p;
    float repetition, presence, frequency;
    int num_alternatives;  // negative: no log-probabilities
    u64 seed, step;
    int first_penalty, num_penalties, first_bias, num_biases;
    int mask, unused;  // which one; negative: every token is allowed
};

struct Result {
    int token;
    float logprob;
    int ids[MAX_ALTERNATIVES];
    float logprobs[MAX_ALTERNATIVES];
};

// SplitMix64: a number in [0, 1) from seed and step alone.
__device__ __forceinline__ double uniform(u64 seed, u64 step) {
    u64 x = seed + (step + 1) * 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return double((x ^ x >> 31) >> 11) * 0x1p-53;
}

// Logarithm of the sum of exponentials of the slice values of all blocks.
__device__ float log_sum_exp(RowGroup& group, const Slice& slice) {
    float best = NEGATIVE_INFINITY, sum = 0;
    for (int i = threadIdx.x; i < slice.count; i += THREADS) best = fmaxf(best, slice.values[i]);
    best = group.block_max(best);
    for (int i = threadIdx.x; i < slice.count; i += THREADS) sum += expf(slice.values[i] - best);
    sum = group.block_sum(sum);
    if (threadIdx.x == 0) group.scratch->partial[group.block] = {best, sum};
    group.meet();
    float top = NEGATIVE_INFINITY, total = 0;
    for (int b = 0; b < BLOCKS; ++b) top = fmaxf(top, __ldcg(&group.scratch->partial[b].x));
    for (int b = 0; b < BLOCKS; ++b) {
        const float2 part = __ldcg(&group.scratch->partial[b]);
        total += part.y > 0 ? part.y * expf(part.x - top) : 0;
    }
    return top + logf(total);
}

// Repetition over prompt and reply, presence and frequency over the reply alone; then biases, and
// minus infinity for what the mask (a bit a token) leaves out: such a token has no mass.
__device__ void adjust(const Slice& slice, const Row& row, const int2* penalties,
                       const int2* biases, const u32* mask) {
    __syncthreads();
    for (int i = threadIdx.x; i < row.num_penalties; i += THREADS) {
        const int2 seen = penalties[row.first_penalty + i];
        float* value = slice.find(seen.x);
        if (!value) continue;
        float x = *value > 0 ? *value / row.repetition : *value * row.repetition;
        if (seen.y > 0) x -= row.presence;
        *value = x - row.frequency * seen.y;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < row.num_biases; i += THREADS) {
        const int2 bias = biases[row.first_bias + i];
        if (float* value = slice.find(bias.x)) *value += __int_as_float(bias.y);
    }
    __syncthreads();
    if (row.mask < 0) return;
    for (int i = threadIdx.x; i < slice.count; i += THREADS) {
        const u32 token = slice.first + i;
        if (!(__ldg(&mask[token / 32]) >> token % 32 & 1)) slice.values[i] = NEGATIVE_INFINITY;
    }
    __syncthreads();
}

// The best `count` tokens of the raw logits into the result, best first.
__device__ void alternatives(Search& search, RowGroup& group, const Slice& slice, int count,
                             float log_total, Result* result) {
    const Found last = search.by_count(count - 1);
    const u32 needed = count - u32(last.above);
    for (int i = threadIdx.x; i < slice.count; i += THREADS) {
        if (ordered(slice.values[i]) > last.key) {
            const u32 at = atomicAdd(&group.scratch->num_listed, 1);
            group.scratch->listed[at] = {slice.values[i], __int_as_float(slice.first + i)};
        }
    }
    search.for_ties(last.key, 0, needed, [&](u32 rank, int i) {
        group.scratch->listed[u32(last.above) + rank] = {slice.values[i],
                                                         __int_as_float(slice.first + i)};
    });
    group.meet();
    if (group.block != 0 || threadIdx.x >= count) return;
    const float2 mine = __ldcg(&group.scratch->listed[threadIdx.x]);
    int rank = 0;
    for (int i = 0; i < count; ++i) {
        const float2 other = __ldcg(&group.scratch->listed[i]);
        rank += other.x > mine.x || (other.x == mine.x && __float_as_int(other.y) <
                                                              __float_as_int(mine.y));
    }
    result->ids[rank] = __float_as_int(mine.y);
    result->logprobs[rank] = mine.x - log_total;
}

// Mass of the tokens that top-k, top-p and min-p leave.
__device__ u64 kept_mass(Search& search, const Row& row, int num_tokens) {
    u64 total;
    if (row.top_k > 0 && row.top_k < num_tokens) {
        const Found last = search.by_count(row.top_k - 1);
        total = last.above_mass + (row.top_k - last.above) * search.mass_of_key(last.key);
    } else {
        total = search.mass_from(0);
    }
    u64 kept = total;
    if (row.top_p < 1) {
        // The first token at which the mass reaches top_p of the total is the last to stay.
        const double share = double(row.top_p) * double(total);
        const u64 target = share > 1 ? u64(ceil(share)) - 1 : 0;
        const Found last = search.by_mass(target);
        const u64 each = search.mass_of_key(last.key);
        kept = last.above_mass + ((target - last.above_mass) / each + 1) * each;
    }
    if (row.min_p > 0) {
        const u64 enough = search.mass_from(row.min_p);
        kept = enough < kept ? enough : kept;
    }
    return kept;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(
    const float* logits,             // f32 [rows, row_stride]
    const Row* __restrict__ rows,    // [rows]
    const int2* __restrict__ penalties,  // (token, occurrences in the reply), of all rows
    const int2* __restrict__ biases,     // (token, bits of the f32 to add), of all rows
    const u32* __restrict__ masks,       // [masks, mask_stride]
    Scratch* scratch,                // [rows], all zero
    Result* results,                 // [rows]
    int first_row, int row_stride, int mask_stride,
    int num_tokens)                  // ids from here on are padding
{
    extern __shared__ __align__(16) u8 shared[];  // LocalBins, f32 [SLICE]
    const int index = first_row + blockIdx.y, block = blockIdx.x;
    RowGroup group(&scratch[index], block);
    const Row row = rows[index];
    Result* result = &results[index];
    wait_for_previous_kernel();
    const int first = block * SLICE;
    const Slice slice = {reinterpret_cast<float*>(shared + sizeof(LocalBins)), first,
                         max(0, min(SLICE, num_tokens - first))};
    const float* source = logits + size_t(index) * row_stride;
    for (int i = threadIdx.x; i < slice.count; i += THREADS) slice.values[i] = source[first + i];
    __syncthreads();

    Search search(group, slice, *reinterpret_cast<LocalBins*>(shared));
    float log_total = 0;
    if (row.num_alternatives >= 0) {
        log_total = log_sum_exp(group, slice);
        if (row.num_alternatives > 0) {
            search.start(1.0f);
            const int count = min(row.num_alternatives, num_tokens);
            alternatives(search, group, slice, count, log_total, result);
        }
    }
    adjust(slice, row, penalties, biases, masks + size_t(max(row.mask, 0)) * mask_stride);
    const int best = search.start(row.temperature);
    int token = best;
    if (row.temperature > 0) {
        const u64 kept = kept_mass(search, row, num_tokens);
        u64 target = u64(uniform(row.seed, row.step) * double(kept));
        target = target < kept ? target : kept - 1;
        const Found found = search.by_mass(target);
        const u32 rank = u32((target - found.above_mass) / search.mass_of_key(found.key));
        token = -1;
        search.for_ties(found.key, rank, rank + 1, [&](u32, int i) { token = slice.first + i; });
    } else if (block != 0 || threadIdx.x != 0) {
        token = -1;
    }
    if (token >= 0) {
        result->token = token;
        result->logprob = source[token] - log_total;
    }
}
