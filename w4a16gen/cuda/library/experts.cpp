// The C interface of mixtures of experts: grouped products, and what is done around them.
#include "library/experts.h"

#include <algorithm>
#include <initializer_list>
#include <string>

#include "library/capture.h"
#include "library/checks.h"
#include "library/gemm.h"

namespace w4a16 {
namespace {

constexpr uint64_t kHalfBytes = 2;
constexpr uint64_t kIntBytes = 4;  // of int32 and of float
constexpr int64_t kColumnMultiple = 8;

enum class Use { kRead, kReadIfGiven, kWritten };

// An array of a call.
struct Array {
  Use use;
  const char* name;
  const void* pointer;
  uintptr_t alignment;
  uint64_t bytes;

  Range range() const { return {name, pointer, bytes}; }
};

// A number of a call.
struct Number {
  const char* name;
  int64_t value;
  int64_t least;
  int64_t most;
};

std::string why_not_arrays(std::initializer_list<Array> arrays) {
  for (const Array& array : arrays) {
    const bool may_be_null = array.use == Use::kReadIfGiven || array.bytes == 0;
    if (may_be_null && array.pointer == nullptr) continue;
    std::string sentence = why_not_pointer(array.name, array.pointer, array.alignment);
    if (!sentence.empty()) return sentence;
  }
  for (const Array& written : arrays) {
    if (written.use != Use::kWritten) continue;
    for (const Array& other : arrays) {
      std::string sentence = &other != &written ? why_not_apart(written.range(), other.range()) : std::string();
      if (!sentence.empty()) return sentence;
    }
  }
  return {};
}

std::string why_not_numbers(std::initializer_list<Number> numbers) {
  for (const Number& number : numbers) {
    if (number.value >= number.least && number.value <= number.most) continue;
    return std::string(number.name) + " of " + std::to_string(number.value) + " must be " +
           std::to_string(number.least) + " to " + std::to_string(number.most);
  }
  return {};
}

std::string why_not_columns(int64_t columns) {
  if (columns % kColumnMultiple == 0) return {};
  return "columns of " + std::to_string(columns) + " must be a multiple of " + std::to_string(kColumnMultiple) +
         ": pad the layer with zeros";
}

Number experts_number(int64_t experts) { return {"experts", experts, 1, kMaxExperts}; }
Number tile_tokens_number(int64_t tile_tokens) { return {"tile_tokens", tile_tokens, 1, kMaxDimension}; }

// Of the routes of some tokens.
std::string why_not_routes(int64_t tokens, int64_t slots) {
  std::string sentence = why_not_numbers({{"tokens", tokens, 0, kMaxDimension}, {"slots", slots, 1, kMaxDimension}});
  if (sentence.empty() && tokens * slots > kMaxDimension) {
    sentence = "tokens * slots of " + std::to_string(tokens * slots) + " must be at most " +
               std::to_string(kMaxDimension) + ": split the tokens";
  }
  return sentence;
}

std::string why_not_room(size_t given, int64_t rows, int64_t experts, int64_t tile_tokens) {
  const auto needed = static_cast<size_t>(token_tiles_bytes(rows, experts, tile_tokens));
  return given < needed ? why_not_bytes("list of token tiles", given, needed, "be at least") : std::string();
}

uint64_t bytes_of(int64_t rows, int64_t columns, uint64_t element) {
  return static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns) * element;
}

// The numbers of ids; their arrays are checked with the others of a call.
std::string why_not_ids(const w4a16_ids& given) {
  std::string sentence;
  if (given.expert_map != nullptr) {
    sentence = why_not_numbers({{"global_experts", given.global_experts, 1, kMaxDimension}});
  }
  if (sentence.empty() && given.id_bytes != 4 && given.id_bytes != 8) {
    sentence = "id_bytes of " + std::to_string(given.id_bytes) + " must be 4 or 8";
  }
  return sentence;
}

std::string why_not_unsorted(const w4a16_ids& given, int64_t experts, int64_t tokens, int64_t slots) {
  const std::string sentence = why_not_numbers({experts_number(experts),
                                                {"tokens of unsorted routes", tokens, 0, kUnsortedTokens},
                                                {"slots", slots, 1, kMaxUnsortedRoutes},
                                                {"unsorted routes", tokens * slots, 0, kMaxUnsortedRoutes}});
  return sentence.empty() ? why_not_ids(given) : sentence;
}

Array ids_array(const w4a16_ids& given, int64_t routes) {
  const auto id_bytes = static_cast<uint64_t>(given.id_bytes);
  return {Use::kRead, "ids", given.ids, id_bytes, bytes_of(routes, 1, id_bytes)};
}

Array map_array(const w4a16_ids& given) {
  return {Use::kReadIfGiven, "expert map", given.expert_map, kIntBytes, bytes_of(given.global_experts, 1, kIntBytes)};
}

std::string why_not(const w4a16_route_arguments& given) {
  std::string sentence = why_not_routes(given.tokens, given.slots);
  if (sentence.empty()) {
    sentence = why_not_numbers({experts_number(given.experts), tile_tokens_number(given.tile_tokens)});
  }
  if (sentence.empty()) sentence = why_not_ids({given.ids, given.expert_map, given.global_experts, given.id_bytes});
  const bool gathers = given.hidden != nullptr;
  if (sentence.empty() && gathers) sentence = why_not_numbers({{"columns", given.columns, 1, kMaxDimension}});
  if (sentence.empty() && gathers) sentence = why_not_columns(given.columns);
  if (!sentence.empty()) return sentence;
  const int64_t routes = given.tokens * given.slots;
  const w4a16_ids ids{given.ids, given.expert_map, given.global_experts, given.id_bytes};
  sentence = why_not_arrays({
      ids_array(ids, routes),
      map_array(ids),
      {Use::kWritten, "offsets", given.offsets, kIntBytes, bytes_of(given.experts + 1, 1, kIntBytes)},
      {Use::kWritten, "routes of rows", given.routes_of_rows, kIntBytes, bytes_of(routes, 1, kIntBytes)},
      {Use::kWritten, "rows of routes", given.rows_of_routes, kIntBytes, bytes_of(routes, 1, kIntBytes)},
      {Use::kWritten, "list of token tiles", given.token_tiles, kTensorAlignment, given.token_tiles_bytes},
      {Use::kReadIfGiven, "hidden states", given.hidden, kTensorAlignment,
       bytes_of(given.tokens, given.columns, kHalfBytes)},
      {Use::kReadIfGiven, "routing weights", gathers ? given.weights : nullptr, kIntBytes,
       bytes_of(routes, 1, kIntBytes)},
      {gathers ? Use::kWritten : Use::kReadIfGiven, "rows", gathers ? given.rows : nullptr, kTensorAlignment,
       bytes_of(routes, given.columns, kHalfBytes)},
  });
  return sentence.empty() ? why_not_room(given.token_tiles_bytes, routes, given.experts, given.tile_tokens) : sentence;
}

std::string why_not(const w4a16_listing_arguments& given) {
  std::string sentence = why_not_numbers(
      {{"rows", given.rows, 0, kMaxDimension}, experts_number(given.experts), tile_tokens_number(given.tile_tokens)});
  const int sources = (given.offsets != nullptr) + (given.counts != nullptr) + (given.indices != nullptr);
  const bool has_no_rows = sources == 0 && given.rows == 0;  // an array of no indices may be null
  if (sentence.empty() && sources != 1 && !has_no_rows) {
    sentence = "offsets, counts or indices must be given, and only one of them";
  }
  if (sentence.empty() && given.counts != nullptr) {
    sentence = why_not_numbers({{"stride", given.stride, 1, kMaxDimension}});
  }
  if (!sentence.empty()) return sentence;
  sentence = why_not_arrays({
      {Use::kReadIfGiven, "offsets", given.offsets, kIntBytes, bytes_of(given.experts + 1, 1, kIntBytes)},
      {Use::kReadIfGiven, "counts", given.counts, kIntBytes, bytes_of(given.experts, 1, kIntBytes)},
      {Use::kReadIfGiven, "indices", given.indices, kIntBytes, bytes_of(given.rows, 1, kIntBytes)},
      {Use::kWritten, "list of token tiles", given.token_tiles, kTensorAlignment, given.token_tiles_bytes},
  });
  return sentence.empty() ? why_not_room(given.token_tiles_bytes, given.rows, given.experts, given.tile_tokens)
                          : sentence;
}

std::string why_not(const w4a16_gather_arguments& given) {
  std::string sentence = why_not_routes(given.tokens, given.slots);
  if (sentence.empty()) sentence = why_not_numbers({{"columns", given.columns, 1, kMaxDimension}});
  if (sentence.empty()) sentence = why_not_columns(given.columns);
  if (!sentence.empty() || given.tokens == 0) return sentence;
  const int64_t routes = given.tokens * given.slots;
  return why_not_arrays({
      {Use::kRead, "hidden states", given.hidden, kTensorAlignment, bytes_of(given.tokens, given.columns, kHalfBytes)},
      {Use::kRead, "row count", given.row_count, kIntBytes, kIntBytes},
      {Use::kRead, "routes of rows", given.routes_of_rows, kIntBytes, bytes_of(routes, 1, kIntBytes)},
      {Use::kReadIfGiven, "routing weights", given.weights, kIntBytes, bytes_of(routes, 1, kIntBytes)},
      {Use::kWritten, "rows", given.rows, kTensorAlignment, bytes_of(routes, given.columns, kHalfBytes)},
  });
}

std::string why_not(const w4a16_activate_arguments& given) {
  std::string sentence =
      why_not_numbers({{"rows", given.rows, 0, kMaxDimension}, {"columns", given.columns, 1, kMaxDimension}});
  if (sentence.empty()) sentence = why_not_columns(given.columns);
  if (sentence.empty() && !is_gated(given.activation)) {
    sentence = "activation of " + std::to_string(given.activation) + " must be a gated w4a16_activation, " +
               std::to_string(W4A16_SWIGLU) + " to " + std::to_string(W4A16_GEGLU);
  }
  if (!sentence.empty() || given.rows == 0) return sentence;
  const uint64_t bytes = bytes_of(given.rows, given.columns, kHalfBytes);
  return why_not_arrays({
      {Use::kRead, "gates and factors", given.gates_and_factors, kTensorAlignment, 2 * bytes},
      {Use::kReadIfGiven, "row count", given.row_count, kIntBytes, kIntBytes},
      {Use::kWritten, "output", given.output, kTensorAlignment, bytes},
  });
}

std::string why_not(const w4a16_combine_arguments& given) {
  std::string sentence = why_not_routes(given.tokens, given.slots);
  if (sentence.empty()) sentence = why_not_numbers({{"columns", given.columns, 1, kMaxDimension}});
  if (sentence.empty()) sentence = why_not_columns(given.columns);
  if (!sentence.empty() || given.tokens == 0) return sentence;
  const int64_t routes = given.tokens * given.slots;
  const bool is_unsorted = given.rows_of_routes == nullptr && given.unsorted.ids != nullptr;
  if (is_unsorted) sentence = why_not_unsorted(given.unsorted, given.experts, given.tokens, given.slots);
  if (!sentence.empty()) return sentence;
  const int64_t rows = is_unsorted ? unsorted_rows(routes, given.experts) : routes;
  return why_not_arrays({
      {Use::kRead, "rows", given.rows, kTensorAlignment, bytes_of(rows, given.columns, kHalfBytes)},
      is_unsorted
          ? ids_array(given.unsorted, routes)
          : Array{Use::kRead, "rows of routes", given.rows_of_routes, kIntBytes, bytes_of(routes, 1, kIntBytes)},
      map_array(is_unsorted ? given.unsorted : w4a16_ids{}),
      {Use::kReadIfGiven, "routing weights", given.weights, kIntBytes, bytes_of(routes, 1, kIntBytes)},
      {Use::kWritten, "output", given.output, kTensorAlignment, bytes_of(given.tokens, given.columns, kHalfBytes)},
  });
}

std::string why_not_stride(size_t stride, size_t packed_bytes) {
  if (stride >= packed_bytes && stride % kPackedAlignment == 0) return {};
  return why_not_bytes("packed stride", stride, packed_bytes,
                       "be a multiple of " + std::to_string(kPackedAlignment) + ", and at least");
}

std::string why_not_experts(const Kernel& kernel, const Problem& problem, const w4a16_experts& experts,
                            size_t packed_bytes) {
  std::string sentence = why_not_numbers({experts_number(experts.count)});
  if (sentence.empty() && experts.unsorted.ids != nullptr) {
    sentence = why_not_unsorted(experts.unsorted, experts.count, problem.m, experts.slots);
    if (sentence.empty()) {
      sentence = why_not_arrays({ids_array(experts.unsorted, problem.m * experts.slots), map_array(experts.unsorted)});
    }
    if (sentence.empty() && kernel.info.cta[1] != kUnsortedTokens) {
      sentence = std::string("unsorted routes need a kernel with ") + std::to_string(kUnsortedTokens) +
                 " CTA tokens, but " + kernel.info.name + " has " + std::to_string(kernel.info.cta[1]);
    }
    return sentence.empty() ? why_not_stride(experts.packed_stride, packed_bytes) : sentence;
  }
  if (sentence.empty() && experts.tile_tokens != kernel.info.cta[1]) {
    sentence = "tile_tokens of " + std::to_string(experts.tile_tokens) + " must be " +
               std::to_string(kernel.info.cta[1]) + ", those of " + kernel.info.name + ": make another list";
  }
  if (sentence.empty()) sentence = why_not_stride(experts.packed_stride, packed_bytes);
  if (sentence.empty()) sentence = why_not_pointer("list of token tiles", experts.token_tiles, kTensorAlignment);
  if (!sentence.empty()) return sentence;
  return why_not_room(experts.token_tiles_bytes, problem.m, experts.count, experts.tile_tokens);
}

cudaError_t clear(void* written, uint64_t bytes, void* stream) {
  return cudaMemsetAsync(written, 0, bytes, static_cast<cudaStream_t>(stream));
}

// Does what is left to do of a call of size 0: an empty list has a length, and offsets have values.
template <class Arguments>
cudaError_t finish_empty(const Arguments&) {
  return cudaSuccess;
}

cudaError_t finish_empty(const w4a16_listing_arguments& given) {
  return clear(given.token_tiles, kTokenTileBytes, given.stream);
}

cudaError_t finish_empty(const w4a16_route_arguments& given) {
  const cudaError_t error = clear(given.offsets, bytes_of(given.experts + 1, 1, kIntBytes), given.stream);
  return error == cudaSuccess ? clear(given.token_tiles, kTokenTileBytes, given.stream) : error;
}

// Checks a call of one of the functions of experts, and makes it. A call of size 0 launches no kernel.
template <class Arguments, class Call>
w4a16_status call(const char* what, const Arguments* arguments, int64_t Arguments::* size, const Call& launch,
                  char* message, size_t message_bytes) {
  if (arguments == nullptr) return report(W4A16_INVALID_ARGUMENT, "arguments must not be null", message, message_bytes);
  std::string sentence = why_not(*arguments);
  if (sentence.empty()) sentence = why_not_launch(arguments->dependent_launch);
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  if (arguments->*size == 0) return report_launch(what, finish_empty(*arguments), message, message_bytes);
  const auto is_grouped = [](const Kernel* kernel) { return kernel->experts != nullptr; };
  const Kernel* const* const found = std::find_if(kKernels, kKernels + kKernelCount, is_grouped);
  if (found == kKernels + kKernelCount) {
    sentence = "this build holds no grouped kernel, and " + std::string(what) +
               " comes with those: run `w4a16gen build --space experts`";
    return report(W4A16_UNSUPPORTED, sentence, message, message_bytes);
  }
  const Device& device = current_device();
  sentence = why_not_device(device);
  if (!sentence.empty()) return report(W4A16_NO_HOPPER_GPU, sentence, message, message_bytes);
  Arguments resolved = *arguments;
  resolved.dependent_launch = resolved_launch(resolved.dependent_launch, resolved.stream, device.sm_count).kind;
  return report_launch(what, launch(*(*found)->experts, resolved, device.sm_count), message, message_bytes);
}

}  // namespace
}  // namespace w4a16

