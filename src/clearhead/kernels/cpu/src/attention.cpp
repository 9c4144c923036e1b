// Fused attention on a CPU: one or two softmax maps, combined as P_1 − gate · P_2, times V, without ever holding a map.
// Forward in forward.h, of a few rows in decode.h, backward in backward.h; this file divides the work among threads.
//
// Compiled once for every instruction set, each time into a namespace of that name (CLEARHEAD_ISA).
#include "backward.h"
#include "decode.h"
#include "sparse_forward.h"

namespace clearhead::CLEARHEAD_ISA {
namespace {

constexpr int64_t WAVE_BYTES = 64 << 20;  // packed keys and values held at once
constexpr int64_t MOST_PARTS = 16;

// Into how many parts to cut each of `tasks` equal tasks so that `threads` threads stay busy.
int64_t parts_of(int64_t tasks, int64_t threads, int64_t most) {
  int64_t best = 1;
  double waste = 1e9;
  for (int64_t parts = 1; parts <= most && parts <= MOST_PARTS; parts++) {
    const int64_t rounds = (tasks * parts + threads - 1) / threads;
    const double now = static_cast<double>(rounds * threads) / static_cast<double>(tasks * parts);
    if (now < waste - 0.1) {
      waste = now;
      best = parts;
    }
  }
  return best;
}

template <class Unit, class Number>
struct ForwardWork {
  SparseForward<Unit, Number> pass;
  int64_t groups, parts = 1, wave = 0, held = 0;
  float *scratch = nullptr, *packed = nullptr, *states = nullptr, *known = nullptr;
  uint8_t* finite = nullptr;
  int64_t* counts = nullptr;  // of each chunk in a wave, where blocks may be left out
  int64_t scratch_each;

  ForwardWork(const clearhead_problem& p, const Ids& ids) : pass(p, ids), groups(p.groups) {
    const int64_t weights = pass.sparse() ? pass.sparse_floats() : pass.held_floats();
    scratch_each = rounded_up(pass.scratch_floats() + pass.state_floats() + weights, 16);
  }
  float* memory(int64_t worker) const { return scratch + worker * scratch_each; }
  float* state(int64_t task) const { return states + task * pass.state_floats(); }
  float* known_of(int64_t group) const { return known + group * pass.summary_floats(); }
  float* blocks(int64_t group) const { return packed + group * pass.sizes().blocks * pass.block_floats(); }
};

template <class Unit, class Number, bool FACTORED>
struct DecodeWork {
  Decode<Unit, Number, FACTORED> pass;
  int64_t groups, parts;
  float *scratch = nullptr, *weights = nullptr, *states = nullptr;

