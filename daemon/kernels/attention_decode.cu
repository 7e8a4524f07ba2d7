// One new token a sequence attends to its pages: split over keys, output gate applied.
//
// A block takes one KV head of one sequence and a contiguous share of its keys; a warp takes strips
// of 16 tokens through a private ring of asynchronous copies, so that warps never wait for each
// other. Keys are the 16-row operand of the tensor core and the query heads of the group its eight
// columns: S = K Qᵀ, O = Vᵀ P. Warps are merged in a fixed order at the end of the block, blocks by
// the second kernel, which gates and writes.
//
// How a sequence is split depends on its own length alone: its bits do not know the batch.
// Bytes: all K and V pages of the sequences once; bound by memory.
//
// Compile-time: K_FORMAT, V_FORMAT (KvFormat), GROUP (query heads of a KV head, 1 … 16), WARPS,
// STAGES (ring depth, in half strips), PROJECTION_F16, OUTPUT (0: f32, 1: operand).
#include "attention_output.cuh"
#include "attention_strip.cuh"
#include "quads.cuh"

// Shared memory: the larger of the ring, WARPS x STAGES slots, and the warps' outputs,
// f32 [WARPS, GROUP, OUTPUT_STRIDE].
constexpr int SLOT_BYTES = strip_bytes(K_FORMAT) > strip_bytes(V_FORMAT) ? strip_bytes(K_FORMAT)
                                                                        : strip_bytes(V_FORMAT);
constexpr int MIN_STRIPS = 2 * WARPS;  // a block with fewer strips costs more than it saves
constexpr int THREADS = WARPS * 32;
constexpr int MERGE_BATCH = 17;  // loads under way at once in the second kernel
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

