// One new token a sequence attends to its pages: split over keys, output gate applied.
//
// A block takes one KV head of one sequence and a contiguous share of its keys; a warp takes strips
// of 16 tokens through a private ring of asynchronous copies, so that warps never wait for each
// other. Keys are the 16-row operand of the tensor core and the query heads of the group its eight
// columns: S = K Qᵀ, O = Vᵀ P. Warps, then blocks, are merged in a fixed order; the last block of a
// (sequence, KV head) merges, gates and writes.
//
// How a sequence is split depends on its own length alone: its bits do not know the batch.
// Bytes: all K and V pages of the sequences once; bound by memory.
//
// Compile-time: K_FORMAT, V_FORMAT (KvFormat), GROUP (query heads of a KV head, 1 … 16), WARPS,
// STAGES (ring depth, in half strips), PROJECTION_BF16, OUTPUT_BF16 (0: f32, 1: bf16).
#include "attention_strip.cuh"

// Shared memory: the larger of the ring, WARPS x STAGES slots, and f32 [WARPS, GROUP, 256].
constexpr int SLOT_BYTES = strip_bytes(K_FORMAT) > strip_bytes(V_FORMAT) ? strip_bytes(K_FORMAT)
                                                                        : strip_bytes(V_FORMAT);
constexpr int MIN_STRIPS = 2 * WARPS;  // a block with fewer strips costs more than it saves
constexpr int THREADS = WARPS * 32;
constexpr int PARTIAL_FLOATS = GROUP * (HEAD_DIM + 2);  // per block: outputs, maxima, sums

struct Share {
    int first_strip, end_strip, num_splits;
};

// Strips [first, end) of split `index`; equal shares to within one strip.
__device__ __forceinline__ Share share_of(int length, int index, int max_splits) {
    int strips = (length + STRIP - 1) / STRIP;
    int splits = min(max_splits, (strips + MIN_STRIPS - 1) / MIN_STRIPS);
    return {int(1LL * strips * index / splits), int(1LL * strips * (index + 1) / splits), splits};
}

__device__ __forceinline__ float gate_of(const void* projections, size_t index) {
#if PROJECTION_BF16
    return sigmoid(bf16_to_float(static_cast<const u16*>(projections)[index]));
#else
    return sigmoid(static_cast<const float*>(projections)[index]);
#endif
}

__device__ __forceinline__ void write_output(void* output, size_t index, float value) {
#if OUTPUT_BF16
    static_cast<u16*>(output)[index] = u16(pack_bf16(value, 0));
#else
    static_cast<float*>(output)[index] = value;
#endif
}

// What a block works for. Pages of its plane lie page_bytes apart.
struct Place {
    int sequence, kv_head, kv_heads;

    __device__ size_t line() const { return size_t(sequence) * kv_heads + kv_head; }

    // Element i of [GROUP, 256] of this KV head, in the output.
    __device__ size_t output(int i) const { return line() * GROUP * HEAD_DIM + i; }

    // The same in the projections, where a head is 256 queries and 256 gates.
    __device__ size_t gate(int i, int row_stride) const {
        const int head = kv_head * GROUP + i / HEAD_DIM;
        return size_t(sequence) * row_stride + size_t(head) * 2 * HEAD_DIM + HEAD_DIM +
               i % HEAD_DIM;
    }
};

// Merges the warps' outputs [WARPS, GROUP, 256] to one block's partial result, in order.
__device__ __forceinline__ void merge_warps(const float* outputs, const float* maxima,
                                            const float* sums, float* partial) {
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const int head = i / HEAD_DIM;
        float maximum = NEGATIVE_INFINITY, sum = 0, value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) maximum = fmaxf(maximum, maxima[w * GROUP + head]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = exp2_approx(maxima[w * GROUP + head] - maximum);
            sum += sums[w * GROUP + head] * factor;
            value += outputs[w * GROUP * HEAD_DIM + i] * factor;
        }
        partial[i] = value;
        if (i % HEAD_DIM == 0) {
            partial[GROUP * HEAD_DIM + head] = maximum;
            partial[GROUP * (HEAD_DIM + 1) + head] = sum;
        }
    }
}

