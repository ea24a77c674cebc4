// Where the unique rows of a batch lie in a table that is split: row r is row r / parts of part r % parts.
#ifndef DEEPFM_KERNELS_SPLIT_H_
#define DEEPFM_KERNELS_SPLIT_H_

#include <cstdint>
#include <vector>

#include "row_groups.h"

namespace deepfm {

// How many of the rows lie in each part, [parts].
std::vector<int64_t> CountOfParts(const RowGroups& groups, int64_t parts);

// local[p]: the rows of part p, by their numbers there, ascending; as many as were counted.
// positions: for each pair, the place of its row where those of part 0 come first, then those of part 1, and so on.
// I: int32_t, which the rows of every part must fit, or int64_t.
template <typename I>
void SplitRows(const RowGroups& groups, const std::vector<int64_t>& counts, const std::vector<I*>& local,
               int64_t* positions, const Parallel& parallel);

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_SPLIT_H_
