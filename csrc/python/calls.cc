#include "calls.h"

#include <algorithm>

namespace deepfm {
namespace {

[[noreturn]] void Fail(const std::string& text) { throw py::value_error(text); }

bool Is(const std::string& dtype, const char* name) { return dtype == name; }

Output OutputOf(const std::string& output) {
  if (output == "sum") return Output::kSum;
  if (output == "scalar") return Output::kScalar;
  if (output == "vector") return Output::kVector;
  Fail("output must be one of sum, scalar, vector, got '" + output + "'");
}

Rule RuleOf(const std::string& rule) {
  static const char* const names[] = {"sgd", "adagrad", "row_wise_adagrad", "lazy_adam", "ftrl"};
  for (int i = 0; i < 5; ++i)
    if (rule == names[i]) return static_cast<Rule>(i);
  Fail("rule must be one of sgd, adagrad, row_wise_adagrad, lazy_adam, ftrl, got '" + rule + "'");
}

// What an array that may be missing is to whom it concerns.
Array ReadMaybe(Place& place, const char* name, py::handle array, const Dtypes& dtypes, bool written = false) {
  return array.is_none() ? Array() : place.Read(name, array, dtypes, written);
}
const Sizes* SizesOrNull(const Array& array) { return array.owner ? &array.sizes : nullptr; }

// An array that goes with the table, in its dtype.
Array ReadLike(Place& place, const Array& table, const std::string& name, py::handle array, bool written = false) {
  Dtypes all = place.TableDtypes();
  Array found = place.Read(name.c_str(), array, all, written);
  if (found.dtype != table.dtype)
    throw py::type_error(name + " must have the dtype of table, " + table.dtype + ", got " + found.dtype);
  return found;
}

Dtypes Without(const Dtypes& dtypes, std::initializer_list<const char*> names) {
  Dtypes rest;
  for (const char* dtype : dtypes)
    if (std::none_of(names.begin(), names.end(), [&](const char* name) { return Is(dtype, name); }))
      rest.push_back(dtype);
  return rest;
}

Dtypes GradientDtypes(const Place& place) { return Without(place.TableDtypes(), {"uint8", "uint16"}); }

// The field weights, or none, that with the order are an interaction which the place has kernels for.
Array ReadFieldWeights(const CallInputs& in, int order, Given field_weights) {
  Array found = ReadMaybe(in.place, "field_weights", field_weights, {in.acc});
  in.checked.CheckInteraction(order, SizesOrNull(found));
  if (!in.place.OnHost() && (order != 2 || found.owner)) Fail("an order of 3 and field_weights are for the CPU");
  return found;
}

// The arrays of a gradient, held and checked.
struct GradientInputs {
  Array sums, d_interaction, embeddings, d_embeddings, weights, d_linear, counts;
  GradientArgs args;

  GradientInputs(const CallInputs& in, Given sums_given, Given d_interaction_given, Given embeddings_given,
                 Given d_embeddings_given, Given weights_given, Given d_linear_given, double l2, double l2_linear,
                 Given counts_given, double prior, double prior_linear, double prior_softness, bool by_fields = false) {
    Place& place = in.place;
    sums = place.Read("sums", sums_given, {in.acc});
    d_interaction = place.Read("d_interaction", d_interaction_given, {in.acc});
    embeddings = ReadMaybe(place, "embeddings", embeddings_given, {in.acc});
    d_embeddings = ReadMaybe(place, "d_embeddings", d_embeddings_given, {in.acc});
    in.checked.CheckGradient(in.output, sums.sizes, d_interaction.sizes, SizesOrNull(embeddings),
                             SizesOrNull(d_embeddings), by_fields);
    if (weights_given.is_none() != d_linear_given.is_none())
      Fail("weights and d_linear go together: give both or none");
    if (!weights_given.is_none()) {
      weights = ReadLike(place, in.table, "weights", weights_given);
      d_linear = place.Read("d_linear", d_linear_given, {in.acc});
      in.checked.CheckWeights(&weights.sizes);
      CheckShape("d_linear", d_linear.sizes, {in.shape.num_samples, 1});
    }
    if (!counts_given.is_none()) {
      counts = place.Read("counts", counts_given, {"int32"});
      CheckShape("counts", counts.sizes, {in.shape.num_rows});
    } else if (prior != 0 || prior_linear != 0) {
      Fail("a prior needs the counts of the features, got counts=None");
    }
    args.shape = in.shape;
    args.table_type = in.table_type;
    args.output = in.output;
    args.table = in.table.data;
    args.values = in.values.data;
    args.sums = sums.data;
    args.d_interaction = d_interaction.data;
    args.embeddings = embeddings.data;
    args.d_embeddings = d_embeddings.data;
    args.weights = weights.data;
    args.d_linear = d_linear.data;
    args.l2 = l2;
    args.l2_linear = l2_linear;
    args.counts = static_cast<const int32_t*>(counts.data);
    args.prior = prior;
    args.prior_linear = prior_linear;
    args.prior_softness = prior_softness;
  }
};

// A kernels.Update of a table, held and checked.
struct UpdateInputs {
  std::vector<Array> slots;
  Array lag, counts, hyper;
  UpdateArgs args;

