// The C interface of the kernel: one attention, forward or backward, as plain numbers and pointers.
//
// Letters: B batch, H query heads of one stream, G key-value heads, L queries, S keys, D key width, E value width.
// clearhead/kernels/cpu/library.py mirrors this struct; change both and CLEARHEAD_ABI together.
#pragma once
#include <stdint.h>

#define CLEARHEAD_ABI 4
#define CLEARHEAD_WIDEST 512  // the largest D or E
#define CLEARHEAD_KEY_BLOCK 128   // tokens whose codes of one key channel share a scale
#define CLEARHEAD_VALUE_GROUP 64  // channels whose codes of one value share a scale

#ifdef __cplusplus
extern "C" {
#endif

// (batch, heads, tokens, width): strides in elements, the last one is 1. data is null for a tensor that is not there.
typedef struct {
  void* data;
  int64_t batch, head, token;
} clearhead_tensor;

// Codes in blocks of CLEARHEAD_KEY_BLOCK tokens: (batch, heads, blocks, quads, lanes, 4) bytes, of keys the lanes are tokens and
// the quads four channels each, of values the lanes are channels and the quads four tokens. With 4 bits a byte's upper half is
// the code 4 · quads further on. `scale` is bfloat16 and `zero` int16, of keys (batch, heads, blocks, channels), of values
// (batch, heads, groups of channels, tokens). `token` is the stride of the third dimension, the others are dense.
typedef struct {
  clearhead_tensor codes, scale, zero;
} clearhead_codes;

typedef struct {
  int32_t dtype;        // of every tensor but gate, statistics and grad_gate: 0 float32, 1 bfloat16
  int32_t streams;      // 1: softmax(q kᵀ) v.   2: (softmax(q1 k1ᵀ) − gate · softmax(q2 k2ᵀ)) v
  int32_t key_streams;  // 2: every stream has its own keys.   1: all read k[0]
  int32_t causal;
  int32_t threads;
  float scale;
  int64_t batch, heads, groups, queries, keys, key_width, value_width;
  int64_t offset;                // position of the first query among the keys
  int64_t window;                // keys a query sees on either side, its own included; 0 for no limit
  const uint8_t* padding;        // (B or 1, S), nonzero where the key is real; null for none
  int64_t padding_batch;         // its stride over the batch, 0 when shared
  const int64_t* documents;      // (B or 1, S); null for none
  int64_t documents_batch;
  clearhead_tensor q[2], k[2], v;
  // float32 (B or 1, 1, S, D), for a few rows without a gradient: the keys are (k ∘ first half, k ∘ second half), k of width
  // D / 2. Null: the keys are k.
  clearhead_tensor table;
  clearhead_tensor gate;         // float32 (B, H, L)
  clearhead_tensor out;          // (B, H, L, E)
  clearhead_tensor noise;        // (B, H, L, E): the second stream's own output; null to have the backward pass do without
  float* statistics;             // (streams, 2, B, H, L): each row's reference logit (unscaled) and sum; null if unwanted
  clearhead_tensor grad_out;
  clearhead_tensor grad_q[2], grad_k[2], grad_v;
  float* grad_gate;              // (B, H, L)
  // The first `held` keys and values, a multiple of CLEARHEAD_KEY_BLOCK, are codes of `bits` = 8 or 4 bits, and k and v begin
  // behind them: a number is scale · (code + zero). 0 for none. Without a gradient only.
  int64_t bits, held;
  clearhead_codes k_codes[2], v_codes;
  // Above 0, without a gradient, table or codes: blocks of keys may be left out as long as no row loses more than this share of
  // its softmax mass in either stream, estimated as sparse.h says: 0 by a bound, 1 by moments. `blocks` then gets three
  // counts, or is null: pairs of a chunk of 64 rows and a block of 128 keys that are seen, whose logits were computed, and
  // whose values were used. Of up to 64 rows a group nothing is left out.
  float left_out;
  int32_t estimate;
  int64_t* blocks;
} clearhead_problem;

// Nonzero results of clearhead_forward and clearhead_backward.
enum { CLEARHEAD_BAD_PROBLEM = 1, CLEARHEAD_NO_MEMORY = 2, CLEARHEAD_NOT_READY = 3 };

#ifdef __cplusplus
}
#endif
