// Torch's side of the linear-attention kernels: tensors to LinearArgs, workspace, torch's thread pool. Arguments were checked in Python
// (longtrain/ops/linear_attention/call.py); here only what memory safety needs.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dtype.h"
#include "instruction_sets.h"
#include "linear_attention_args.h"

namespace longtrain {

#if defined(LT_X86)
namespace avx512 {
void linear_worker(const LinearArgs& args, bool backward, int thread);
LinearBytes linear_workspace(const LinearArgs& args);
}
namespace avx2 {
void linear_worker(const LinearArgs& args, bool backward, int thread);
LinearBytes linear_workspace(const LinearArgs& args);
}
#endif
namespace generic {
void linear_worker(const LinearArgs& args, bool backward, int thread);
LinearBytes linear_workspace(const LinearArgs& args);
}

namespace {

using Optional = std::optional<at::Tensor>;

struct Kernels {
  void (*worker)(const LinearArgs&, bool, int);
  LinearBytes (*workspace)(const LinearArgs&);
};

InstructionSets<Kernels> available() {
  return runnable<Kernels>({
#if defined(LT_X86)
      {"avx512", {avx512::linear_worker, avx512::linear_workspace}},
      {"avx2", {avx2::linear_worker, avx2::linear_workspace}},
#endif
      {"generic", {generic::linear_worker, generic::linear_workspace}},
  });
}

void expect(const at::Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(x.is_cpu() && x.sizes() == shape, "linear_attention: found a tensor of shape ", x.sizes(), " on ", x.device(), ", expected ",
                    shape, " on the CPU");
}

// [B, T, H, dims], or [B, T, H].
Operand operand(const Optional& x, at::IntArrayRef shape) {
  Operand found;
  if (!x.has_value()) return found;
  expect(*x, shape);
  found.data = static_cast<char*>(x->data_ptr()), found.dtype = dtype_of("linear_attention", *x), found.itemsize = x->element_size();
  found.batch = x->stride(0), found.token = x->stride(1), found.head = x->stride(2), found.dim = shape.size() == 4 ? x->stride(3) : 1;
  return found;
}

char* wide_data(const at::Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) {
  expect(x, shape);
  TORCH_CHECK_VALUE(x.is_contiguous() && x.scalar_type() == dtype, "linear_attention: found a ", x.scalar_type(), " state, expected ", dtype,
                    ", contiguous");
  return static_cast<char*>(x.data_ptr());
}

struct Inputs {
  const at::Tensor &q, &k, &v;
  const Optional &g, &beta;
  double scale;
  int64_t piece;

