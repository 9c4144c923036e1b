// A chunk of query rows and what each of them may see.
//
// The query heads of one key-value group are one long list of rows, head after head, so that a few new tokens of many
// heads fill a chunk as well as many tokens of one head do.
#pragma once
#include "pack.h"
#include "runtime.h"

namespace clearhead::CLEARHEAD_ISA {

constexpr int ROWS = 64;    // query rows of a chunk
constexpr int BLOCK = 128;  // keys of a block
constexpr int64_t FAR = int64_t{1} << 61;

enum class View { NONE, PART, ALL };

struct Rows {
  int64_t count = 0;
  int32_t low[ROWS], high[ROWS], id[ROWS];  // row i sees the keys low[i] <= j < high[i] with its id
  int32_t first = 0, last = 0;              // the keys that any row sees lie in [first, last)
  const int32_t* key_ids = nullptr;         // (S), or null when all keys are alike

  // Rows [begin, begin + count) of the group's list.
  void place(const clearhead_problem& p, const Ids& ids, int64_t b, int64_t begin, int64_t rows) {
    count = rows;
    key_ids = ids.keys ? ids.keys + b * ids.batch : nullptr;
    const int32_t* query_ids = ids.keys ? ids.queries + b * ids.batch : nullptr;
    first = static_cast<int32_t>(p.keys);
    last = 0;
    // As far as any window needs to reach; no position plus it overflows.
    const int64_t window = p.window < FAR ? p.window : FAR;
    for (int64_t i = 0; i < rows; i++) {
      const int64_t position = (begin + i) % p.queries + p.offset;
      int64_t from = 0, to = p.keys;
      if (window > 0) {
        from = bounded(position - window + 1, p.keys);
        to = bounded(position + window, p.keys);
      }
      if (p.causal) to = bounded(position + 1, p.keys);
      low[i] = static_cast<int32_t>(from);
      high[i] = static_cast<int32_t>(to);
      id[i] = query_ids ? query_ids[bounded(position, p.keys - 1)] : 0;
      if (from < to) {
        if (low[i] < first) first = low[i];
        if (high[i] > last) last = high[i];
      }
    }
    if (first > last) first = last;
  }

  // Row i alone.
  Rows only(int64_t i) const {
    Rows one;
    one.count = 1;
    one.low[0] = one.first = low[i];
    one.high[0] = one.last = high[i];
    one.id[0] = id[i];
    one.key_ids = key_ids;
    return one;
  }

  bool sees(int64_t i, int64_t key) const {
    return key >= low[i] && key < high[i] && (!key_ids || key_ids[key] == id[i]);
  }

  // Which of the keys [begin, begin + keys) row i sees; false if none.
  bool seen(int64_t i, int64_t begin, int64_t keys, uint8_t* visible) const {
    bool some = false;
    for (int64_t j = 0; j < keys; j++) some |= visible[j] = sees(i, begin + j);
    return some;
  }

  // What the rows see of keys [begin, begin + keys), keys <= BLOCK.
  View view(int64_t begin, int64_t keys) const {
    if (begin >= last || begin + keys <= first) return View::NONE;
    bool whole = keys % VL == 0;  // lanes past the last key need masking
    for (int64_t i = 0; i < count && whole; i++) whole = low[i] <= begin && high[i] >= begin + keys;
    if (!key_ids) return whole ? View::ALL : View::PART;
    int32_t least = key_ids[begin], most = least, least_row = id[0], most_row = least_row;
    for (int64_t j = begin; j < begin + keys; j++) {
      least = key_ids[j] < least ? key_ids[j] : least;
      most = key_ids[j] > most ? key_ids[j] : most;
    }
    for (int64_t i = 0; i < count; i++) {
      least_row = id[i] < least_row ? id[i] : least_row;
      most_row = id[i] > most_row ? id[i] : most_row;
    }
    if (most < least_row || least > most_row) return View::NONE;
    const bool alike = least == most && least_row == most_row && least == least_row;
    return whole && alike ? View::ALL : View::PART;
  }

  // Logits (count x columns) of the keys from `begin` on become −inf where they are not seen.
  void hide(float* logits, int64_t stride, int64_t begin, int64_t columns) const {
    const vi lanes = lane_numbers();
    const vf never = all(-__builtin_inff());
    for (int64_t i = 0; i < count; i++)
      for (int64_t c = 0; c < columns; c += VL) {
        const vi key = lanes + all_ints(static_cast<int32_t>(begin + c));
        vi seen = (key >= all_ints(low[i])) & (key < all_ints(high[i]));
        if (key_ids) seen &= load_ints(key_ids + begin + c) == all_ints(id[i]);
        float* at = logits + i * stride + c;
        store(at, seen ? load(at) : never);
      }
  }

 private:
  static int64_t bounded(int64_t x, int64_t most) { return x < 0 ? 0 : (x > most ? most : x); }
};

}  // namespace clearhead::CLEARHEAD_ISA
