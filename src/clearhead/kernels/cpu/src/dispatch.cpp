// The C interface: checks, the choice of an instruction set, PyTorch's thread pool.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace clearhead {
namespace {

// PyTorch's own `torch_parallel_for`, part of its stable C interface: one pool of threads, obeying torch.set_num_threads.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
ParallelFor parallel_for = nullptr;

struct Set {
  const char* name;
  int32_t (*forward)(const clearhead_problem&, const Ids&);
  int32_t (*backward)(const clearhead_problem&, const Ids&);
  bool (*supported)();
};

#if defined(CLEARHEAD_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif
bool always() { return true; }

// Best first.
const Set SETS[] = {
#if defined(CLEARHEAD_HAS_AVX512_BF16)
    {"avx512_bf16", avx512_bf16::forward, avx512_bf16::backward, has_avx512_bf16},
#endif
#if defined(CLEARHEAD_HAS_AVX512)
    {"avx512", avx512::forward, avx512::backward, has_avx512},
#endif
#if defined(CLEARHEAD_HAS_AVX2)
    {"avx2", avx2::forward, avx2::backward, has_avx2},
#endif
    {"portable", portable::forward, portable::backward, always},
};

const Set* best() {
  for (const Set& set : SETS)
    if (set.supported()) return &set;
  return nullptr;
}

std::atomic<const Set*> chosen{nullptr};

const Set* current() {
  const Set* set = chosen.load();
  if (!set) chosen.store(set = best());
  return set;
}

struct Tasks {
  std::atomic<int64_t> next{0}, workers{0};
  int64_t count = 0;
  TaskBody body = nullptr;
  void* context = nullptr;
};

void work_off(int64_t, int64_t, void* context) {
  Tasks& tasks = *static_cast<Tasks*>(context);
  const int64_t worker = tasks.workers++;
  for (int64_t task = tasks.next++; task < tasks.count; task = tasks.next++) tasks.body(task, worker, tasks.context);
}

bool stands(const clearhead_tensor& tensor) { return tensor.data != nullptr; }

bool codes_stand(const clearhead_problem& p) {
  const auto whole = [](const clearhead_codes& x) { return stands(x.codes) && stands(x.scale) && stands(x.zero); };
  if (p.held < 0 || p.held >= p.keys || p.held % CLEARHEAD_KEY_BLOCK || (p.bits != 8 && p.bits != 4)) return false;
  for (int s = 0; s < p.key_streams; s++)
    if (!whole(p.k_codes[s])) return false;
  return whole(p.v_codes);
}

bool well_formed(const clearhead_problem& p, bool backward) {
  if (p.streams < 1 || p.streams > 2 || p.key_streams < 1 || p.key_streams > p.streams) return false;
  if (p.batch < 1 || p.heads < 1 || p.groups < 1 || p.heads % p.groups || p.queries < 1 || p.keys < 1) return false;
  if (p.key_width > CLEARHEAD_WIDEST || p.value_width > CLEARHEAD_WIDEST) return false;
  if (p.key_width < 1 || p.value_width < 1 || p.threads < 1 || p.dtype < 0 || p.dtype > 1) return false;
  if (!stands(p.v) || !stands(p.out) || (p.streams == 2 && !stands(p.gate))) return false;
  for (int s = 0; s < p.streams; s++)
    if (!stands(p.q[s]) || (s < p.key_streams && !stands(p.k[s]))) return false;
  if (stands(p.table) && (backward || p.key_width % 2)) return false;
  if (p.held && (backward || p.statistics || !codes_stand(p))) return false;
  if (!(p.left_out >= 0 && p.left_out < 1) || p.estimate < 0 || p.estimate > 1) return false;
  if (p.left_out > 0 && (backward || p.statistics || p.held || stands(p.table))) return false;
  if (!backward) return true;
  if (!p.statistics || !stands(p.grad_out) || !stands(p.grad_v)) return false;
  if (p.streams == 2 && !p.grad_gate) return false;
  for (int s = 0; s < p.streams; s++)
    if (!stands(p.grad_q[s]) || (s < p.key_streams && !stands(p.grad_k[s]))) return false;
  return true;
}

// Documents may have any numbers: they are replaced by their rank, padding by −1.
void number_documents(const clearhead_problem& p, std::vector<int32_t>& numbers, Ids& ids) {
  if (!p.padding && !p.documents) return;
  const bool shared = p.padding_batch == 0 && p.documents_batch == 0;
  const int64_t rows = shared ? 1 : p.batch, slack = 256;
  numbers.assign(static_cast<size_t>(2 * rows * p.keys + slack), 0);
  int32_t* queries = numbers.data();
  int32_t* keys = queries + rows * p.keys;
  std::vector<int64_t> known;
  for (int64_t b = 0; b < rows; b++)
    for (int64_t j = 0; j < p.keys; j++) {
      if (p.documents) {
        const int64_t* documents = p.documents + b * p.documents_batch;
        if (j == 0) {
          known.assign(documents, documents + p.keys);
          std::sort(known.begin(), known.end());
          known.erase(std::unique(known.begin(), known.end()), known.end());
        }
        queries[b * p.keys + j] =
            static_cast<int32_t>(std::lower_bound(known.begin(), known.end(), documents[j]) - known.begin());
      }
      const bool real = !p.padding || p.padding[b * p.padding_batch + j];
      keys[b * p.keys + j] = real ? queries[b * p.keys + j] : -1;
    }
  ids.queries = queries;
  ids.keys = keys;
  ids.batch = shared ? 0 : p.keys;
}

int32_t run(const clearhead_problem* problem, bool backward) {
  if (!problem || !well_formed(*problem, backward)) return CLEARHEAD_BAD_PROBLEM;
  if (!parallel_for) return CLEARHEAD_NOT_READY;
  std::vector<int32_t> numbers;
  Ids ids;
  number_documents(*problem, numbers, ids);
  const Set* set = current();
  return backward ? set->backward(*problem, ids) : set->forward(*problem, ids);
}

}  // namespace

