#include "checks.h"

#include <algorithm>
#include <stdexcept>

namespace deepfm {
namespace {

[[noreturn]] void Fail(const std::string& text) { throw std::invalid_argument(text); }

std::string At(const char* name, int64_t i, int64_t split) {
  return std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(split);
}

[[noreturn]] void FailStart(const char* name, int64_t split) {
  Fail(std::string(name) + " must start at 0, got " + At(name, 0, split));
}
[[noreturn]] void FailDecrease(const char* name, int64_t i, int64_t split, int64_t next) {
  Fail(std::string(name) + " must not decrease, got " + At(name, i, split) + " and " + At(name, i + 1, next));
}
[[noreturn]] void FailEnd(const char* name, int64_t last, int64_t split, int64_t total, const char* end) {
  Fail(std::string(name) + " must end at " + end + std::to_string(total) + ", got " + At(name, last, split));
}

constexpr char kRowSplitsEnd[] = "nnz = ";

// Splits of `total` things, that must start at 0 and not decrease.
void CheckSplits(const char* name, const int64_t* splits, int64_t last, int64_t total, const char* end) {
  if (splits[0] != 0) FailStart(name, splits[0]);
  for (int64_t i = 0; i < last; ++i)
    if (splits[i + 1] < splits[i]) FailDecrease(name, i, splits[i], splits[i + 1]);
  if (splits[last] != total) FailEnd(name, last, splits[last], total, end);
}

}  // namespace

std::string TextOf(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + (sizes.size() == 1 ? ",)" : ")");
}

void CheckShape(const char* name, const Sizes& got, const Sizes& want) {
  if (got != want) Fail(std::string(name) + " must have shape " + TextOf(want) + ", got " + TextOf(got));
}

CheckedShape::CheckedShape(TableType type, const Sizes& table, const Sizes& indices, const Sizes* values,
                           const int64_t* row_splits_data, const Sizes* row_splits_sizes,
                           const std::vector<int64_t>* field_splits, bool host_reads) {
  if (table.size() != 2) Fail("table must be rank 2 [V, K], got shape " + TextOf(table));
  shape.num_rows = table[0];
  shape.dim = table[1] - (type == TableType::kInt8 ? kInt8Header : 0);
  if (shape.dim < 0) Fail("a row of uint8 must have at least 6 bytes, got shape " + TextOf(table));
  shape.num_pairs = 1;
  for (int64_t size : indices) shape.num_pairs *= size;
  if (values && *values != indices)
    Fail("values must have the shape of indices, " + TextOf(indices) + ", got " + TextOf(*values));
  if (row_splits_sizes) {
    if (field_splits) Fail("field_splits needs indices of rank 2, not row_splits");
    if (indices.size() != 1) Fail("indices must be rank 1 [nnz] with row_splits, got shape " + TextOf(indices));
    ReadRowSplits(row_splits_data, *row_splits_sizes, host_reads);
    return;
  }
  if (indices.size() != 2)
    Fail("indices must be rank 2 [B, F], or rank 1 with row_splits, got shape " + TextOf(indices));
  shape.num_samples = indices[0];
  shape.pairs_per_sample = indices[1];
  if (field_splits) ReadFieldSplits(*field_splits);
}

void CheckedShape::ReadRowSplits(const int64_t* data, const Sizes& sizes, bool host_reads) {
  if (sizes.size() != 1 || sizes[0] < 1) Fail("row_splits must be rank 1 [B + 1], got shape " + TextOf(sizes));
  ragged = true;
  shape.num_samples = sizes[0] - 1;
  if (!host_reads) return;
  row_splits = Scratch<int64_t>(sizes[0]);
  for (int64_t i = 0; i < sizes[0]; ++i) row_splits[i] = __atomic_load_n(data + i, __ATOMIC_RELAXED);
  CheckSplits("row_splits", row_splits.get(), shape.num_samples, shape.num_pairs, kRowSplitsEnd);
  shape.row_splits = row_splits.get();
}

void CheckedShape::ReadFieldSplits(const std::vector<int64_t>& splits) {
  if (splits.empty()) Fail("field_splits must go from 0 to the number of columns of indices, got none");
  shape.num_fields = static_cast<int64_t>(splits.size()) - 1;
  CheckSplits("field_splits", splits.data(), shape.num_fields, shape.pairs_per_sample, "the columns of indices, ");
  shape.field_splits = splits.data();
}

Sizes CheckedShape::Embeddings() const {
  if (ragged) return {shape.num_pairs, shape.dim};
  return {shape.num_samples, shape.field_splits ? shape.num_fields : shape.pairs_per_sample, shape.dim};
}

void CheckedShape::CheckWeights(const Sizes* weights) const {
  if (shape.dim == 0) Fail("a first order needs a table with at least one column");
  if (weights) CheckShape("weights", *weights, {shape.num_rows, 1});
}

int64_t CheckedShape::NumFieldWeights() const {
  const int64_t fields = shape.field_splits ? shape.num_fields : shape.pairs_per_sample;
  return fields * (fields - 1) / 2;
}

void CheckedShape::CheckInteraction(int64_t order, const Sizes* field_weights) const {
  if (order != 2 && order != 3) Fail("order must be 2 or 3, got " + std::to_string(order));
  if (!field_weights) return;
  if (order != 2) Fail("field_weights need an order of 2, got 3");
  if (ragged) Fail("field_weights need samples of equally many fields, indices [B, F], not row_splits");
  CheckShape("field_weights", *field_weights, {NumFieldWeights()});
}

void CheckedShape::CheckGradient(Output output, const Sizes& sums, const Sizes& d_interaction, const Sizes* embeddings,
                                 const Sizes* d_embeddings, bool by_fields) const {
  CheckShape("sums", sums, {shape.num_samples, shape.dim});
  CheckShape("d_interaction", d_interaction, Interaction(output));
  if (embeddings) CheckShape("embeddings", *embeddings, Embeddings());
  if (d_embeddings) CheckShape("d_embeddings", *d_embeddings, Embeddings());
  if (embeddings || output == Output::kSum) return;
  if (shape.field_splits) Fail("embeddings are needed with field_splits");
  if (by_fields) Fail("embeddings are needed with an order of 3 and with field_weights");
}

void FailRowSplits(int64_t b, int64_t begin, int64_t end, int64_t num_samples) {
  if (b == 0 && begin != 0) FailStart("row_splits", begin);
  if (b == num_samples) FailEnd("row_splits", b, begin, end, kRowSplitsEnd);
  FailDecrease("row_splits", b, begin, end);
}

void CheckIndices(int64_t bad, const void* indices, IndexType type, const Sizes& sizes, int64_t num_rows) {
  if (bad < 0) return;
  const bool narrow = type == IndexType::kInt32;
  FailIndex(bad, narrow ? static_cast<const int32_t*>(indices)[bad] : static_cast<const int64_t*>(indices)[bad], sizes,
            num_rows);
}

void FailIndex(int64_t bad, int64_t index, const Sizes& sizes, int64_t num_rows) {
  std::string where = std::to_string(bad);
  if (sizes.size() == 2) where = std::to_string(bad / sizes[1]) + "," + std::to_string(bad % sizes[1]);
  throw std::out_of_range("indices[" + where + "] = " + std::to_string(index) + " is not in [0, " +
                          std::to_string(num_rows) + ")");
}

}  // namespace deepfm