  UpdateInputs(Place& place, const Array& table, TableType type, const char* acc, py::handle update,
               const char* of = "") {
    const Sizes& shape = table.sizes;
    const std::string rule = py::cast<std::string>(update.attr("rule")), prefix = of;
    args.rule = RuleOf(rule);
    const RuleShape needs = ShapeOf(args.rule);
    const py::tuple given = py::tuple(update.attr("slots"));
    if (static_cast<int>(given.size()) != needs.slots)
      Fail(rule + " has " + std::to_string(needs.slots) + " slots, got " + std::to_string(given.size()));
    for (int i = 0; i < needs.slots; ++i) {
      const std::string name = prefix + "slots[" + std::to_string(i) + "]";
      slots.push_back(ReadLike(place, table, name, given[i], true));
      CheckShape(name.c_str(), slots[i].sizes, args.rule == Rule::kRowWiseAdagrad ? Sizes{shape[0]} : shape);
      args.slots[i] = slots[i].data;
    }
    if (!update.attr("lag").is_none()) {
      if (table.dtype != acc) throw py::type_error(prefix + "lag needs a table of " + acc + ", got " + table.dtype);
      lag = ReadLike(place, table, prefix + "lag", update.attr("lag"), true);
      CheckShape((prefix + "lag").c_str(), lag.sizes, shape);
    }
    counts = ReadMaybe(place, (prefix + "counts").c_str(), update.attr("counts"), {"int32"});
    if (counts.owner) CheckShape((prefix + "counts").c_str(), counts.sizes, {shape[0]});
    hyper = place.ReadNumbers((prefix + "hyper").c_str(), update.attr("hyper"), acc);
    CheckShape((prefix + "hyper").c_str(), hyper.sizes, {needs.hyper + (lag.owner ? 1 : 0) + (counts.owner ? 2 : 0)});
    args.table_type = type;
    args.num_rows = shape[0];
    args.dim = shape[1];
    args.table = table.data;
    args.lag = lag.data;
    args.counts = static_cast<const int32_t*>(counts.data);
    args.hyper = hyper.data;
  }
};

}  // namespace

bool IsOneOf(const std::string& dtype, const Dtypes& dtypes) {
  return std::any_of(dtypes.begin(), dtypes.end(), [&](const char* allowed) { return Is(dtype, allowed); });
}

void FailDtype(const char* name, const std::string& shown, const Dtypes& dtypes) {
  std::string all;
  for (const char* allowed : dtypes) all += (all.empty() ? "" : ", ") + std::string(allowed);
  throw py::type_error(std::string(name) + " must be " + all + " in native byte order, got " + shown);
}

TableType TableTypeOf(const std::string& dtype) {
  if (dtype == "uint8") return TableType::kInt8;
  if (dtype == "float64") return TableType::kFloat64;
  if (dtype == "bfloat16" || dtype == "uint16") return TableType::kBFloat16;
  if (dtype == "float16") return TableType::kFloat16;
  return TableType::kFloat32;
}

PairInputs::PairInputs(Place& place, const Dtypes& table_dtypes, py::handle table, py::handle indices,
                       bool table_is_written)
    : place(place),
      table(place.Read("table", table, table_dtypes, table_is_written)),
      indices(place.Read("indices", indices, {"int32", "int64"})),
      table_type(TableTypeOf(this->table.dtype)),
      index_type(this->indices.dtype == "int32" ? IndexType::kInt32 : IndexType::kInt64),
      acc(table_type == TableType::kFloat64 ? "float64" : "float32") {
  for (int64_t size : this->indices.sizes) num_pairs *= size;
}

CallInputs::CallInputs(Place& place, const Dtypes& table_dtypes, py::handle table, py::handle indices,
                       py::handle values, py::handle row_splits,
                       const std::optional<std::vector<int64_t>>& field_splits, const std::string& output,
                       bool table_is_written)
    : PairInputs(place, table_dtypes, table, indices, table_is_written),
      output(OutputOf(output)),
      values(ReadMaybe(place, "values", values, {acc})),
      row_splits(ReadMaybe(place, "row_splits", row_splits, {"int64"})),
      checked(Check(field_splits)),
      shape([&] {
        FmShape found = checked.shape;
        if (place.OnHost()) return found;
        found.row_splits = static_cast<const int64_t*>(this->row_splits.data);
        if (field_splits) found.field_splits = place.Splits(*field_splits);
        return found;
      }()) {
  num_samples = shape.num_samples;
}

CheckedShape CallInputs::Check(const std::optional<std::vector<int64_t>>& field_splits) const {
  return CheckedShape(table_type, table.sizes, indices.sizes, SizesOrNull(values),
                      static_cast<const int64_t*>(row_splits.data), SizesOrNull(row_splits),
                      field_splits ? &*field_splits : nullptr, place.OnHost());
}

py::tuple Forward(Place& place, Given table, Given indices, Given values, Given weights, Given row_splits,
                  MaybeSplits field_splits, const std::string& output, int order, Given field_weights,
                  bool return_embeddings) {
  const CallInputs in(place, place.TableDtypes(), table, indices, values, row_splits, field_splits, output);
  const Array of_fields = ReadFieldWeights(in, order, field_weights);
  const Array interaction = place.Make(in.table, in.acc, in.checked.Interaction(in.output));
  const Array sums = place.Make(in.table, in.acc, {in.shape.num_samples, in.shape.dim});
  Array embeddings, linear, first_order;
  if (return_embeddings) embeddings = place.Make(in.table, in.acc, in.checked.Embeddings());
  const bool in_rows = in.table_type == TableType::kInt8;
  if (!weights.is_none() || in_rows) {
    if (!weights.is_none() && in_rows) Fail("a table of uint8 holds the weights in its rows");
    if (!weights.is_none()) first_order = ReadLike(place, in.table, "weights", weights);
    in.checked.CheckWeights(SizesOrNull(first_order));
    linear = place.Make(in.table, in.acc, {in.shape.num_samples, 1});
  }
  ForwardArgs args;
  args.shape = in.shape;
  args.table_type = in.table_type;
  args.index_type = in.index_type;
  args.output = in.output;
  args.table = in.table.data;
  args.indices = in.indices.data;
  args.values = in.values.data;
  args.weights = first_order.data;
  args.interaction = interaction.data;
  args.linear = linear.data;
  args.sums = sums.data;
  args.embeddings = embeddings.data;
  args.order = order;
  args.field_weights = of_fields.data;
  place.Forward(args, in);
  place.Finish(in);
  const auto or_none = [](const Array& array) { return array.owner ? array.owner : py::none(); };
  return py::make_tuple(interaction.owner, sums.owner, or_none(embeddings), or_none(linear));
}

py::tuple Gradient(Place& place, Given table, Given indices, Given values, Given sums, Given d_interaction,
                   Given embeddings, Given d_embeddings, Given weights, Given d_linear, Given row_splits,
                   MaybeSplits field_splits, const std::string& output, int order, Given field_weights,
                   bool need_values, double l2, double l2_linear, Given counts, double prior, double prior_linear,
                   double prior_softness) {
  const CallInputs in(place, GradientDtypes(place), table, indices, values, row_splits, field_splits, output);
  const Array of_fields = ReadFieldWeights(in, order, field_weights);
  GradientInputs gradient(in, sums, d_interaction, embeddings, d_embeddings, weights, d_linear, l2, l2_linear, counts,
                          prior, prior_linear, prior_softness, order == 3 || of_fields.owner);
  place.Group(in);
  const Array unique = place.UniqueRows();
  const Array rows = place.Make(in.table, "", {unique.sizes[0], in.shape.dim});
  Array weight_rows, d_values, d_of_fields;
  if (of_fields.owner) d_of_fields = place.Make(in.table, in.acc, {in.checked.NumFieldWeights()});
  if (gradient.weights.owner) weight_rows = place.Make(in.table, "", {unique.sizes[0], 1});
  if (need_values) d_values = place.Make(in.table, in.acc, in.indices.sizes);
  gradient.args.rows = rows.data;
  gradient.args.weight_rows = weight_rows.data;
  gradient.args.d_values = d_values.data;
  gradient.args.order = order;
  gradient.args.field_weights = of_fields.data;
  gradient.args.d_field_weights = d_of_fields.data;
  place.Gradient(gradient.args);
  place.Finish(in);
  py::list found;
  found.append(unique.owner);
  found.append(rows.owner);
  found.append(need_values ? d_values.owner : py::none());
  if (weight_rows.owner) found.append(weight_rows.owner);
  if (d_of_fields.owner) found.append(d_of_fields.owner);
  return py::tuple(found);
}

void SparseUpdateCall(Place& place, Given table, Given indices, Given gradient, Given update) {
  const PairInputs in(place, GradientDtypes(place), table, indices, true);
  if (in.table.sizes.size() != 2) Fail("table must be rank 2 [V, K], got shape " + TextOf(in.table.sizes));
  if (in.indices.sizes.size() != 1) Fail("indices must be rank 1 [n], got shape " + TextOf(in.indices.sizes));
  const Array rows = ReadLike(place, in.table, "gradient", gradient);
  CheckShape("gradient", rows.sizes, {in.indices.sizes[0], in.table.sizes[1]});
  UpdateInputs updated(place, in.table, in.table_type, in.acc, update);
  updated.args.gradient = rows.data;
  place.Group(in);
  place.Update(updated.args);
  place.Finish(in);
}

void FusedUpdate(Place& place, Given table, Given indices, Given values, Given sums, Given d_interaction, Given update,
                 Given embeddings, Given d_embeddings, Given weights, Given d_linear, Given weights_update,
                 Given row_splits, MaybeSplits field_splits, const std::string& output, double l2, double l2_linear,
                 Given counts, double prior, double prior_linear, double prior_softness) {
  const CallInputs in(place, GradientDtypes(place), table, indices, values, row_splits, field_splits, output, true);
  const GradientInputs gradient(in, sums, d_interaction, embeddings, d_embeddings, weights, d_linear, l2, l2_linear,
                                counts, prior, prior_linear, prior_softness);
  const UpdateInputs updated(place, in.table, in.table_type, in.acc, update);
  std::optional<UpdateInputs> of_weights;
  if (weights.is_none() != weights_update.is_none()) Fail("weights and weights_update go together: give both or none");
  if (!weights.is_none()) {
    const Array written = ReadLike(place, in.table, "weights", weights, true);
    of_weights.emplace(place, written, in.table_type, in.acc, weights_update, "weights_update.");
    if (of_weights->args.rule != updated.args.rule) Fail("weights_update must have the rule of update");
  }
  place.Group(in);
  place.GradientAndUpdate(gradient.args, updated.args, of_weights ? &of_weights->args : nullptr);
  place.Finish(in);
}

}  // namespace deepfm