void for_each_task(int32_t threads, int64_t tasks, TaskBody body, void* context) {
  Tasks shared;
  shared.count = tasks;
  shared.body = body;
  shared.context = context;
  const int64_t workers = std::min<int64_t>(threads, tasks);
  if (workers > 1)
    parallel_for(0, workers, 1, work_off, &shared);
  else
    work_off(0, 1, &shared);
}

// Memory that a thread has used before is given out again: what a decoding step needs would otherwise be mapped, cleared and
// unmapped by the system in every call.
struct Kept {
  static constexpr int MOST = 4;
  static constexpr int64_t LARGEST = 16 << 20;  // bytes; larger ones are not kept
  float* data[MOST] = {};
  int64_t bytes[MOST] = {};
  ~Kept() {
    for (float* each : data) free(each);
  }
};
static thread_local Kept kept;

Buffer::Buffer(int64_t floats) : data_(nullptr), bytes_((floats < 1 ? 1 : floats) * 4) {
  for (int i = 0; i < Kept::MOST; i++)
    if (kept.data[i] && kept.bytes[i] >= bytes_) {
      std::swap(data_, kept.data[i]);
      bytes_ = kept.bytes[i];
      return;
    }
  bytes_ += bytes_ / 4;  // a cache grows by a token a call
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, static_cast<size_t>(bytes_)) == 0) data_ = static_cast<float*>(memory);
}
Buffer::~Buffer() {
  if (!data_) return;
  // In place of the smallest one; an empty place is smaller than all.
  int at = 0;
  for (int i = 0; i < Kept::MOST; i++) {
    if (!kept.data[i]) kept.bytes[i] = 0;
    if (kept.bytes[i] < kept.bytes[at]) at = i;
  }
  if (bytes_ > Kept::LARGEST || kept.bytes[at] >= bytes_) {
    free(data_);
    return;
  }
  free(kept.data[at]);
  kept.data[at] = data_;
  kept.bytes[at] = bytes_;
}
float* Buffer::data() const { return data_; }
Buffer::operator bool() const { return data_ != nullptr; }

}  // namespace clearhead

EXPORT int32_t clearhead_abi(void) { return CLEARHEAD_ABI; }

EXPORT void clearhead_init(void* torch_parallel_for) {
  clearhead::parallel_for = reinterpret_cast<clearhead::ParallelFor>(torch_parallel_for);
}

EXPORT const char* clearhead_isa(void) { return clearhead::current()->name; }

EXPORT int32_t clearhead_set_isa(const char* name) {
  for (const clearhead::Set& set : clearhead::SETS)
    if (name && !strcmp(name, set.name) && set.supported()) {
      clearhead::chosen.store(&set);
      return 0;
    }
  return CLEARHEAD_BAD_PROBLEM;
}

EXPORT int32_t clearhead_forward(const clearhead_problem* problem) { return clearhead::run(problem, false); }
EXPORT int32_t clearhead_backward(const clearhead_problem* problem) { return clearhead::run(problem, true); }
