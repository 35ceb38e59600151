// Torch's side of the attention kernels: tensors to AttentionArgs, choice of instruction set, torch's thread pool.
// Arguments were checked in Python (longtrain/ops/attention/call.py); here only what memory safety needs.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "attention_args.h"
#include "dtype.h"
#include "instruction_sets.h"

namespace longtrain {

#if defined(LT_X86)
namespace avx512bf16 {
void attention_worker(const AttentionArgs& args, bool backward);
}
namespace avx512 {
void attention_worker(const AttentionArgs& args, bool backward);
}
namespace avx2 {
void attention_worker(const AttentionArgs& args, bool backward);
}
#endif
namespace generic {
void attention_worker(const AttentionArgs& args, bool backward);
}

namespace {

using Worker = void (*)(const AttentionArgs&, bool);

// Those that this processor runs for `dtype`.
InstructionSets<Worker> available(at::ScalarType dtype) {
  InstructionSets<Worker> sets;
#if defined(LT_X86)
  if (dtype == at::kBFloat16) sets.emplace_back("avx512bf16", avx512bf16::attention_worker);
  sets.emplace_back("avx512", avx512::attention_worker);
  sets.emplace_back("avx2", avx2::attention_worker);
#endif
  sets.emplace_back("generic", generic::attention_worker);
  return runnable(std::move(sets));
}

Tensor4 view_of(const at::Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.scalar_type() == dtype && x.sizes() == shape, "attention: found a ",
                    x.scalar_type(), " tensor of shape ", x.sizes(), " on ", x.device(), ", expected ", dtype, " ",
                    shape, " on the CPU");
  return {static_cast<char*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The call's arguments with the arrays they point to.
struct Prepared {
  AttentionArgs args;
  std::vector<Document> documents;
  std::vector<int64_t> first_task, first_key_tile;
  std::atomic<int64_t> next_task{0};
  std::unique_ptr<std::atomic<int32_t>[]> tickets;
};

void prepare(Prepared& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& documents,
             bool causal, int64_t left, int64_t right, int64_t k_offset, int64_t sink_tokens, int64_t block,
             int64_t stride, double softcap, double scale, double dropout_p, int64_t dropout_seed,
             int64_t head_offset) {
  AttentionArgs& a = p.args;
  a.B = q.size(0), a.T = q.size(1), a.H = q.size(2), a.D = q.size(3);
  a.S = k.size(1), a.K = k.size(2), a.Dv = v.size(3);
  TORCH_CHECK_VALUE(a.K > 0 && a.H % a.K == 0 && std::max(a.D, a.Dv) <= kMaxHeadDim,
                    "attention: heads or head dim out of range");
  const auto dtype = q.scalar_type();
  a.q = view_of(q, {a.B, a.T, a.H, a.D}, dtype);
  a.k = view_of(k, {a.B, a.S, a.K, a.D}, dtype);
  a.v = view_of(v, {a.B, a.S, a.K, a.Dv}, dtype);
  a.dtype = dtype_of("attention", q);
  a.causal = causal, a.left = left, a.right = right, a.k_offset = k_offset, a.sink_tokens = sink_tokens;
  a.block = block, a.stride = stride, a.softcap = softcap, a.scale = scale;
  a.dropout_p = dropout_p, a.dropout_seed = static_cast<uint64_t>(dropout_seed), a.head_offset = head_offset;
  const int64_t n = documents.size(0);
  const int64_t* rows = documents.const_data_ptr<int64_t>();
  p.first_task.push_back(0);
  p.first_key_tile.push_back(0);
  for (int64_t i = 0; i < n; ++i, rows += 6) {
    const Document d{rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]};
    TORCH_CHECK_VALUE(0 <= d.q_start && d.q_start <= d.q_stop && d.q_stop <= a.T && 0 <= d.k_start &&
                          d.k_start <= d.k_stop && d.k_stop <= a.S,
                      "attention: document ", i, " lies outside the tensors");
    p.documents.push_back(d);
    p.first_task.push_back(p.first_task.back() + tasks(d.q_stop - d.q_start) * a.B * a.H);
    p.first_key_tile.push_back(p.first_key_tile.back() + tiles(d.k_stop - d.k_start));
  }
  a.documents = p.documents.data(), a.n_documents = n;
  a.first_task = p.first_task.data(), a.first_key_tile = p.first_key_tile.data();
  a.next_task = &p.next_task;
}

void run(const Prepared& p, bool backward, const std::string& instruction_set, at::ScalarType dtype) {
  const Worker worker = kernels_of("attention", available(dtype), instruction_set);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), p.first_task.back());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { worker(p.args, backward); });
}

