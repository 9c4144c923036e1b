// What all instruction sets share: threads, memory, tensors of the interface, and the entry points of each set.
#pragma once
#include <stdint.h>

#include "problem.h"

namespace clearhead {

// body(task, worker, context) for every task, on up to `threads` threads of PyTorch's pool, worker < threads. Each takes
// the next task when it is done with one; a task's arithmetic does not depend on the thread, so neither do the results.
using TaskBody = void (*)(int64_t task, int64_t worker, void* context);
void for_each_task(int32_t threads, int64_t tasks, TaskBody body, void* context);

// Floats at a cache line; false when there is no memory. Nothing here is defined in this header: each instruction set
// would bring a copy of its own, and the linker would keep any one of them for all.
class Buffer {
 public:
  explicit Buffer(int64_t floats);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const;
  explicit operator bool() const;

 private:
  float* data_;
  int64_t bytes_;
};

// Which keys belong to which queries, both (B, S) by position: equal numbers for one document, −1 for a padded key, which
// no query has. Null: all the same. VL numbers may be read past the end.
struct Ids {
  const int32_t* keys = nullptr;
  const int32_t* queries = nullptr;
  int64_t batch = 0;
};

#define CLEARHEAD_ENTRIES(set)                                        \
  namespace set {                                                     \
  int32_t forward(const clearhead_problem& problem, const Ids& ids);  \
  int32_t backward(const clearhead_problem& problem, const Ids& ids); \
  }
CLEARHEAD_ENTRIES(avx512_bf16)
CLEARHEAD_ENTRIES(avx512)
CLEARHEAD_ENTRIES(avx2)
CLEARHEAD_ENTRIES(portable)
#undef CLEARHEAD_ENTRIES

}  // namespace clearhead