using w4a16::ExpertFunctions;
using w4a16::Kernel;
using w4a16::report;

w4a16_status w4a16_grouped_gemm(int kernel, const w4a16_problem* problem, const w4a16_gemm_arguments* arguments,
                                const w4a16_experts* experts, char* message, size_t message_bytes) {
  w4a16_status status;
  std::string sentence;
  const Kernel* found = w4a16::find(kernel, problem, &status, &sentence);
  if (found == nullptr) return report(status, sentence, message, message_bytes);
  if (found->info.grouped == 0) {
    sentence = std::string(found->info.name) + " is no grouped kernel: call w4a16_gemm, or take a kernel of " +
               "`w4a16gen build --space experts`";
    return report(W4A16_UNSUPPORTED, sentence, message, message_bytes);
  }
  if (arguments == nullptr) return report(W4A16_INVALID_ARGUMENT, "arguments must not be null", message, message_bytes);
  if (experts == nullptr) return report(W4A16_INVALID_ARGUMENT, "experts must not be null", message, message_bytes);
  if (problem->m == 0) return report(W4A16_OK, {}, message, message_bytes);
  sentence = w4a16::why_not_experts(*found, *problem, *experts, found->packed_bytes(*problem));
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  return w4a16::multiply(*found, {*problem, *arguments, 0, 0, *experts}, message, message_bytes);
}