  DecodeWork(const clearhead_problem& p, const Ids& ids)
      : pass(p, ids), groups(p.groups), parts(parts_of(p.batch * p.groups, p.threads, pass.sizes().blocks / 2 + 1)) {}
  float* memory(int64_t worker) const { return scratch + worker * pass.scratch_floats(); }
  // Weights wait for the other parts of their group; where there are none, they are the worker's own.
  float* weights_of(int64_t group, int64_t worker) const {
    return weights + (parts == 1 ? worker : group) * pass.weights_floats();
  }
  float* states_of(int64_t group) const { return states + group * parts * pass.state_floats(); }
};

template <class Work>
void weigh_task(int64_t task, int64_t worker, void* context) {
  const Work& work = *static_cast<Work*>(context);
  const int64_t group = task / work.parts, part = task % work.parts;
  work.pass.weigh(group / work.groups, group % work.groups, part, work.parts, work.memory(worker),
                  work.weights_of(group, worker), work.states_of(group) + part * work.pass.state_floats());
}

template <class Work>
void add_up_task(int64_t task, int64_t worker, void* context) {
  const Work& work = *static_cast<Work*>(context);
  const int64_t group = task / work.parts;
  work.pass.add_up(group / work.groups, group % work.groups, task % work.parts, work.parts, work.memory(worker),
                   work.weights_of(group, worker), work.states_of(group));
}

template <class Work>
void finish_task(int64_t group, int64_t, void* context) {
  const Work& work = *static_cast<Work*>(context);
  work.pass.finish(group / work.groups, group % work.groups, work.parts, work.states_of(group));
}

// A group that is not cut in parts goes through all steps at once, while its weights are in the cache.
template <class Work>
void whole_task(int64_t group, int64_t worker, void* context) {
  weigh_task<Work>(group, worker, context);
  add_up_task<Work>(group, worker, context);
  finish_task<Work>(group, worker, context);
}

template <class Work>
int32_t decode(const clearhead_problem& p, Work& work) {
  const int64_t total = p.batch * p.groups;
  const Buffer scratch(p.threads * work.pass.scratch_floats());
  const Buffer weights((work.parts == 1 ? p.threads : total) * work.pass.weights_floats());
  const Buffer states(total * work.parts * work.pass.state_floats());
  if (!scratch || !weights || !states) return CLEARHEAD_NO_MEMORY;
  work.scratch = scratch.data();
  work.weights = weights.data();
  work.states = states.data();
  if (work.parts == 1) {
    for_each_task(p.threads, total, whole_task<Work>, &work);
    return 0;
  }
  for_each_task(p.threads, total * work.parts, weigh_task<Work>, &work);
  for_each_task(p.threads, total * work.parts, add_up_task<Work>, &work);
  for_each_task(p.threads, total, finish_task<Work>, &work);
  return 0;
}

// Some rows: every group packs its keys and values once, block by block; the keys of one group may be cut in parts.
template <class Work>
void single_task(int64_t task, int64_t worker, void* context) {
  const Work& work = *static_cast<Work*>(context);
  const int64_t group = task / work.parts;
  work.pass.run(group / work.groups, group % work.groups, 0, task % work.parts, work.parts, nullptr, nullptr,
                work.memory(worker), work.state(task));
}

template <class Work>
void merge_task(int64_t group, int64_t, void* context) {
  const Work& work = *static_cast<Work*>(context);
  using State = typename decltype(work.pass)::State;
  const State whole(work.state(group * work.parts), work.pass.sizes());
  for (int64_t part = 1; part < work.parts; part++)
    work.pass.merge(whole, State(work.state(group * work.parts + part), work.pass.sizes()));
  work.pass.finish(group / work.groups, group % work.groups, 0, whole);
}

// Many rows: the keys and values of a wave of groups are packed once, then all their chunks of rows are worked off.
template <class Work>
void pack_task(int64_t task, int64_t, void* context) {
  const Work& work = *static_cast<Work*>(context);
  const int64_t blocks = work.pass.sizes().blocks, at = task / blocks, block = task % blocks, group = work.wave + at;
  const int64_t b = group / work.groups;
  work.finite[task] = work.pass.pack_block(b, group % work.groups, block, work.pass.padding(b, block),
                                           work.blocks(at) + block * work.pass.block_floats());
  if (work.pass.sparse()) work.pass.summarise(b, group % work.groups, block, work.known_of(at));
}

template <class Work>
void chunk_task(int64_t task, int64_t worker, void* context) {
  const Work& work = *static_cast<Work*>(context);
  using State = typename decltype(work.pass)::State;
  const auto& z = work.pass.sizes();
  // The last rows see most keys under a causal mask: they come first, so that the threads finish together.
  const int64_t at = task % work.held, begin = (z.chunks - 1 - task / work.held) * ROWS, group = work.wave + at;
  const int64_t b = group / work.groups, g = group % work.groups;
  float* state = work.memory(worker) + work.pass.scratch_floats();
  if (work.pass.sparse()) {
    int64_t* counts = work.counts + 3 * task;
    if (work.pass.run_sparse(b, g, begin, work.blocks(at), work.finite + at * z.blocks, work.known_of(at), work.memory(worker),
                             state, state + work.pass.state_floats(), counts))
      return;
    work.pass.count_all(b, begin, counts);
  } else if (work.pass.held_floats() &&
      work.pass.run_holding(b, g, begin, work.blocks(at), work.finite + at * z.blocks, work.memory(worker), state,
                            state + work.pass.state_floats()))
    return;
  work.pass.run(b, g, begin, 0, 1, work.blocks(at), work.finite + at * z.blocks, work.memory(worker), state);
  work.pass.finish(b, g, begin, State(state, z));
}

template <class Unit, class Number>
int32_t forward_with(const clearhead_problem& p, const Ids& ids) {
  if (p.table.data) {  // see decode.h; in floats, whatever they are stored in
    DecodeWork<Single, Number, true> few(p, ids);
    if (few.pass.applies()) return decode(p, few);
  } else {
    DecodeWork<Unit, Number, false> few(p, ids);
    if (few.pass.applies()) return decode(p, few);
  }
  using Work = ForwardWork<Unit, Number>;
  Work work(p, ids);
  const auto& z = work.pass.sizes();
  const int64_t total = p.batch * p.groups;
  const Buffer scratch(p.threads * work.scratch_each);
  if (!scratch) return CLEARHEAD_NO_MEMORY;
  work.scratch = scratch.data();
  if (z.chunks == 1) {
    work.parts = parts_of(total, p.threads, z.blocks / 2 + 1);
    const Buffer states(total * work.parts * work.pass.state_floats());
    if (!states) return CLEARHEAD_NO_MEMORY;
    work.states = states.data();
    for_each_task(p.threads, total * work.parts, single_task<Work>, &work);
    for_each_task(p.threads, total, merge_task<Work>, &work);
    return 0;
  }
  const int64_t each = z.blocks * work.pass.block_floats();
  int64_t wave = WAVE_BYTES / (each * 4);
  wave = wave < 1 ? 1 : (wave > total ? total : wave);
  const Buffer packed(wave * each + PANEL), finite((wave * z.blocks + 3) / 4);
  const int64_t counted = work.pass.sparse() ? 3 * wave * z.chunks : 0;
  const Buffer known(wave * work.pass.summary_floats() + PANEL), counts(2 * counted);
  if (!packed || !finite || !known || !counts) return CLEARHEAD_NO_MEMORY;
  work.known = known.data();
  work.counts = reinterpret_cast<int64_t*>(counts.data());
  work.packed = packed.data();
  work.finite = reinterpret_cast<uint8_t*>(finite.data());
  for (work.wave = 0; work.wave < total; work.wave += wave) {
    work.held = total - work.wave < wave ? total - work.wave : wave;
    memset(work.counts, 0, sizeof(int64_t) * static_cast<size_t>(counted));
    for_each_task(p.threads, work.held * z.blocks, pack_task<Work>, &work);
    for_each_task(p.threads, work.held * z.chunks, chunk_task<Work>, &work);
    for (int64_t i = 0; p.blocks && i < counted; i++) p.blocks[i % 3] += work.counts[i];
  }
  return 0;
}

template <class Unit, class Number>
struct BackwardWork {
  Backward<Unit, Number> pass;
  int64_t groups, parts = 1, scratch_each, queries_each;
  float *scratch = nullptr, *queries = nullptr;