// Merges the warps' outputs [WARPS, GROUP, OUTPUT_STRIDE] to one block's partial result, in order.
__device__ __forceinline__ void merge_warps(const float* outputs, const float* maxima,
                                            const float* sums, float* partial) {
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const int head = i / HEAD_DIM;
        const float* mine = outputs + head * OUTPUT_STRIDE + i % HEAD_DIM;
        float maximum = NEGATIVE_INFINITY, sum = 0, value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) maximum = fmaxf(maximum, maxima[w * GROUP + head]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = exp2_approx(maxima[w * GROUP + head] - maximum);
            sum += sums[w * GROUP + head] * factor;
            value += mine[w * GROUP * OUTPUT_STRIDE] * factor;
        }
        partial[i] = value;
        if (i % HEAD_DIM == 0) {
            partial[GROUP * HEAD_DIM + head] = maximum;
            partial[GROUP * (HEAD_DIM + 1) + head] = sum;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_decode(
    const u16* queries,                  // bf16 or f16 [sequences, q_heads, 256], as kv_append
    const int* __restrict__ positions,   // i32 [sequences]: of the new token; negative: padding
    const int* __restrict__ page_table,  // i32 [sequences, table_stride]
    const u8* pool,                      // u8 [pages, page_bytes]
    float* partials,                     // f32 [sequences, kv_heads, max_splits, PARTIAL_FLOATS]
    int table_stride, int max_splits, long long page_bytes,
    long long layer_offset)              // bytes from a page's start to this layer's K plane
{
    extern __shared__ __align__(128) u8 shared[];
    __shared__ float maxima[WARPS * GROUP], sums[WARPS * GROUP];
    const int split = blockIdx.x, kv_head = blockIdx.y, kv_heads = gridDim.y;
    const int sequence = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    allow_next_kernel();
    // Positions and tables were written before this step's graph began: no need to wait for them.
    const int length = positions[sequence] + 1;
    if (length <= 0) return;
    const Share share = share_of(length, split, max_splits);
    if (split >= share.num_splits) return;
    const size_t line = size_t(sequence) * kv_heads + kv_head;
    const u8* k_planes = pool + layer_offset;
    const u8* v_planes = k_planes + size_t(kv_heads) * kv_block_bytes(K_FORMAT);
    StripRing<K_FORMAT, V_FORMAT, STAGES, WARPS> ring(
        shared + warp * STAGES * SLOT_BYTES, SLOT_BYTES,
        k_planes + size_t(kv_head) * kv_block_bytes(K_FORMAT),
        v_planes + size_t(kv_head) * kv_block_bytes(V_FORMAT),
        page_table + size_t(sequence) * table_stride, page_bytes, share.first_strip + warp,
        share.end_strip, lane);
    // The append kernel, which may still run, writes to the last strip of the sequence.
    const bool has_new_token = split == share.num_splits - 1;
    if (has_new_token) wait_for_previous_kernel();
    ring.fill();
    if (!has_new_token) wait_for_previous_kernel();

    StripAttention<K_FORMAT, V_FORMAT, GROUP> attention;
    attention.load_queries(queries + line * GROUP * HEAD_DIM, lane);
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
    attention.store(outputs + warp * GROUP * OUTPUT_STRIDE, maxima + warp * GROUP,
                    sums + warp * GROUP, lane);
    __syncthreads();
    merge_warps(outputs, maxima, sums, partials + (line * max_splits + split) * PARTIAL_FLOATS);
}

// Merges a head's splits: a thread takes four places, and all its loads are under way together.
extern "C" __global__ void __launch_bounds__(HEAD_DIM / 4) attention_decode_merge(
    const float* partials,                 // f32 [sequences, kv_heads, max_splits, PARTIAL_FLOATS]
    const void* projections,               // f32 or f16 [sequences, row_stride]: the gates
    const int* __restrict__ positions,     // i32 [sequences]
    void* __restrict__ output,             // [sequences, q_heads, 256], or panels
    int row_stride,                        // in elements
    int max_splits)
{
    const int head = blockIdx.x, q_heads = gridDim.x, sequence = blockIdx.y;
    __shared__ float merged[HEAD_DIM];
    const int place = threadIdx.x * 4;
    allow_next_kernel();
    const int length = positions[sequence] + 1;
    const int splits = length > 0 ? share_of(length, 0, max_splits).num_splits : 0;
    const size_t line = size_t(sequence) * (q_heads / GROUP) + head / GROUP;
    const float* all = partials + line * max_splits * PARTIAL_FLOATS;
    const float* maxima = all + GROUP * HEAD_DIM + head % GROUP;
    const float* outputs = all + head % GROUP * HEAD_DIM + place;
    wait_for_previous_kernel();
    float4 value = {0, 0, 0, 0};
    float maximum = NEGATIVE_INFINITY, sum = 0;
    for (int first = 0; first < splits; first += MERGE_BATCH) {
        float4 loaded[MERGE_BATCH];
        float best[MERGE_BATCH], weight[MERGE_BATCH];
#pragma unroll
        for (int i = 0; i < MERGE_BATCH; ++i) {
            const size_t at = size_t(min(first + i, splits - 1)) * PARTIAL_FLOATS;
            loaded[i] = load_now(outputs + at);
            best[i] = first + i < splits ? maxima[at] : NEGATIVE_INFINITY;
            weight[i] = maxima[at + GROUP];
        }
        float higher = maximum;
#pragma unroll
        for (int i = 0; i < MERGE_BATCH; ++i) higher = fmaxf(higher, best[i]);
        const float factor = exp2_approx(maximum - higher);
        maximum = higher;
        value = {value.x * factor, value.y * factor, value.z * factor, value.w * factor};
        sum *= factor;
#pragma unroll
        for (int i = 0; i < MERGE_BATCH; ++i) {
            const float share = exp2_approx(best[i] - maximum);
            value.x += loaded[i].x * share, value.y += loaded[i].y * share;
            value.z += loaded[i].z * share, value.w += loaded[i].w * share;
            sum += weight[i] * share;
        }
    }
    const float inverse = splits > 0 ? 1.0f / sum : 0;
    const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) merged[dim_of_place<V_FORMAT>(place + i)] = values[i] * inverse;
    __syncthreads();
    const GatedRow<true> target(projections, output, sequence, row_stride, head, q_heads, 0);
    for (int dim = threadIdx.x * 2; dim < HEAD_DIM; dim += HEAD_DIM / 2) {
        target.write(dim, merged[dim], merged[dim + 1]);
    }
}