w4a16_status w4a16_token_tiles_bytes(int64_t rows, int64_t experts, int64_t tile_tokens, size_t* bytes, char* message,
                                     size_t message_bytes) {
  const std::string sentence = w4a16::why_not_numbers({{"rows", rows, 0, w4a16::kMaxDimension},
                                                       w4a16::experts_number(experts),
                                                       w4a16::tile_tokens_number(tile_tokens)});
  if (!sentence.empty()) return report(W4A16_INVALID_ARGUMENT, sentence, message, message_bytes);
  if (bytes != nullptr) *bytes = static_cast<size_t>(w4a16::token_tiles_bytes(rows, experts, tile_tokens));
  return report(W4A16_OK, {}, message, message_bytes);
}

w4a16_status w4a16_route(const w4a16_route_arguments* arguments, char* message, size_t message_bytes) {
  const auto launch = [](const ExpertFunctions& functions, const w4a16_route_arguments& given, int sm_count) {
    return functions.route(given, sm_count);
  };
  return w4a16::call("routing", arguments, &w4a16_route_arguments::tokens, launch, message, message_bytes);
}

w4a16_status w4a16_list_token_tiles(const w4a16_listing_arguments* arguments, char* message, size_t message_bytes) {
  const auto launch = [](const ExpertFunctions& functions, const w4a16_listing_arguments& given, int) {
    return functions.list_token_tiles(given);
  };
  return w4a16::call("listing token tiles", arguments, &w4a16_listing_arguments::rows, launch, message, message_bytes);
}

w4a16_status w4a16_gather_rows(const w4a16_gather_arguments* arguments, char* message, size_t message_bytes) {
  const auto launch = [](const ExpertFunctions& functions, const w4a16_gather_arguments& given, int sm_count) {
    return functions.gather_rows(given, sm_count);
  };
  return w4a16::call("gathering rows", arguments, &w4a16_gather_arguments::tokens, launch, message, message_bytes);
}

w4a16_status w4a16_activate_rows(const w4a16_activate_arguments* arguments, char* message, size_t message_bytes) {
  const auto launch = [](const ExpertFunctions& functions, const w4a16_activate_arguments& given, int sm_count) {
    return functions.activate_rows(given, sm_count);
  };
  return w4a16::call("activating rows", arguments, &w4a16_activate_arguments::rows, launch, message, message_bytes);
}

w4a16_status w4a16_combine_rows(const w4a16_combine_arguments* arguments, char* message, size_t message_bytes) {
  const auto launch = [](const ExpertFunctions& functions, const w4a16_combine_arguments& given, int sm_count) {
    return functions.combine_rows(given, sm_count);
  };
  return w4a16::call("combining rows", arguments, &w4a16_combine_arguments::tokens, launch, message, message_bytes);
}
