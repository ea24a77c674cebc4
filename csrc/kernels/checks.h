// What must hold of a call's arrays before the kernels may run, in one place for every binding. A binding says what
// shapes it was given; whoever breaks a rule gets std::invalid_argument, an index out of range std::out_of_range.
#ifndef DEEPFM_KERNELS_CHECKS_H_
#define DEEPFM_KERNELS_CHECKS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "fm.h"
#include "scratch.h"

namespace deepfm {

typedef std::vector<int64_t> Sizes;  // of an array's axes

std::string TextOf(const Sizes& sizes);  // "(7, 4)", as Python writes it

void CheckShape(const char* name, const Sizes& got, const Sizes& want);

// The shape of a call, and its splits: copied, because their owner may change them at any time.
struct CheckedShape {
  FmShape shape;
  Scratch<int64_t> row_splits;

  // Arguments as their owners describe them:
  //   table [V, K] (of a kInt8 table, V rows of bytes), indices [B, P] or [n], values likewise or null
  //   row_splits, whose data may be null if they are empty; without any, their sizes are null
  //   field_splits or null; they must outlive this
  CheckedShape(TableType type, const Sizes& table, const Sizes& indices, const Sizes* values,
               const int64_t* row_splits_data, const Sizes* row_splits_sizes, const std::vector<int64_t>* field_splits);

  Sizes Interaction(Output output) const { return {shape.num_samples, output == Output::kScalar ? 1 : shape.dim}; }
  Sizes Embeddings() const;
  // What else the two kernels need; null is what was not given.
  void CheckWeights(const Sizes* weights) const;
  void CheckGradient(Output output, const Sizes& sums, const Sizes& d_interaction, const Sizes* embeddings,
                     const Sizes* d_embeddings) const;

 private:
  void ReadRowSplits(const int64_t* data, const Sizes& sizes);
  void ReadFieldSplits(const std::vector<int64_t>& splits);
};

// Does nothing for a `bad` of -1, else says that indices[bad] is out of range.
void CheckIndices(int64_t bad, const void* indices, IndexType type, const Sizes& sizes, int64_t num_rows);

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_CHECKS_H_