std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& sink_logits,
    const at::Tensor& documents, bool causal, int64_t left, int64_t right, int64_t k_offset, int64_t sink_tokens,
    int64_t block, int64_t stride, double softcap, double scale, double dropout_p, int64_t dropout_seed,
    int64_t head_offset, std::string instruction_set) {
  Prepared p;
  prepare(p, q, k, v, documents, causal, left, right, k_offset, sink_tokens, block, stride, softcap, scale, dropout_p,
          dropout_seed, head_offset);
  AttentionArgs& a = p.args;
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = at::empty({a.B, a.T, a.H, a.Dv}, q.options());
  at::Tensor lse = at::empty({a.B, a.T, a.H}, q.options().dtype(wide));
  a.out = view_of(out, {a.B, a.T, a.H, a.Dv}, q.scalar_type());
  a.lse = lse.data_ptr();
  at::Tensor sinks;
  if (sink_logits.has_value()) {
    sinks = sink_logits->to(wide).contiguous();
    a.sink_logits = sinks.const_data_ptr();
  }
  run(p, false, instruction_set, q.scalar_type());
  return {out, lse};
}

at::Tensor attention_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& lse, const at::Tensor& delta, at::Tensor dk, at::Tensor dv,
                              const at::Tensor& documents, bool causal, int64_t left, int64_t right, int64_t k_offset,
                              int64_t sink_tokens, int64_t block, int64_t stride, double softcap, double scale,
                              double dropout_p, int64_t dropout_seed, int64_t head_offset,
                              std::string instruction_set) {
  Prepared p;
  prepare(p, q, k, v, documents, causal, left, right, k_offset, sink_tokens, block, stride, softcap, scale, dropout_p,
          dropout_seed, head_offset);
  AttentionArgs& a = p.args;
  const auto dtype = q.scalar_type(), wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor dq = at::empty({a.B, a.T, a.H, a.D}, q.options());
  const at::Tensor lse_ = lse.contiguous(), delta_ = delta.contiguous();
  for (const at::Tensor& x : {lse_, delta_})
    TORCH_CHECK_VALUE(x.scalar_type() == wide && x.sizes() == at::IntArrayRef({a.B, a.T, a.H}),
                      "attention: lse or delta: found shape ", x.sizes());
  a.lse = lse_.data_ptr(), a.delta = delta_.const_data_ptr();
  a.dout = view_of(dout, {a.B, a.T, a.H, a.Dv}, dtype);
  a.dq = view_of(dq, {a.B, a.T, a.H, a.D}, dtype);
  a.dk = view_of(dk, {a.B, a.S, a.K, a.D}, wide);
  a.dv = view_of(dv, {a.B, a.S, a.K, a.Dv}, wide);
  p.tickets = std::make_unique<std::atomic<int32_t>[]>(a.B * a.K * p.first_key_tile.back());
  a.tickets = p.tickets.get();
  run(p, true, instruction_set, dtype);
  return dq;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(longtrain, m) {
  const std::string mask =
      "Tensor documents, bool causal, int left, int right, int k_offset, int sink_tokens, int block, int stride, "
      "float softcap, float scale, float dropout_p, int dropout_seed, int head_offset, str instruction_set";
  m.def("_attention_instruction_sets(ScalarType dtype) -> str[]", [](at::ScalarType dtype) { return names_of(available(dtype)); });
  const std::string forward =
      "_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? sink_logits, " + mask + ") -> (Tensor, Tensor)";
  const std::string backward =
      "_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor delta, Tensor(a!) dk, "
      "Tensor(b!) dv, " + mask + ") -> Tensor";
  m.def(forward.c_str());
  m.def(backward.c_str());
}

TORCH_LIBRARY_IMPL(longtrain, CPU, m) {
  m.impl("_attention_forward", attention_forward);
  m.impl("_attention_backward", attention_backward);
}

} // namespace longtrain
