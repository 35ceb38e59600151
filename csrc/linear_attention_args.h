// One linear-attention call as plain data. Axes and formulas as in longtrain/ops/linear_attention/chunked.py.
#pragma once
#include <atomic>
#include <cstdint>

#include "attention_args.h"

namespace longtrain {

constexpr int kChunk = 64;          // tokens worked on as matrices
constexpr int kLinearWidest = 128;  // features of a key or a value

// [batch, token, head, dim] of any dtype, strides in elements. Without data where a call has none.
struct Operand {
  char* data = nullptr;
  int64_t batch = 0, token = 0, head = 0, dim = 0, itemsize = 0;
  DType dtype = DType::f32;

  char* at(int64_t b, int64_t t, int64_t h) const { return data + (b * batch + t * token + h * head) * itemsize; }
};

struct LinearArgs {
  Operand q, k, v, g, beta, dout;        // read; g: log decays
  Operand out, dq, dk, dv, dg, dbeta;    // written
  char* state = nullptr;                 // wide, contiguous [B, H, D, V]: the state, or its adjoint; from one end of the sequence to the other
  char* entries = nullptr;               // wide, contiguous [B, pieces, H, D, V]: written by forward, read by backward
  bool wide = false;                     // arithmetic in float64, else float32
  int features = 0;                      // decays: 0 none, 1 one a head, 2 one a key feature
  int64_t B = 0, T = 0, H = 0, D = 0, V = 0, piece = 1;
  double scale = 1;

  int64_t whole = 0, shared = 0, columns = 0;  // heads that one thread takes, then heads that threads share; columns of a task
  std::atomic<int64_t>* next_task = nullptr;
  std::atomic<int32_t>* done = nullptr;        // [pieces, kinds of tasks], of shared heads
  char *workspace = nullptr, *kept = nullptr;  // LinearBytes; kept: of two pieces [2, shared, chunks]
  int64_t workspace_bytes = 0;                 // of a thread

  int64_t pieces() const { return (T + piece - 1) / piece; }
  int64_t stop_of(int64_t p) const { return T < (p + 1) * piece ? T : (p + 1) * piece; }
  int64_t chunks_of(int64_t p) const { return (stop_of(p) - p * piece + kChunk - 1) / kChunk; }
};

// Workspace of a thread that takes whole heads, of one that does not, and of a chunk of a shared head's piece.
struct LinearBytes {
  int64_t whole, thread, chunk;
};

}  // namespace longtrain
