// One attention call as plain data: what the Python side hands to the kernels. Axes as in longtrain/ops/attention.
#pragma once
#include <atomic>
#include <cstdint>

namespace longtrain {

enum class DType : int { f64, f32, bf16, f16 };

// [batch, token, head, dim] with strides in elements.
struct Tensor4 {
  char* data = nullptr;
  int64_t batch = 0, token = 0, head = 0, dim = 0;
};

// Fields as in call.py; positions: query i is at i + q_shift, key j at j + k_offset.
struct Document {
  int64_t q_start, q_stop, k_start, k_stop, q_shift, origin;
};

struct AttentionArgs {
  Tensor4 q, k, v, out, dout, dq;    // in `dtype`
  Tensor4 dk, dv;                    // wide
  void* lse = nullptr;               // wide, contiguous [B, T, H]; written by forward, read by backward
  const void* delta = nullptr;       // wide, contiguous [B, T, H]
  const void* sink_logits = nullptr; // wide [H], or null
  DType dtype = DType::f32;
  int64_t B = 0, T = 0, S = 0, H = 0, K = 0, D = 0, Dv = 0;

  bool causal = false;
  int64_t left = -1, right = -1, k_offset = 0, sink_tokens = 0, block = 64, stride = 0;
  double softcap = 0, scale = 1; // softcap 0: none
  double dropout_p = 0;
  uint64_t dropout_seed = 0;
  int64_t head_offset = 0;

  const Document* documents = nullptr;
  const int64_t* first_task = nullptr;     // [documents + 1]: tasks before each document
  const int64_t* first_key_tile = nullptr; // [documents + 1]: key tiles before each document
  int64_t n_documents = 0;
  std::atomic<int64_t>* next_task = nullptr;
  std::atomic<int32_t>* tickets = nullptr; // backward: [B, K, key tiles], how many tasks have added to dK, dV
};

// Queries and keys of a tile: a multiple of every microkernel's rows (12, 6, 4) and of 32 floats. Measured on an EPYC with 1 MB
// of L2 a core, B1 H8 D64 causal: 96 loses 15%, 144 loses 3%, 128 with 8 rows 10% (kernels alone, per second of CPU).
constexpr int kTile = 192;
constexpr int kMaxHeadDim = 256;

// A task is so many query tiles of one head: they share the key tiles that are loaded, and what they add to dK, dV. Measured as
// above (processor seconds, one thread): 2 saves 5% in bf16 at 4K and 8% in float32 at 8K over 1; 3 and 4 save no more.
constexpr int kTilesOfTask = 2;
constexpr int kTaskQueries = kTile * kTilesOfTask;

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t tasks(int64_t n) { return (n + kTaskQueries - 1) / kTaskQueries; }

} // namespace longtrain
