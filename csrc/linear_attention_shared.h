// What threads take, one after the other: whole heads; then, of heads that they share, for every piece its chunks one by one, columns of
// the states along the chunks, and the chunks again. They are taken in an order in which a task waits for earlier ones only, and seldom:
//
//     chunks of piece 0;   columns of piece 0, chunks of piece 1, outputs of piece 0;   columns of piece 1, chunks of piece 2, ...
#pragma once
#include <thread>

#include "linear_attention_head.h"

namespace longtrain {
namespace LT_ISA {

enum Kind { kChunks, kColumns, kOutputs, kKinds };

// `piece`: the how manyeth, of the backward pass from the last on.
struct SharedTask {
  Kind kind;
  int64_t piece, head, part;
};

static inline int64_t parts_of(const LinearArgs& args, Kind kind) {
  return kind == kColumns ? (padded(args.V) + args.columns - 1) / args.columns : args.chunks_of(0);
}

static inline SharedTask shared_task(const LinearArgs& args, int64_t number) {
  const int64_t chunks = args.shared * parts_of(args, kChunks), columns = args.shared * parts_of(args, kColumns);
  const auto task = [&](Kind kind, int64_t piece, int64_t index) {
    return SharedTask{kind, piece, index / parts_of(args, kind), index % parts_of(args, kind)};
  };
  if (number < chunks) return task(kChunks, 0, number);
  const int64_t piece = (number - chunks) / (2 * chunks + columns), index = (number - chunks) % (2 * chunks + columns);
  if (index < columns) return task(kColumns, piece, index);
  return index < columns + chunks ? task(kChunks, piece + 1, index - columns) : task(kOutputs, piece, index - columns - chunks);
}

static inline int64_t shared_tasks(const LinearArgs& args) {
  const int64_t chunks = args.shared * parts_of(args, kChunks), columns = args.shared * parts_of(args, kColumns);
  return chunks + args.pieces() * (2 * chunks + columns);
}

static inline void wait_for_all(const LinearArgs& args, Kind kind, int64_t piece) {
  if (piece < 0) return;
  const std::atomic<int32_t>& done = args.done[piece * kKinds + kind];
  for (int spins = 0; done.load(std::memory_order_acquire) != args.shared * parts_of(args, kind); ++spins)
    if (spins > 64) std::this_thread::yield();
}

template <class T, int LD> static void take_shared(const LinearArgs& args, bool backward, char* workspace, int64_t number) {
  const SharedTask task = shared_task(args, number);
  if (task.piece == args.pieces()) return;
  const int64_t p = backward ? args.pieces() - 1 - task.piece : task.piece, chunks = args.chunks_of(0);
  Kept<T, LD>* kept = reinterpret_cast<Kept<T, LD>*>(args.kept) + (task.piece % 2 * args.shared + task.head) * chunks;
  LinearHead<T, LD> head(args, workspace, args.whole + task.head);
  if (task.kind == kColumns) {
    wait_for_all(args, kColumns, task.piece - 1), wait_for_all(args, kChunks, task.piece);
    const int from = int(task.part * args.columns);
    head.along(kept, p, from, std::min(int(args.columns), head.chunk.V - from), backward);
  } else if (task.part < args.chunks_of(p)) {
    wait_for_all(args, kOutputs, task.piece - 2);  // they read what chunks are kept in
    if (task.kind == kChunks) head.before(kept, p, task.part);
    if (task.kind == kOutputs) wait_for_all(args, kColumns, task.piece), head.after(kept, p, task.part, backward);
  }
  args.done[task.piece * kKinds + task.kind].fetch_add(1, std::memory_order_release);
}

}  // namespace LT_ISA
}  // namespace longtrain
