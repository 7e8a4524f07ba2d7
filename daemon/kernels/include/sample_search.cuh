// The blocks of one row of logits, and searches over their common order of tokens. See sample.cu.
#pragma once
#include "approximations.cuh"
#include "numbers.cuh"
#include "warp.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int BINS = 1024;           // one a thread
constexpr float BINS_PER_UNIT = 32;  // of the first histogram: logits up to 32 below the best
constexpr float WHOLE_MASS = 1099511627776.0f;  // 2^40: the best token's

struct Bin {
    u64 mass;
    u64 count;
};

// A block's own histogram in shared memory, which has fast additions of 32 bits only.
struct LocalBins {
    u32 count[BINS], low[BINS], high[BINS];

    __device__ __forceinline__ void add(u32 bin, u64 mass) {
        atomicAdd(&count[bin], 1u);
        const u32 low_part = u32(mass), before = atomicAdd(&low[bin], low_part);
        const u32 high_part = u32(mass >> 32) + (before + low_part < before);
        if (high_part) atomicAdd(&high[bin], high_part);
    }
};

// In global memory, one a row. Three histograms take turns, so that one can be cleared while
// another is read.
struct Scratch {
    u32 arrivals, num_listed;
    u64 total[3];
    u64 best[BLOCKS];
    u32 ties[BLOCKS];
    float2 partial[BLOCKS];
    float2 listed[MAX_ALTERNATIVES];
    Bin bins[3][BINS];
};

struct Slice {
    float* values;  // shared memory
    int first, count;

    __device__ float* find(int token) const {
        const int i = token - first;
        return i >= 0 && i < count ? values + i : nullptr;
    }
};

struct Found {
    u32 key;
    u64 above, above_mass;  // count and mass of the tokens with larger keys
};

// Larger floats have larger keys.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct RowGroup {
    Scratch* scratch;
    int block;
    u32 meetings = 0;

    __device__ RowGroup(Scratch* scratch, int block) : scratch(scratch), block(block) {}

    // Waits for all blocks of the row; what they wrote before is then visible.
    __device__ void meet() {
        __syncthreads();
        ++meetings;
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(&scratch->arrivals, 1);
            const volatile u32* arrivals = &scratch->arrivals;
            while (*arrivals < meetings * BLOCKS) {
            }
            __threadfence();
        }
        __syncthreads();
    }

    template <class T, class Combine>
    __device__ T reduce(T value, Combine combine) {
        __shared__ T parts[WARPS];
        for (int step = 16; step > 0; step >>= 1) {
            value = combine(value, __shfl_xor_sync(~0u, value, step));
        }
        __syncthreads();
        if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = value;
        __syncthreads();
        value = parts[threadIdx.x & 31];
        for (int step = 16; step > 0; step >>= 1) {
            value = combine(value, __shfl_xor_sync(~0u, value, step));
        }
        return value;
    }

    __device__ float block_max(float value) {
        return reduce(value, [](float a, float b) { return fmaxf(a, b); });
    }

    __device__ float block_sum(float value) {
        return reduce(value, [](float a, float b) { return a + b; });
    }
};

// Sum over this thread and the ones before it in the block.
__device__ __forceinline__ u64 running_sum(u64 value) {
    __shared__ u64 totals[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int step = 1; step < 32; step *= 2) {
        const u64 before = __shfl_up_sync(~0u, value, step);
        if (lane >= step) value += before;
    }
    __syncthreads();
    if (lane == 31) totals[warp] = value;
    __syncthreads();
    u64 earlier = lane < warp ? totals[lane] : 0;
    for (int step = 16; step > 0; step >>= 1) earlier += __shfl_xor_sync(~0u, earlier, step);
    return value + earlier;
}

// All methods are called by all threads of all blocks of the row alike.
struct Search {
    RowGroup& group;
    const Slice& slice;
    LocalBins& local;     // in shared memory
    float best = 0;       // of the row
    float per_unit = 0;   // exponent in base 2 for a logit difference of one
    u32 round = 0;        // of histograms so far
    u32 sums = 0;         // of totals so far
    Bin coarse_mine = {0, 0};  // this thread's bin of the first histogram, which all searches share
    bool has_coarse = false;

    __device__ Search(RowGroup& group, const Slice& slice, LocalBins& local)
        : group(group), slice(slice), local(local) {}

    // Finds the best token, lowest id first, and begins with the slices as they are now.
    __device__ int start(float temperature) {
        u64 mine = 0;
        for (int i = threadIdx.x; i < slice.count; i += THREADS) {
            const u64 key = u64(ordered(slice.values[i])) << 32 | u32(~(slice.first + i));
            mine = key > mine ? key : mine;
        }
        mine = group.reduce(mine, [](u64 a, u64 b) { return a > b ? a : b; });
        group.meet();  // a block may still read `best` of an earlier start
        if (threadIdx.x == 0) group.scratch->best[group.block] = mine;
        group.meet();
        u64 top = 0;
        for (int b = 0; b < BLOCKS; ++b) {
            const u64 key = __ldcg(&group.scratch->best[b]);
            top = key > top ? key : top;
        }
        best = unordered(u32(top >> 32));
        has_coarse = false;
        per_unit = 1.44269504088896f / (temperature > 0 ? temperature : 1.0f);
        return int(~u32(top));
    }

    __device__ __forceinline__ float share(float value) const {
        return exp2_approx((value - best) * per_unit);
    }

    __device__ __forceinline__ u64 mass(float value) const {
        return u64(share(value) * WHOLE_MASS);
    }

