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
  bool ragged = false;

  // Arguments as their owners describe them:
  //   table [V, K] (of a kInt8 table, V rows of bytes), indices [B, P] or [n], values likewise or null
  //   row_splits, whose data may be null if they are empty; without any, their sizes are null. Those that the host
  //   cannot read are not looked into: shape.row_splits stays null, and the kernel checks them
  //   field_splits or null; they must outlive this
  CheckedShape(TableType type, const Sizes& table, const Sizes& indices, const Sizes* values,
               const int64_t* row_splits_data, const Sizes* row_splits_sizes, const std::vector<int64_t>* field_splits,
               bool host_reads = true);

  Sizes Interaction(Output output) const { return {shape.num_samples, output == Output::kScalar ? 1 : shape.dim}; }
  Sizes Embeddings() const;
  // What else the two kernels need; null is what was not given.
  void CheckWeights(const Sizes* weights) const;
  void CheckInteraction(int64_t order, const Sizes* field_weights) const;
  void CheckGradient(Output output, const Sizes& sums, const Sizes& d_interaction, const Sizes* embeddings,
                     const Sizes* d_embeddings, bool by_fields) const;
  int64_t NumFieldWeights() const;

 private:
  void ReadRowSplits(const int64_t* data, const Sizes& sizes, bool host_reads);
  void ReadFieldSplits(const std::vector<int64_t>& splits);
};

// Throws what row_splits [B+1] are for whom `b` is the first sample with row_splits[b] = begin > end = row_splits[b+1],
// or 0 and begin is not 0, or B, begin = row_splits[B] and end is what it must be.
[[noreturn]] void FailRowSplits(int64_t b, int64_t begin, int64_t end, int64_t num_samples);

// Does nothing for a `bad` of -1, else says that indices[bad] is out of range.
void CheckIndices(int64_t bad, const void* indices, IndexType type, const Sizes& sizes, int64_t num_rows);

// Throws that indices[bad] = index is out of range.
[[noreturn]] void FailIndex(int64_t bad, int64_t index, const Sizes& sizes, int64_t num_rows);

}  // namespace deepfm

#endif  // DEEPFM_KERNELS_CHECKS_H_
