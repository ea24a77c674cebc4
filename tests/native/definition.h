// The forward of csrc/kernels/fm.h in double, by its definition, and what a kernel gave held against it.
#ifndef DEEPFM_TESTS_DEFINITION_H_
#define DEEPFM_TESTS_DEFINITION_H_

#include <vector>

#include "../../csrc/kernels/fm.h"
#include "fuzz.h"

namespace deepfm {

struct Definition {
  // value(p) of pair p, element(p, k) of its row.
  template <typename Value, typename Element>
  Definition(const FmShape& of, const Value& value, const Element& element)
      : shape(of),
        fields(of.field_splits ? of.num_fields : of.pairs_per_sample),
        e((of.row_splits ? of.num_pairs : of.num_samples * fields) * of.dim),
        s(of.num_samples * of.dim),
        q(of.num_samples * of.dim),
        x(of.num_pairs),
        sample(of.num_pairs) {
    const int64_t K = shape.dim;
    for (int64_t b = 0; b < shape.num_samples; ++b) {
      for (int64_t p = Begin(b); p < Begin(b + 1); ++p) {
        sample[p] = b;
        x[p] = value(p);
        for (int64_t k = 0; k < K; ++k) e[FieldOf(p) * K + k] += x[p] * element(p, k);
      }
      const int64_t from = shape.row_splits ? Begin(b) : b * fields,
                    to = shape.row_splits ? Begin(b + 1) : from + fields;
      for (int64_t i = from; i < to; ++i) {
        for (int64_t k = 0; k < K; ++k) {
          s[b * K + k] += e[i * K + k];
          q[b * K + k] += e[i * K + k] * e[i * K + k];
        }
      }
    }
  }

  int64_t Begin(int64_t b) const { return shape.row_splits ? shape.row_splits[b] : b * shape.pairs_per_sample; }
  int64_t FieldOf(int64_t p) const {
    if (!shape.field_splits) return p;
    int64_t field = 0;
    while (shape.field_splits[field + 1] <= p - Begin(sample[p])) ++field;
    return sample[p] * fields + field;
  }

  // close(got, want, factor) is whether they are, to `factor` times what a sum may be off.
  template <typename A, typename Close>
  void Check(const char* where, Output output, const A* interaction, const A* sums, const Close& close) const {
    const int64_t K = shape.dim;
    for (int64_t b = 0; b < shape.num_samples; ++b) {
      double scalar = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double sum = s[b * K + k], v = 0.5 * (sum * sum - q[b * K + k]);
        scalar += v;
        EXPECT(close(sums[b * K + k], sum, 1), "sums b=%ld k=%ld K=%ld", long(b), long(k), long(K));
        if (output == Output::kScalar) continue;
        const double want = output == Output::kSum ? sum : v;
        EXPECT(close(interaction[b * K + k], want, 1), "b=%ld k=%ld K=%ld", long(b), long(k), long(K));
      }
      if (output == Output::kScalar) EXPECT(close(interaction[b], scalar, 1), "b=%ld K=%ld", long(b), long(K));
    }
  }
  template <typename A, typename Weight, typename Close>  // weight(p) of a pair's row
  void CheckLinear(const char* where, const A* linear, const Weight& weight, const Close& close) const {
    for (int64_t b = 0; b < shape.num_samples; ++b) {
      double want = 0;
      for (int64_t p = Begin(b); p < Begin(b + 1); ++p) want += x[p] * weight(p);
      EXPECT(close(linear[b], want, 1), "linear b=%ld", long(b));
    }
  }
  template <typename A, typename Close>
  void CheckEmbeddings(const char* where, const A* embeddings, int64_t size, const Close& close) const {
    for (int64_t i = 0; i < size; ++i) EXPECT(close(embeddings[i], e[i], 1), "embeddings %ld", long(i));
  }

  const FmShape shape;
  const int64_t fields;  // of a sample, if not ragged
  std::vector<double> e, s, q, x;
  std::vector<int64_t> sample;  // of a pair
};

}  // namespace deepfm

#endif  // DEEPFM_TESTS_DEFINITION_H_
