// One long convolution as plain data: what torch's side hands to the kernels. Axes as in longtrain/ops/long_conv.
#pragma once
#include <atomic>
#include <cstdint>

#include "attention_args.h"  // DType

namespace longtrain {

// [batch, token, channel] with strides in bytes; the channels of a token lie side by side.
struct Rows {
  char* data = nullptr;
  int64_t batch = 0, token = 0;
};

// A stretch of one document that is convolved at a time. Index j of a transform is token frame + j.
struct Piece {
  int64_t out_start, out_stop;          // tokens whose y and dv come of it
  int64_t v_start, v_stop, v_frame;     // forward: the tokens of v that reach them
  int64_t g_start, g_stop, g_frame;     // backward: the tokens of g that they reach
};

// Constants of transforms of `size` complex numbers; see long_conv_fft.h.
struct Tables {
  const void *weight = nullptr, *twist = nullptr, *roots = nullptr, *odd_twist = nullptr, *odd_circle = nullptr;
};

struct LongConvArgs {
  DType dtype = DType::f32, k_dtype = DType::f32;
  int64_t B = 0, E = 0, W = 0, share = 1;  // filter h serves channels h * share .. (h + 1) * share - 1
  Rows u, gate_in, gate_out, y;
  Rows dy, du, dgate_in, dgate_out;
  const char* k = nullptr;
  int64_t k_row = 0;           // bytes from one filter to the next; its taps lie side by side
  const void* skip = nullptr;  // wide [E]
  void* dk = nullptr;          // wide [E / share, W], contiguous
  void* dskip = nullptr;       // wide [E]

  // The pieces of one method and size.
  bool direct = false;
  bool first = false;  // no other pieces came before: dk and dskip are written, not added to
  int64_t size = 0, odd = 1, past = 0, future = 0;
  const Piece* pieces = nullptr;
  int64_t n_pieces = 0;
  Tables tables;

  int64_t group = 16;          // channels at a time
  int64_t k_slots = 1, dk_slots = 0;
  char* workspace = nullptr;
  int64_t workspace_bytes = 0;  // of one thread
  std::atomic<int64_t>* next_group = nullptr;
  std::atomic<int32_t>* tickets = nullptr;   // [E / share]: how many groups have added to a row of dk
  std::atomic<int64_t>* bad_row = nullptr;   // the first filter with a tap that is not finite, or -1
};

constexpr int kRunElements = 256;   // elements of a row of the transform's first pass that are staged at a time
constexpr int kDirectTokens = 256;  // tokens of a piece that is convolved directly
constexpr int kDirectGroup = 16;

// Elements of T from one channel's transform to the next: two cache lines more than it has, so that sixteen of them do not
// meet in the same lines of a cache.
inline int64_t channel_stride(int64_t size, int64_t lanes) { return 2 * size + 2 * lanes; }

inline int64_t workspace_elements(const LongConvArgs& a, int64_t lanes, bool backward) {
  if (a.direct) {
    const int64_t taps = a.past + a.future;
    return kDirectGroup * (3 * kDirectTokens + 3 * taps + 2 * taps + 64);
  }
  const int64_t buffers = (backward ? 2 : 1) * a.group + a.k_slots + (backward ? a.dk_slots : 0);
  return 2 * lanes * kRunElements + buffers * channel_stride(a.size, lanes);
}

}  // namespace longtrain
