// What is asked of the memory ahead of its use, line by line in the order in which it lies, a few lines with every step
// of the arithmetic: in bursts, in another order, or for a farther cache than the first it comes later than it could.
#pragma once
#include <stdint.h>

namespace clearhead::CLEARHEAD_ISA {

constexpr int64_t LINE = 64;
constexpr int64_t AHEAD_BYTES = 8192;

class Ahead {
 public:
  // Nothing.
  Ahead() = default;
  // Rows of `bytes` bytes, `stride` bytes apart, from AHEAD_BYTES behind `from` on. With `turns` above 1 only every
  // turns-th line that `next` is asked for: the same rows are then used so often.
  Ahead(const void* from, int64_t bytes, int64_t stride, int64_t turns)
      : bytes_(stride == bytes ? INT64_MAX : bytes), stride_(stride), turns_(turns) {
    const int64_t rows = bytes < AHEAD_BYTES ? AHEAD_BYTES / bytes : 1;
    row_ = static_cast<const char*>(from) + rows * stride;
  }
  __attribute__((always_inline)) void next() {
    if (++turn_ < turns_) return;
    turn_ = 0;
    __builtin_prefetch(row_ + column_, 0, 3);
    column_ += LINE;
    if (column_ < bytes_) return;
    column_ = 0;
    row_ += stride_;
  }

 private:
  const char* row_ = nullptr;
  int64_t bytes_ = 0, stride_ = 0, turns_ = INT64_MAX, turn_ = 0, column_ = 0;
};

}  // namespace clearhead::CLEARHEAD_ISA