  BackwardWork(const clearhead_problem& p, const Ids& ids) : pass(p, ids), groups(p.groups) {
    scratch_each = rounded_up(pass.scratch_floats(), 16);
    queries_each = pass.query_floats();
  }
};

template <class Work>
void gradient_task(int64_t task, int64_t worker, void* context) {
  const Work& work = *static_cast<Work*>(context);
  const int64_t group = task / work.parts, b = group / work.groups, g = group % work.groups;
  // dQ of a whole group is written at once; that of a part waits in memory of its own for the others.
  float* grad_q = work.queries + (work.parts == 1 ? worker : task) * work.queries_each;
  work.pass.run(b, g, task % work.parts, work.parts, work.scratch + worker * work.scratch_each, grad_q);
  if (work.parts == 1) work.pass.write_queries(b, g, 0, work.pass.sizes().rows, grad_q, 1);
}

template <class Work>
void sum_task(int64_t task, int64_t, void* context) {
  const Work& work = *static_cast<Work*>(context);
  const auto& z = work.pass.sizes();
  const int64_t group = task / z.chunks, begin = task % z.chunks * ROWS;
  work.pass.write_queries(group / work.groups, group % work.groups, begin, z.rows_of(begin),
                          work.queries + group * work.parts * work.queries_each, work.parts);
}

template <class Unit, class Number>
int32_t backward_with(const clearhead_problem& p, const Ids& ids) {
  using Work = BackwardWork<Unit, Number>;
  Work work(p, ids);
  const auto& z = work.pass.sizes();
  const int64_t total = p.batch * p.groups;
  work.parts = parts_of(total, p.threads, z.blocks);
  const Buffer scratch(p.threads * work.scratch_each);
  const Buffer queries((work.parts == 1 ? p.threads : total * work.parts) * work.queries_each);
  if (!scratch || !queries) return CLEARHEAD_NO_MEMORY;
  work.scratch = scratch.data();
  work.queries = queries.data();
  for_each_task(p.threads, total * work.parts, gradient_task<Work>, &work);
  if (work.parts > 1) for_each_task(p.threads, total * z.chunks, sum_task<Work>, &work);
  return 0;
}

}  // namespace

#if defined(__AVX512BF16__)
using HalfUnit = Pair;
#else
using HalfUnit = Single;  // bfloat16 numbers are widened when they are packed
#endif

int32_t forward(const clearhead_problem& p, const Ids& ids) {
  return p.dtype == 1 ? forward_with<HalfUnit, Half>(p, ids) : forward_with<Single, float>(p, ids);
}

int32_t backward(const clearhead_problem& p, const Ids& ids) {
  return p.dtype == 1 ? backward_with<HalfUnit, Half>(p, ids) : backward_with<Single, float>(p, ids);
}

}  // namespace clearhead::CLEARHEAD_ISA
