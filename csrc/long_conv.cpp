// Torch's side of the long-convolution kernels: tensors to LongConvArgs, the plan, workspace, torch's thread pool.
// Arguments were checked in Python (longtrain/ops/long_conv/call.py); here only what memory safety needs.
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
#include "long_conv_args.h"
#include "long_conv_plan.h"
#include "long_conv_tables.h"

namespace longtrain {

#if defined(LT_X86)
namespace avx512 {
void long_conv_worker(const LongConvArgs& args, bool backward, int thread);
int long_conv_lanes(bool wide);
}
namespace avx2 {
void long_conv_worker(const LongConvArgs& args, bool backward, int thread);
int long_conv_lanes(bool wide);
}
#endif
namespace generic {
void long_conv_worker(const LongConvArgs& args, bool backward, int thread);
int long_conv_lanes(bool wide);
}

namespace {

using Optional = std::optional<at::Tensor>;

struct Kernels {
  void (*worker)(const LongConvArgs&, bool, int);
  int (*lanes)(bool);
};

InstructionSets<Kernels> available() {
  return runnable<Kernels>({
#if defined(LT_X86)
      {"avx512", {avx512::long_conv_worker, avx512::long_conv_lanes}},
      {"avx2", {avx2::long_conv_worker, avx2::long_conv_lanes}},
#endif
      {"generic", {generic::long_conv_worker, generic::long_conv_lanes}},
  });
}

void check(const at::Tensor& x, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.device().is_cpu() && x.scalar_type() == dtype && x.sizes() == shape && (x.stride(-1) == 1 || x.size(-1) <= 1),
                    "long_conv: found a ", x.scalar_type(), " tensor of shape ", x.sizes(), " on ", x.device(), ", expected ", dtype,
                    " ", shape,
                    " on the CPU, channels side by side");
}

Rows rows_of(const Optional& x, at::IntArrayRef shape, at::ScalarType dtype) {
  if (!x.has_value()) return {};
  check(*x, shape, dtype);
  const int64_t size = x->element_size();
  return {static_cast<char*>(x->data_ptr()), x->stride(0) * size, x->stride(1) * size};
}

void* vector_of(const Optional& x, at::IntArrayRef shape, at::ScalarType dtype) {
  if (!x.has_value()) return nullptr;
  check(*x, shape, dtype);
  TORCH_CHECK_VALUE(x->is_contiguous(), "long_conv: expected a contiguous tensor");
  return x->data_ptr();
}

struct Inputs {
  const at::Tensor &u, &k;
  const Optional&skip, &gate_in, &gate_out;
  at::IntArrayRef edges;
  bool causal;

  at::IntArrayRef shape() const { return u.sizes(); }
  at::ScalarType dtype() const { return u.scalar_type(); }
  at::ScalarType wide() const { return dtype() == at::kDouble ? at::kDouble : at::kFloat; }