// weights [splits, GROUP]: what each split's outputs count for, over the sum of all.
__device__ __forceinline__ void split_weights(const float* partials, int splits, float* weights) {
    const int lane = threadIdx.x & 31;
    for (int head = threadIdx.x >> 5; head < GROUP; head += WARPS) {
        const float* maxima = partials + GROUP * HEAD_DIM + head;
        float maximum = NEGATIVE_INFINITY, sum = 0;
        for (int s = lane; s < splits; s += 32) {
            maximum = fmaxf(maximum, __ldcg(maxima + size_t(s) * PARTIAL_FLOATS));
        }
        for (int step = 16; step > 0; step >>= 1) {
            maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
        }
        for (int s = lane; s < splits; s += 32) {
            const float* line = maxima + size_t(s) * PARTIAL_FLOATS;
            const float factor = exp2_approx(__ldcg(line) - maximum);
            weights[s * GROUP + head] = factor;
            sum += __ldcg(line + GROUP) * factor;
        }
        for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
        for (int s = lane; s < splits; s += 32) weights[s * GROUP + head] /= sum;
    }
}

// True in the block that arrives last of `splits`; then all partial results can be read.
__device__ __forceinline__ bool arrives_last(u32* arrivals, int splits) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrivals, 1) == u32(splits) - 1;
        if (last) *arrivals = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_decode(
    const u16* __restrict__ queries,       // bf16 or f16 [sequences, q_heads, 256], as kv_append
    const void* __restrict__ projections,  // f32 or bf16 [sequences, row_stride]
    const int* __restrict__ positions,     // i32 [sequences]: of the new token; negative: padding
    const int* __restrict__ page_table,    // i32 [sequences, table_stride]
    const u8* __restrict__ pool,           // u8 [pages, page_bytes]
    float* partials,                       // f32 [sequences, kv_heads, max_splits, PARTIAL_FLOATS]
    u32* arrivals,                         // u32 [sequences, kv_heads], zero before and after
    void* __restrict__ output,             // f32 or bf16 [sequences, q_heads, 256]
    int row_stride,                        // in elements
    int table_stride, int max_splits, long long page_bytes,
    long long layer_offset)                // bytes from a page's start to this layer's K plane
{
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float maxima[WARPS * GROUP], sums[WARPS * GROUP];
    const Place place = {int(blockIdx.z), int(blockIdx.y), int(gridDim.y)};
    const int split = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    // Positions and tables were written before this step's graph began: no need to wait for them.
    const int length = positions[place.sequence] + 1;
    const Share share = share_of(max(length, 1), split, max_splits);
    if (split >= share.num_splits) return;
    if (length <= 0) {
        for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
            write_output(output, place.output(i), 0);
        }
        return;
    }
    const u8* k_planes = pool + layer_offset;
    const u8* v_planes = k_planes + size_t(place.kv_heads) * kv_block_bytes(K_FORMAT);
    StripRing<K_FORMAT, V_FORMAT, STAGES, WARPS> ring(
        shared + warp * STAGES * SLOT_BYTES, SLOT_BYTES,
        k_planes + size_t(place.kv_head) * kv_block_bytes(K_FORMAT),
        v_planes + size_t(place.kv_head) * kv_block_bytes(V_FORMAT),
        page_table + size_t(place.sequence) * table_stride, page_bytes, share.first_strip + warp,
        share.end_strip, lane);
    // The append kernel, which may still run, writes to the last strip of the sequence.
    const bool has_new_token = split == share.num_splits - 1;
    if (has_new_token) wait_for_previous_kernel();
    ring.fill();
    if (!has_new_token) wait_for_previous_kernel();
    allow_next_kernel();

    StripAttention<K_FORMAT, V_FORMAT, GROUP> attention;
    attention.load_queries(queries + place.output(0), lane);
    for (int strip = share.first_strip + warp; strip < share.end_strip; strip += WARPS) {
        const int valid = length - strip * STRIP;
        attention.scores(ring.wait(), valid, lane);
        ring.advance();
        u8* values = ring.wait();
        if (valid < STRIP) attention.clear_values(values, valid, lane);
        attention.mix(values, lane);
        ring.advance();
    }
    copy_async_wait<0>();
    __syncthreads();

    float* outputs = reinterpret_cast<float*>(shared);
    const int warp_floats = GROUP * HEAD_DIM;
    attention.store(outputs + warp * warp_floats, maxima + warp * GROUP, sums + warp * GROUP, lane);
    __syncthreads();
    float* all = partials + place.line() * max_splits * PARTIAL_FLOATS;
    merge_warps(outputs, maxima, sums, all + size_t(split) * PARTIAL_FLOATS);
    if (!arrives_last(arrivals + place.line(), share.num_splits)) return;

    float* weights = outputs;
    split_weights(all, share.num_splits, weights);
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const float gate = gate_of(projections, place.gate(i, row_stride));
        float value = 0;
#pragma unroll 8
        for (int s = 0; s < share.num_splits; ++s) {
            value += __ldcg(all + size_t(s) * PARTIAL_FLOATS + i) * weights[s * GROUP + i / HEAD_DIM];
        }
        write_output(output, place.output(i), value * gate);
    }
}