  LinearArgs args(const at::Tensor& state, const at::Tensor& entries) const {
    LinearArgs a;
    TORCH_CHECK_VALUE(q.dim() == 4 && v.dim() == 4 && q.numel() > 0 && v.numel() > 0 && piece > 0 && q.size(3) <= kLinearWidest &&
                          v.size(3) <= kLinearWidest,
                      "linear_attention: q or v: found shapes ", q.sizes(), " and ", v.sizes());
    a.B = q.size(0), a.T = q.size(1), a.H = q.size(2), a.D = q.size(3), a.V = v.size(3), a.scale = scale, a.piece = piece;
    a.q = operand(q, q.sizes()), a.k = operand(k, q.sizes()), a.v = operand(v, values());
    a.features = !g.has_value() ? 0 : g->size(-1) == 1 ? 1 : 2;
    a.g = operand(g, decays(a.features));
    a.beta = operand(beta, rates());
    const at::ScalarType wide = state.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    a.wide = wide == at::kDouble;
    a.state = wide_data(state, {a.B, a.H, a.D, a.V}, wide);
    a.entries = wide_data(entries, {a.B, a.pieces(), a.H, a.D, a.V}, wide);
    return a;
  }
  std::vector<int64_t> values() const { return {q.size(0), q.size(1), q.size(2), v.size(3)}; }
  std::vector<int64_t> rates() const { return {q.size(0), q.size(1), q.size(2)}; }
  std::vector<int64_t> decays(int features) const { return {q.size(0), q.size(1), q.size(2), features == 2 ? q.size(3) : 1}; }
};

// Heads are taken whole while there is one for every thread; those that are left are shared, unless sequences are short. Results are the same.
constexpr int64_t kSharedTokens = 4 * kChunk;

void run(LinearArgs a, bool backward, const std::string& name) {
  const Kernels kernels = kernels_of("linear_attention", available(), name);
  const int64_t heads = a.B * a.H, threads = at::get_num_threads(), vectors = (a.V + 15) / 16;
  a.shared = a.T < kSharedTokens ? 0 : heads % threads, a.whole = heads - a.shared;
  const int64_t parts = a.shared ? std::min(vectors, (threads + a.shared - 1) / a.shared) : 1;
  a.columns = (vectors + parts - 1) / parts * 16;
  const int64_t workers = a.shared ? threads : std::min(threads, heads);
  const int64_t kept = std::min<int64_t>(2, a.pieces()) * a.shared * a.chunks_of(0);
  const LinearBytes bytes = kernels.workspace(a);
  a.workspace_bytes = a.whole ? bytes.whole : bytes.thread;
  const at::Tensor workspace = at::empty({workers * a.workspace_bytes + kept * bytes.chunk}, at::kByte);
  a.workspace = static_cast<char*>(workspace.data_ptr()), a.kept = a.workspace + workers * a.workspace_bytes;
  const auto done = std::make_unique<std::atomic<int32_t>[]>(a.shared ? a.pieces() * 3 : 0);
  std::atomic<int64_t> next_task{0};
  a.done = done.get(), a.next_task = &next_task;
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t) { kernels.worker(a, backward, int(begin)); });
}

void linear_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& g, const Optional& beta, double scale,
                    int64_t piece, at::Tensor out, at::Tensor state, at::Tensor entries, std::string isa) {
  const Inputs in{q, k, v, g, beta, scale, piece};
  LinearArgs a = in.args(state, entries);
  a.out = operand(out, in.values());
  run(a, false, isa);
}

void linear_backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Optional& g, const Optional& beta, double scale,
                     int64_t piece, const at::Tensor& dout, const at::Tensor& entries, at::Tensor dstate, at::Tensor dq, at::Tensor dk,
                     at::Tensor dv, Optional dg, Optional dbeta, std::string isa) {
  const Inputs in{q, k, v, g, beta, scale, piece};
  LinearArgs a = in.args(dstate, entries);
  a.dout = operand(dout, in.values()), a.dq = operand(dq, q.sizes()), a.dk = operand(dk, q.sizes()), a.dv = operand(dv, in.values());
  a.dg = operand(dg, in.decays(a.features)), a.dbeta = operand(dbeta, in.rates());
  TORCH_CHECK_VALUE(a.beta.data == nullptr || a.dbeta.data != nullptr, "linear_attention: dbeta is missing");
  run(a, true, isa);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(longtrain, m) {
  m.def("_linear_attention_instruction_sets() -> str[]", [] { return names_of(available()); });
  const std::string inputs = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, float scale, int piece, ";
  m.def(("_linear_attention_forward(" + inputs + "Tensor(a!) out, Tensor(b!) state, Tensor(c!) entries, str instruction_set) -> ()").c_str());
  m.def(("_linear_attention_backward(" + inputs +
         "Tensor dout, Tensor entries, Tensor(a!) dstate, Tensor(b!) dq, Tensor(c!) dk, Tensor(d!) dv, Tensor(e!)? dg, Tensor(f!)? dbeta, "
         "str instruction_set) -> ()")
            .c_str());
}

TORCH_LIBRARY_IMPL(longtrain, CPU, m) {
  m.impl("_linear_attention_forward", linear_forward);
  m.impl("_linear_attention_backward", linear_backward);
}

}  // namespace longtrain
