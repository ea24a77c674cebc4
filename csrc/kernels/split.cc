#include "split.h"

#include <cstring>

namespace deepfm {

std::vector<int64_t> CountOfParts(const RowGroups& groups, int64_t parts) {
  std::vector<int64_t> counts(parts, 0);
  for (int64_t u = 0; u < groups.size(); ++u) ++counts[groups.rows()[u] % parts];
  return counts;
}

template <typename I>
void SplitRows(const RowGroups& groups, const std::vector<int64_t>& counts, const std::vector<I*>& local,
               int64_t* positions, const Parallel& parallel) {
  const int64_t parts = counts.size();
  std::vector<int64_t> start(parts, 0), filled(parts, 0);
  for (int64_t part = 1; part < parts; ++part) start[part] = start[part - 1] + counts[part - 1];
  Scratch<int64_t> place(groups.size());
  for (int64_t u = 0; u < groups.size(); ++u) {
    const int64_t row = groups.rows()[u], part = row % parts;
    place[u] = start[part] + filled[part];
    local[part][filled[part]++] = static_cast<I>(row / parts);
  }
  const PairPositions pairs = groups.positions();
  parallel.For(groups.size(), 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      for (int64_t j = groups.starts()[u]; j < groups.starts()[u + 1]; ++j) {
        uint64_t word;
        std::memcpy(&word, pairs.base + j * pairs.stride, sizeof(word));
        positions[word & pairs.mask] = place[u];
      }
    }
  });
}

template void SplitRows(const RowGroups&, const std::vector<int64_t>&, const std::vector<int32_t*>&, int64_t*,
                        const Parallel&);
template void SplitRows(const RowGroups&, const std::vector<int64_t>&, const std::vector<int64_t*>&, int64_t*,
                        const Parallel&);

}  // namespace deepfm
