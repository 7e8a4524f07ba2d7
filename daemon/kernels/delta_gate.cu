// Prefill of a gated delta net layer, last part: RMS norm of each head's output, times SiLU(z).
//
// Takes outputs from the workspace of delta_scan. Bytes: 768 a head and token in fp16; bound by
// them. Block: one value head of one chunk, 4 warps of 16 tokens; a warp takes a token's head.
#include "delta_tiles.cuh"
#include "operand.cuh"

constexpr int WARPS = 4;
constexpr int ROWS = CHUNK / WARPS;

// Grid (v_heads, chunks).
extern "C" __global__ void __launch_bounds__(WARPS * 32) delta_gate(
    const Projection* z,       // [rows, z_stride]: v heads
    const float* norm,         // [HEAD_DIM]
    const ChunkEntry* chunks,  // [chunks]
    u8* workspace,             // see Workspace
    void* out,                 // [rows, v_heads * 128], or chunks of padded_rows
    int padded_rows, int z_stride, int k_heads, int v_heads, float norm_eps) {
    const int head = blockIdx.x, chunk = blockIdx.y;
    const int first = (threadIdx.x >> 5) * ROWS, lane = threadIdx.x & 31;
    const ChunkEntry entry = chunks[chunk];
    const int count = min(ROWS, entry.num_rows - first);
    const Workspace work{workspace, k_heads, v_heads};
    const u8* tile = work.values(chunk, head) + (lane >> 4) * PANEL_BYTES + (lane & 1) * 8;
    const float4 weight = reinterpret_cast<const float4*>(norm)[lane];
    const long long row = static_cast<long long>(entry.first_row) + first;
    z += row * z_stride + head * HEAD_DIM + lane * 4;
    const int column = head * HEAD_DIM + lane * 4;
    wait_for_previous_kernel();
    allow_next_kernel();
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
        const u8* at = tile + panel_offset(first + i, (lane & 15) >> 1);
        const uint2 packed = *reinterpret_cast<const uint2*>(at);
        const float4 gate = to_float4(load4(z + static_cast<long long>(i) * z_stride));
        const float2 left = half2_to_floats(packed.x), right = half2_to_floats(packed.y);
        const float4 o = make_float4(left.x, left.y, right.x, right.y);
        const float scale = reciprocal_root_approx(warp_sum(dot4(o, o)) / HEAD_DIM + norm_eps);
        const float4 y = gated(o, scale, weight, gate);
#if OUTPUT
        *(u32*)chunk_place(out, row + i, column, padded_rows) = operand_pair(y.x, y.y);
        *(u32*)chunk_place(out, row + i, column + 2, padded_rows) = operand_pair(y.z, y.w);
#else
        float* rows = static_cast<float*>(out) + (row + i) * v_heads * HEAD_DIM;
        *reinterpret_cast<float4*>(rows + column) = y;
#endif
    }
}
