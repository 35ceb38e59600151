// What forward and backward share: which task is which tile, who is visible in a tile, loading tiles, scratch memory.
//
// Scores are kept transposed, S^T [keys][queries]: queries run along the vector lanes. Row maxima and sums are then
// lane-wise, K and V are read as they lie (their elements are broadcast), and only the queries are transposed, once per
// task. For one key the visible queries of a tile are an interval of lanes, whatever the mask's options.
#pragma once
#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include "attention_gemm.h"

namespace longtrain {
namespace LT_ISA {

constexpr int kLdq = kTile + 16; // a power of two would map a column onto few cache sets
constexpr int64_t kFar = int64_t(1) << 60;
constexpr int kBlocks = kTile / kRows;

static inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }

// Aligned, zeroed scratch of one thread, cut into arrays of T.
template <class T> class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(new (std::align_val_t(64)) T[count]()), next_(memory_) {}
  ~Scratch() { ::operator delete[](memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* take(int64_t count) {
    T* p = next_;
    next_ += count;
    return p;
  }

 private:
  T* memory_;
  T* next_;
};

// A few query tiles of one head, or one of them.
struct Task {
  const Document* doc;
  int64_t b, h, kv, g, number, count; // of the document's tasks
  int64_t q0;                         // first query
  int nq;
  int64_t first_key_tile; // of the document, in the tickets
};

// Within a document the last (longest) task comes first; consecutive tasks belong to different kv heads, so that
// threads seldom meet at one dK/dV tile.
static inline Task task_at(const AttentionArgs& args, int64_t index) {
  const int64_t d = std::upper_bound(args.first_task, args.first_task + args.n_documents + 1, index) - args.first_task - 1;
  Task task;
  task.doc = args.documents + d;
  task.first_key_tile = args.first_key_tile[d];
  task.count = tasks(task.doc->q_stop - task.doc->q_start);
  const int64_t in_doc = index - args.first_task[d], heads = args.B * args.H, pairs = args.B * args.K;
  task.number = task.count - 1 - in_doc / heads;
  const int64_t rest = in_doc % heads;
  task.g = rest / pairs;
  task.b = (rest % pairs) / args.K;
  task.kv = (rest % pairs) % args.K;
  task.h = task.kv * (args.H / args.K) + task.g;
  task.q0 = task.doc->q_start + task.number * kTaskQueries;
  task.nq = int(std::min<int64_t>(kTaskQueries, task.doc->q_stop - task.q0));
  return task;
}
static inline Task tile_of(Task task, int tile) {
  task.q0 += tile * kTile;
  task.nq = std::min(kTile, task.nq - tile * kTile);
  return task;
}

// Visible outside the window: a sink token or a key of a strided block.
static inline bool special_key(const AttentionArgs& args, const Document& doc, int64_t position) {
  const int64_t s = position - doc.origin;
  if (s >= 0 && s < args.sink_tokens) return true;
  return args.stride > 0 && floor_div(s, args.block) % args.stride == 0;
}
static inline bool any_special_key(const AttentionArgs& args, const Document& doc, int64_t s0, int64_t s1) {
  const int64_t first = s0 - doc.origin, last = s1 - 1 - doc.origin;
  if (args.sink_tokens > 0 && last >= 0 && first < args.sink_tokens) return true;
  if (args.stride == 0) return false;
  const int64_t block = floor_div(first, args.block);
  const int64_t next = floor_div(block + args.stride - 1, args.stride) * args.stride;
  return next <= floor_div(last, args.block);
}

// Query positions [lo, hi) that may see a key position in [s0, s1); exact when s1 == s0 + 1.
struct Interval {
  int64_t lo, hi;
};
static inline Interval seen_by(const AttentionArgs& args, bool special, int64_t s0, int64_t s1) {
  Interval i{-kFar, kFar};
  if (!special) {
    if (args.right >= 0) i.lo = s0 - args.right;
    if (args.left >= 0) i.hi = s1 + args.left;
  }
  if (args.causal) i.lo = std::max(i.lo, s0);
  return i;
}

// Tasks [lo, hi) of a document that see one of its key tiles. Contiguous for every mask: that is what makes the
// order in which tasks add to dK, dV computable (`backward`).
static inline Interval tasks_seeing(const AttentionArgs& args, const Task& task, int64_t key_tile) {
  const Document& doc = *task.doc;
  const int64_t k0 = doc.k_start + key_tile * kTile, k1 = std::min(k0 + kTile, doc.k_stop);
  const int64_t s0 = k0 + args.k_offset, s1 = k1 + args.k_offset;
  const Interval p = seen_by(args, any_special_key(args, doc, s0, s1), s0, s1);
  const int64_t first = p.lo - doc.q_shift - doc.q_start, last = p.hi - 1 - doc.q_shift - doc.q_start;
  if (last < first) return {0, 0};
  return {std::max<int64_t>(0, floor_div(first, kTaskQueries)), std::min(task.count, floor_div(last, kTaskQueries) + 1)};
}

// Calls visit(key tile) for every key tile that the task's queries may see, ascending.
template <class F> static void for_each_key_tile(const AttentionArgs& args, const Task& task, F visit) {
  const Document& doc = *task.doc;
  const int64_t count = tiles(doc.k_stop - doc.k_start);
  const int64_t p0 = task.q0 + doc.q_shift, p1 = p0 + task.nq;
  int64_t begin = 0, end = count;
  if (args.causal) end = std::min(end, floor_div(p1 - 1 - args.k_offset - doc.k_start, kTile) + 1);
  // Without strided blocks nothing between the sinks and the window is visible: step over it.
  int64_t sinks_end = 0;
  if (args.stride == 0 && args.left >= 0) {
    begin = std::max<int64_t>(0, floor_div(p0 - args.left - args.k_offset - doc.k_start, kTile));
    sinks_end = floor_div(doc.origin + args.sink_tokens - 1 - args.k_offset - doc.k_start, kTile) + 1;
    sinks_end = std::max<int64_t>(0, std::min(sinks_end, std::min(begin, end)));
  }
  for (int64_t j = 0; j < end; ++j) {
    if (j == sinks_end && j < begin) j = begin;
    if (j >= end) break;
    const Interval seeing = tasks_seeing(args, task, j);
    if (task.number >= seeing.lo && task.number < seeing.hi) visit(j);
  }
}

// The visible lanes of every key of a tile, and what the products may skip.
struct TileMask {
  int32_t lo[kTile], hi[kTile]; // lanes [lo, hi) see key j
  bool full, empty;
  Extent by_key[kBlocks], by_key_depth[kBlocks], by_query[kBlocks];
  // by_key: columns = queries (S^T, dP^T). by_key_depth: depth = queries (dV, dK). by_query: depth = keys (O, dQ).

  void build(const AttentionArgs& args, const Task& task, int64_t k0, int nk) {
    const Document& doc = *task.doc;
    const int64_t p0 = task.q0 + doc.q_shift;
    const bool specials = args.sink_tokens > 0 || args.stride > 0;
    full = empty = true;
    for (int j = 0; j < nk; ++j) {
      const int64_t s = k0 + j + args.k_offset;
      const Interval i = seen_by(args, specials && special_key(args, doc, s), s, s + 1);
      lo[j] = int32_t(std::min<int64_t>(task.nq, std::max<int64_t>(0, i.lo - p0)));
      hi[j] = int32_t(std::min<int64_t>(task.nq, std::max<int64_t>(lo[j], i.hi - p0)));
      full = full && lo[j] == 0 && hi[j] == task.nq;
      empty = empty && lo[j] == hi[j];
    }
    for (int m = 0; m < kBlocks; ++m) by_query[m] = Extent{0, kMaxHeadDim, nk, 0};
    for (int m = 0; m * kRows < nk; ++m) {
      int first = task.nq, last = 0;
      for (int j = m * kRows; j < std::min(nk, (m + 1) * kRows); ++j)
        if (lo[j] < hi[j]) first = std::min(first, lo[j]), last = std::max(last, hi[j]);
      by_key[m] = Extent{first, last, 0, 0};
      by_key_depth[m] = Extent{0, kMaxHeadDim, first, std::max(first, last)};
      for (int q = first / kRows; q * kRows < last; ++q) {
        by_query[q].k0 = std::min(by_query[q].k0, m * kRows);
        by_query[q].k1 = std::max(by_query[q].k1, std::min(nk, (m + 1) * kRows));
      }
    }
  }
  void set_depth(int depth) {
    for (Extent& e : by_key) e.k1 = depth;
  }
  bool sees(int key, int query) const { return query >= lo[key] && query < hi[key]; }
};

// Rows of one head lie a whole token apart, where the hardware does not look ahead: ask for a row some rows before it is
// needed. Prefetching past the last row is harmless.
constexpr int kRowsAhead = 16;
static inline void prefetch_row(const char* row, int64_t bytes, bool write) {
  for (int64_t i = 0; i < bytes; i += 64) write ? __builtin_prefetch(row + i, 1) : __builtin_prefetch(row + i, 0);
}

template <class T>
static void load_tile(T* dst, int ld, const Tensor4& x, int64_t b, int64_t token, int64_t head, int rows, int64_t dim,
                      DType dtype) {
  const int64_t size = element_size(dtype);
  const char* src = x.data + (b * x.batch + token * x.token + head * x.head) * size;
  for (int r = 0; r < std::min(rows, kRowsAhead); ++r) prefetch_row(src + r * x.token * size, dim * size, false);
  for (int r = 0; r < rows; ++r) {
    const char* row = src + r * x.token * size;
    if (r + kRowsAhead < rows) prefetch_row(row + kRowsAhead * x.token * size, dim * size, false);
    load_row(dst + int64_t(r) * ld, row, x.dim, int(dim), dtype);
  }
}

// dst[d][r] = factor * src[r][d]
template <class T> static void transpose(T* dst, int ldd, const T* src, int lds, int rows, int64_t dim, T factor) {
  for (int64_t d0 = 0; d0 < dim; d0 += 16)
    for (int r = 0; r < rows; ++r)
      for (int64_t d = d0; d < std::min(dim, d0 + 16); ++d) dst[d * ldd + r] = factor * src[int64_t(r) * lds + d];
}

// Whether a scratch tile holds no inf or NaN; its padding columns are zero.
template <class T> static bool all_finite(const T* x, int ld, int rows, int64_t dim) {
  using V = typename Simd<T>::V;
  V sum = {};
  for (int r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; d += lanes<T>) sum += load<V>(x + int64_t(r) * ld + d) * T(0);
  bool finite = true;
  for (int i = 0; i < lanes<T>; ++i) finite = finite && sum[i] == T(0);
  return finite;
}

// In a partly masked tile 0 * NaN must not reach a row that does not see the NaN. Only for tiles that hold one, so slow:
// C[m][n] (+)= sum over the visible (m, k) of A(m, k) B[k][n].
template <class T, class Sees, class At>
static void masked_product(T* c, int ldc, int rows, int64_t columns, int depth, Sees sees, At a, const T* b, int ldb,
                           bool accumulate) {
  for (int m = 0; m < rows; ++m) {
    T* cm = c + int64_t(m) * ldc;
    if (!accumulate) std::fill(cm, cm + columns, T(0));
    for (int k = 0; k < depth; ++k)
      if (sees(m, k))
        for (int64_t n = 0; n < columns; ++n) cm[n] += a(m, k) * b[int64_t(k) * ldb + n];
  }
}

// Dropout row keys (a, b) of a tile's queries, as in mask.py.
static inline void dropout_rows(const AttentionArgs& args, const Task& task, uint32_t* a, uint32_t* b) {
  const uint32_t start[2] = {0x9E3779B9u, 0x85EBCA6Bu};
  for (int i = 0; i < task.nq; ++i) {
    const uint32_t words[5] = {uint32_t(args.dropout_seed), uint32_t(args.dropout_seed >> 32), uint32_t(task.b),
                               uint32_t(task.h + args.head_offset), uint32_t(task.q0 + i + task.doc->q_shift)};
    uint32_t key[2];
    for (int c = 0; c < 2; ++c) {
      key[c] = 0;
      for (uint32_t word : words) key[c] = mix32<uint32_t>(key[c] + word + start[c]);
    }
    a[i] = key[0] | 1;
    b[i] = key[1];
  }
}

// Constants of a call. Scores are softmax'd in base 2: p = 2^(rate * x - ...), x the raw or the capped score. The sign of
// `scale` (or zero) goes into the transposed queries, so that a larger x is always a larger probability.
template <class T> struct Constants {
  T q_factor, rate, cap_in, cap_out, kept;
  uint32_t threshold;
  explicit Constants(const AttentionArgs& args) {
    constexpr double log2e = 1.44269504088896340735992468100189;
    const double magnitude = std::fabs(args.scale);
    q_factor = args.scale > 0 ? T(1) : args.scale < 0 ? T(-1) : T(0);
    const double unit = magnitude > 0 ? magnitude : 1.0;
    cap_in = args.softcap > 0 ? T(unit / args.softcap) : T(0);
    cap_out = T(args.softcap);
    rate = args.softcap > 0 ? T(log2e) : T(unit * log2e);
    kept = T(1 / (1 - args.dropout_p));
    threshold = uint32_t(std::min(std::nearbyint(args.dropout_p * 4294967296.0), 4294967295.0));
  }
};

template <class T> static inline int padded(int64_t n) { return int((n + lanes<T> - 1) / lanes<T> * lanes<T>); }
static inline int padded_rows(int n) { return (n + kRows - 1) / kRows * kRows; }

} // namespace LT_ISA
} // namespace longtrain