    __device__ __forceinline__ u64 mass_of_key(u32 key) const { return mass(unordered(key)); }

    // Mass of all tokens whose share of the best token's is at least `lowest`.
    __device__ u64 mass_from(float lowest) {
        u64 sum = 0;
        for (int i = threadIdx.x; i < slice.count; i += THREADS) {
            if (share(slice.values[i]) >= lowest) sum += mass(slice.values[i]);
        }
        sum = group.reduce(sum, [](u64 a, u64 b) { return a + b; });
        u64* total = &group.scratch->total[sums++];
        if (threadIdx.x == 0) atomicAdd(total, sum);
        group.meet();
        return __ldcg(total);
    }

    __device__ Found by_count(u64 target) { return search<false>(target); }
    __device__ Found by_mass(u64 target) { return search<true>(target); }

    // Calls `take(rank, index)` for this block's tokens with `key` whose rank among all tokens with
    // it, by id, is in [first, end).
    template <class Take>
    __device__ void for_ties(u32 key, u32 first, u32 end, Take take) {
        u32 mine = 0;
        for (int i = threadIdx.x; i < slice.count; i += THREADS) {
            mine += ordered(slice.values[i]) == key;
        }
        const u32 count = group.reduce(mine, [](u32 a, u32 b) { return a + b; });
        group.meet();
        if (threadIdx.x == 0) group.scratch->ties[group.block] = count;
        group.meet();
        u32 rank = 0;
        for (int b = 0; b < group.block; ++b) rank += __ldcg(&group.scratch->ties[b]);
        if (count == 0 || rank >= end || rank + count <= first) return;
        for (int base = 0; base < slice.count; base += THREADS) {
            const int i = base + threadIdx.x;
            const bool tied = i < slice.count && ordered(slice.values[i]) == key;
            const u32 through = u32(running_sum(tied));
            if (tied && rank + through - 1 >= first && rank + through - 1 < end) {
                take(rank + through - 1, i);
            }
            rank += u32(__syncthreads_count(tied));
        }
    }

   private:
    // Which bin of the first histogram; larger logits come first.
    __device__ __forceinline__ u32 coarse_bin(float value) const {
        return u32(fminf((best - value) * BINS_PER_UNIT, float(BINS - 1)));
    }

    // Adds up a histogram over the row. `bin_of(i)` is the bin of slice value i; BINS: none.
    template <class BinOf>
    __device__ Bin histogram(BinOf bin_of) {
        Bin* bins = group.scratch->bins[round % 3];
        Bin* next = group.scratch->bins[(round + 1) % 3];
        ++round;
        local.count[threadIdx.x] = local.low[threadIdx.x] = local.high[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < slice.count; i += THREADS) {
            const u32 bin = bin_of(i);
            if (bin < BINS) local.add(bin, mass(slice.values[i]));
        }
        if (group.block == 0) next[threadIdx.x] = {0, 0};
        __syncthreads();
        if (const u64 count = local.count[threadIdx.x]) {
            const u64 mass = u64(local.high[threadIdx.x]) << 32 | local.low[threadIdx.x];
            atomicAdd(&bins[threadIdx.x].mass, mass);
            atomicAdd(&bins[threadIdx.x].count, count);
        }
        group.meet();
        return {__ldcg(&bins[threadIdx.x].mass), __ldcg(&bins[threadIdx.x].count)};
    }

    // The first bin at which the running count or mass, with what lies above, exceeds the target.
    template <bool BY_MASS>
    __device__ u32 crossing(Bin mine, u64 target, Found& found) {
        __shared__ u32 chosen;
        __shared__ u64 above, above_mass;
        const u64 mass = running_sum(mine.mass) + found.above_mass;
        const u64 count = running_sum(mine.count) + found.above;
        const u64 reached = BY_MASS ? mass : count;
        const u64 before = reached - (BY_MASS ? mine.mass : mine.count);
        __syncthreads();
        if (before <= target && target < reached) {
            chosen = threadIdx.x;
            above = count - mine.count;
            above_mass = mass - mine.mass;
        }
        __syncthreads();
        found.above = above;
        found.above_mass = above_mass;
        return chosen;
    }

    template <bool BY_MASS>
    __device__ Found search(u64 target) {
        Found found = {0, 0, 0};
        if (!has_coarse) {
            coarse_mine = histogram([&](int i) { return coarse_bin(slice.values[i]); });
            has_coarse = true;
        }
        const u32 coarse = crossing<BY_MASS>(coarse_mine, target, found);
        // Keys of the bin lie in here; beyond 2^15 a float's step is no longer small against a bin.
        u32 low = 0, high = ordered(best);
        if (fabsf(best) < 32768.0f) {
            if (coarse > 0) high = ordered(best - (coarse - 1.0f) / BINS_PER_UNIT);
            if (coarse < BINS - 1) low = ordered(best - (coarse + 2.0f) / BINS_PER_UNIT);
        }
        while (low < high) {
            const int bits = 32 - __clz(high - low);
            const int shift = bits > 10 ? bits - 10 : 0;
            const u32 bin = crossing<BY_MASS>(
                histogram([&](int i) {
                    const u32 key = ordered(slice.values[i]);
                    const bool inside = key >= low && key <= high &&
                                        coarse_bin(slice.values[i]) == coarse;
                    return inside ? (high - key) >> shift : u32(BINS);
                }),
                target, found);
            high -= bin << shift;
            const u32 width = (1u << shift) - 1;
            low = high - low > width ? high - width : low;
        }
        found.key = high;
        return found;
    }
};
