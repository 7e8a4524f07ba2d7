// What quant_gemv is given: the steps of a chain, and each block's share of every product.
// Needs WARPS, which multiply (a multiple of 4).
#pragma once
#include "mma.cuh"

constexpr int TEAM_WARPS = 4;
constexpr int TEAMS = WARPS / TEAM_WARPS;

enum Epilogue { STORE = 0, ADD = 1, SWIGLU = 2, NORM = 3 };

// A product, or with NORM the RMS norm of rows.
struct Step {
    const u8* deals;      // u8 [blocks, deal_bytes(max_pieces)]
    const u8* panels;     // x of a product: fp16 [NUM_PANELS, num_blocks * 8, 32 lanes, 8]
    float* rows;          // float32 [tokens, stride]: result of STORE and ADD, input of NORM
    u8* out_panels;       // result of SWIGLU (of paired rows) and NORM: panels, `stride` columns
    const float* weight;  // float32 [stride], of NORM
    int epilogue, max_pieces, num_blocks, stride;
};

constexpr int MAX_STEPS = 8;
struct Chain {
    Step steps[MAX_STEPS];
};

// A run of units of one stripe, for one team.
struct Piece {
    const u8* units;  // the first unit
    int type, tile_bytes, first_block, num_units;  // num_units 0 ends a team's list
    int row, num_rows;                             // of the output; num_rows up to 64
    int sums, unused;  // where its sums go in shared memory; -1 if it is a whole stripe
};

// What a block has of a stripe that is cut.
struct Seam {
    int first_sums, num_sums;    // of its pieces, in order; num_sums 0 ends a block's list
    int row, num_rows;           // of the output
    int first_slot, num_before;  // what the blocks before have of it, in order
    int own_slot, unused;        // where this block's goes; -1 for the last block, which finishes
};

// What a block is dealt of a product: Piece [TEAMS, max_pieces], then Seam [MAX_SEAMS].
constexpr int MAX_SEAMS = TEAMS + 2;

__device__ __forceinline__ int deal_bytes(int max_pieces) {
    return TEAMS * max_pieces * int(sizeof(Piece)) + MAX_SEAMS * int(sizeof(Seam));
}

// A block's deals of all products in shared memory, one after the other.
struct Deals {
    const u8* bytes;
    const Chain& chain;
    int num_steps;

    __device__ __forceinline__ const u8* of(int step) const {
        const u8* at = bytes;
        for (int s = 0; s < step; s++)
            if (chain.steps[s].epilogue != NORM) at += deal_bytes(chain.steps[s].max_pieces);
        return at;
    }

    __device__ __forceinline__ const Piece* pieces(int step, int team) const {
        return (const Piece*)of(step) + team * chain.steps[step].max_pieces;
    }

    __device__ __forceinline__ const Seam* seams(int step) const {
        return (const Seam*)((const Piece*)of(step) + TEAMS * chain.steps[step].max_pieces);
    }
};
