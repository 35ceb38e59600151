// Kernels by instruction set, as setup.py compiled them (INSTRUCTION_SETS): which this processor runs, and the one that a call names.
#pragma once
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <string>
#include <utility>
#include <vector>

namespace longtrain {

inline bool processor_runs(const std::string& name) {
#if defined(LT_X86)
  const bool both = __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  const bool avx512 = both && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (name == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "avx512") return avx512;
  if (name == "avx2") return both && __builtin_cpu_supports("avx2");
#endif
  return name == "generic";
}

// What the sources of an op offer in each instruction set, by its name, best first.
template <class Kernels> using InstructionSets = std::vector<std::pair<std::string, Kernels>>;

template <class Kernels> InstructionSets<Kernels> runnable(InstructionSets<Kernels> sets) {
  std::erase_if(sets, [](const auto& set) { return !processor_runs(set.first); });
  return sets;
}

template <class Kernels> std::vector<std::string> names_of(const InstructionSets<Kernels>& sets) {
  std::vector<std::string> names;
  for (const auto& set : sets) names.push_back(set.first);
  return names;
}

// The kernels of that name, the best ones where it is empty.
template <class Kernels> Kernels kernels_of(const char* op, const InstructionSets<Kernels>& sets, const std::string& name) {
  for (const auto& [candidate, kernels] : sets)
    if (name.empty() || name == candidate) return kernels;
  TORCH_CHECK_VALUE(false, op, ": instruction set: found ", name, ", expected one of ", c10::Join(", ", names_of(sets)));
}

}  // namespace longtrain
