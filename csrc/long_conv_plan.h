// How a call is cut into pieces: directly, in overlapping pieces or whole, document by document, whichever is estimated to cost least.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "long_conv_args.h"

namespace longtrain {

// Pieces that share a method, a size and the taps that they meet.
struct PieceClass {
  bool direct = false;
  int64_t size = 0, odd = 1, past = 0, future = 0;
  std::vector<std::pair<int64_t, int64_t>> documents;
  std::vector<Piece> pieces;
};

// Of complex numbers: lanes * odd * 2^a, at least `needed`, 2^a at least `lanes`; the smallest.
inline std::pair<int64_t, int64_t> good_size(int64_t needed, int64_t lanes) {
  std::pair<int64_t, int64_t> best{0, 1};
  for (int64_t odd : {1, 3, 5, 7, 9}) {
    int64_t size = lanes * lanes * odd;
    while (size < needed) size *= 2;
    if (best.first == 0 || size < best.first) best = {size, odd};
  }
  return best;
}

struct Planner {
  int64_t B, E, W, lanes, itemsize;
  bool causal;
  std::string method;  // "": the cheapest; else "direct", "pieces" or "whole"

  int64_t past(int64_t length) const { return std::min(causal ? W : (W + 1) / 2, length); }
  int64_t future(int64_t length) const { return causal ? 0 : std::min(W / 2, length - 1); }

  // Cycles of one transform of a channel, its share of reading and writing tokens included; fitted on an EPYC with 1 MB of L2 a
  // core (AVX-512).
  double transform(int64_t size) const {
    const double vectors = double(size) / lanes, bytes = 2. * size * itemsize;
    return vectors * (20 + 5 * std::log2(vectors)) * (bytes > (1 << 19) ? 1.4 : 1);
  }
  // Forward and backward of `count` pieces: transforms of v, y; of v, g, dv; and once k, k, dk.
  double transforms(int64_t size, int64_t count) const { return (5. * B * count + 3) * transform(size); }
  double direct(int64_t length, int64_t taps) const {
    const double waste = double((E + kDirectGroup - 1) / kDirectGroup * kDirectGroup) / E;
    return 3. * B * length * (taps * 0.8 + 8) / lanes * waste;
  }

  // The size of pieces that costs least for one document, and its cost; 0: none is smaller than the whole.
  std::pair<int64_t, double> piece_size(int64_t length, int64_t overlap) const {
    std::pair<int64_t, double> best{0, 0};
    for (int64_t needed = lanes * lanes;; ) {
      const int64_t size = good_size(needed, lanes).first, tokens = 2 * size - overlap;
      if (tokens >= length) return best;
      if (tokens >= std::max<int64_t>(overlap / 4, 1)) {
        const double cost = transforms(size, (length + tokens - 1) / tokens);
        if (best.first == 0 || cost < best.second) best = {size, cost};
      }
      needed = size + 1;
    }
  }

  std::vector<PieceClass> plan(const std::vector<int64_t>& edges) const {
    std::map<std::tuple<bool, bool, int64_t>, PieceClass> classes;
    for (size_t d = 0; d + 1 < edges.size(); ++d) {
      const int64_t start = edges[d], stop = edges[d + 1], length = stop - start;
      if (length <= 0) continue;
      const int64_t p = past(length), f = future(length), overlap = p + f - 1;
      const auto [whole, odd] = good_size((length + std::max(p - 1, f) + 1) / 2, lanes);
      const auto [piece, piece_cost] = piece_size(length, overlap);
      const double whole_cost = transforms(whole, 1);
      std::string chosen = method;
      if (chosen.empty()) {
        chosen = piece != 0 && piece_cost < whole_cost ? "pieces" : "whole";
        if (direct(length, p + f) < std::min(whole_cost, piece != 0 ? piece_cost : whole_cost)) chosen = "direct";
      }
      if (chosen == "pieces" && piece == 0) chosen = "whole";
      const bool is_direct = chosen == "direct", is_whole = chosen == "whole";
      const int64_t size = is_direct ? std::bit_ceil(uint64_t(p)) : is_whole ? whole : piece;
      PieceClass& c = classes[{is_direct, is_whole, size}];
      c.direct = is_direct;
      c.size = is_direct ? 0 : size;
      c.odd = is_direct ? 1 : good_size(size, lanes).second;
      c.past = std::max(c.past, p), c.future = std::max(c.future, f);
      if (is_whole) {
        c.pieces.push_back({start, stop, start, stop, start, start, stop, start});
        continue;
      }
      c.documents.emplace_back(start, stop);
    }
    std::vector<PieceClass> found;
    for (auto& [key, c] : classes) {
      // The class has the taps that any of its documents meets, and every one of its transforms takes all of them: so many tokens of a piece
      // are free of what wraps around. At least one: the longest document has the most taps, and this size was chosen for it.
      const int64_t tokens = c.direct ? kDirectTokens : 2 * c.size - (c.past + c.future - 1);
      for (const auto& [start, stop] : c.documents)
        for (int64_t o = start; o < stop; o += tokens) {
          const int64_t end = std::min(o + tokens, stop), v_frame = o - (c.past - 1), g_frame = o - c.future;
          c.pieces.push_back({o, end, std::max(start, v_frame), std::min(stop, end + c.future), v_frame,
                              std::max(start, g_frame), std::min(stop, end + c.past - 1), g_frame});
        }
      found.push_back(std::move(c));
    }
    return found;
  }
};

}  // namespace longtrain