  LongConvArgs args() const {
    LongConvArgs a;
    TORCH_CHECK_VALUE(u.dim() == 3 && u.numel() > 0 && k.dim() == 2 && k.size(0) > 0 && k.size(1) > 0 && u.size(2) % k.size(0) == 0 &&
                          k.is_cpu() && (k.stride(1) == 1 || k.size(1) == 1),
                      "long_conv: u or k: found shapes ", u.sizes(), " and ", k.sizes());
    TORCH_CHECK_VALUE(edges.size() >= 2 && edges.front() == 0 && edges.back() == u.size(1) && std::is_sorted(edges.begin(), edges.end()),
                      "long_conv: edges: expected them to ascend from 0 to ", u.size(1));
    a.dtype = dtype_of("long_conv", u), a.k_dtype = dtype_of("long_conv", k);
    a.B = u.size(0), a.E = u.size(2), a.W = k.size(1), a.share = a.E / k.size(0);
    a.u = rows_of(u, shape(), dtype()), a.gate_in = rows_of(gate_in, shape(), dtype()), a.gate_out = rows_of(gate_out, shape(), dtype());
    a.k = static_cast<const char*>(k.const_data_ptr()), a.k_row = k.stride(0) * k.element_size();
    a.skip = vector_of(skip, {a.E}, wide());
    return a;
  }
};

// Channels at a time: whole cache lines, but groups for some cores, and the buffers of a long sequence within a few megabytes.
int64_t group_of(int64_t E, int64_t size, int64_t itemsize) {
  int64_t group = E >= 256 ? 16 : E >= 32 ? 8 : 4;
  while (group > 4 && group * 2 * size * itemsize > (8 << 20)) group /= 2;
  return group;
}

template <class T> void run(LongConvArgs& a, const Inputs& in, bool backward, const Kernels& isa, const std::string& method) {
  const int64_t lanes = isa.lanes(sizeof(T) == 8), filters = a.E / a.share;
  std::atomic<int64_t> bad_row{-1};
  a.bad_row = &bad_row, a.first = true;
  const Planner planner{a.B, a.E, a.W, lanes, int64_t(sizeof(T)), in.causal, method};
  const auto classes = planner.plan(in.edges.vec());
  for (const PieceClass& c : classes) {
    a.direct = c.direct, a.size = c.size, a.odd = c.odd, a.past = c.past, a.future = c.future;
    a.pieces = c.pieces.data(), a.n_pieces = int64_t(c.pieces.size());
    a.group = c.direct ? kDirectGroup : group_of(a.E, c.size, sizeof(T));
    const int64_t in_group = a.share == 1 ? a.group : std::min(a.group, (a.group + a.share - 2) / a.share + 1), items = a.B * a.n_pieces;
    const bool again = items > 1 || (a.dgate_out.data && a.group * 2 * c.size * int64_t(sizeof(T)) <= (4 << 20));
    a.k_slots = again ? in_group : 1;
    a.dk_slots = !a.dk ? 0 : items > 1 ? in_group : a.share > 1 ? 1 : 0;
    std::optional<TransformTables<T>> tables;
    if (!c.direct) a.tables = tables.emplace(c.size, c.odd, lanes).view();
    const auto tickets = std::make_unique<std::atomic<int32_t>[]>(filters);
    std::atomic<int64_t> next_group{0};
    a.tickets = tickets.get(), a.next_group = &next_group;
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), (a.E + a.group - 1) / a.group);
    a.workspace_bytes = (workspace_elements(a, lanes, backward) * int64_t(sizeof(T)) + 127) / 64 * 64;
    const at::Tensor workspace = at::empty({threads * a.workspace_bytes}, at::kByte);
    a.workspace = static_cast<char*>(workspace.data_ptr());
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) { isa.worker(a, backward, int(begin)); });
    a.first = false;
  }
  TORCH_CHECK_VALUE(bad_row < 0, "long_conv: k: found a tap in row ", bad_row.load(), " that is not finite, expected finite taps");
}

void run(LongConvArgs& a, const Inputs& in, bool backward, const std::string& isa, const std::string& method) {
  const Kernels kernels = kernels_of("long_conv", available(), isa);
  in.wide() == at::kDouble ? run<double>(a, in, backward, kernels, method) : run<float>(a, in, backward, kernels, method);
}

void long_conv_forward(const at::Tensor& u, const at::Tensor& k, const Optional& skip, const Optional& gate_in, const Optional& gate_out,
                       at::IntArrayRef edges, bool causal, at::Tensor y, std::string isa, std::string method) {
  const Inputs in{u, k, skip, gate_in, gate_out, edges, causal};
  LongConvArgs a = in.args();
  a.y = rows_of(y, in.shape(), in.dtype());
  run(a, in, false, isa, method);
}

void long_conv_backward(const at::Tensor& dy, const at::Tensor& u, const at::Tensor& k, const Optional& skip, const Optional& gate_in,
                        const Optional& gate_out, at::IntArrayRef edges, bool causal, Optional du, Optional dk, Optional dskip,
                        Optional dgate_in, Optional dgate_out, std::string isa, std::string method) {
  const Inputs in{u, k, skip, gate_in, gate_out, edges, causal};
  LongConvArgs a = in.args();
  a.dy = rows_of(dy, in.shape(), in.dtype());
  a.du = rows_of(du, in.shape(), in.dtype());
  a.dgate_in = rows_of(dgate_in, in.shape(), in.dtype()), a.dgate_out = rows_of(dgate_out, in.shape(), in.dtype());
  a.dk = vector_of(dk, k.sizes(), in.wide()), a.dskip = vector_of(dskip, {a.E}, in.wide());
  run(a, in, true, isa, method);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(longtrain, m) {
  m.def("_long_conv_instruction_sets() -> str[]", [] { return names_of(available()); });
  const std::string inputs = "Tensor u, Tensor k, Tensor? skip, Tensor? gate_in, Tensor? gate_out, int[] edges, bool causal, ";
  m.def(("_long_conv_forward(" + inputs + "Tensor(a!) y, str instruction_set, str method) -> ()").c_str());
  m.def(("_long_conv_backward(Tensor dy, " + inputs +
         "Tensor(a!)? du, Tensor(b!)? dk, Tensor(c!)? dskip, Tensor(d!)? dgate_in, Tensor(e!)? dgate_out, "
         "str instruction_set, str method) -> ()")
            .c_str());
}

TORCH_LIBRARY_IMPL(longtrain, CPU, m) {
  m.impl("_long_conv_forward", long_conv_forward);
  m.impl("_long_conv_backward", long_conv_backward);
}

}  // namespace longtrain
