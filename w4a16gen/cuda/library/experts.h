// The sizes of a mixture of experts, for the library and for kernel families.
#pragma once

#include <cstdint>

#include "w4a16.h"

namespace w4a16 {

constexpr int64_t kMaxExperts = 1024;    // routing has a thread for each, in one CTA
constexpr int64_t kTokenTileBytes = 16;  // of an entry of the list of token tiles, and of the list's head

// How many entries the list of a grouped product may have: every expert's last tile may be almost empty.
constexpr int64_t max_token_tiles(int64_t rows, int64_t experts, int64_t tile_tokens) {
  return rows / tile_tokens + (experts < rows ? experts : rows);
}

constexpr int64_t listed_bytes(int64_t rows, int64_t experts, int64_t tile_tokens) {
  return (max_token_tiles(rows, experts, tile_tokens) + 1) * kTokenTileBytes;
}

// Routes up to which one CTA sorts, and with which each CTA begins that gathers rows as well. More are sorted in parts,
// a CTA for each, which first count the routes of each expert behind the list.
constexpr int64_t kMaxRoutesOfCta = 2048;
constexpr int64_t kMaxSortedParts = 128;

constexpr int64_t sorted_parts(int64_t routes) {
  const int64_t parts = (routes + 1023) / 1024;
  return routes <= kMaxRoutesOfCta ? 1 : parts < kMaxSortedParts ? parts : kMaxSortedParts;
}

constexpr int64_t token_tiles_bytes(int64_t rows, int64_t experts, int64_t tile_tokens) {
  const int64_t parts = sorted_parts(rows);
  const int64_t counts = parts > 1 ? parts * experts * 4 : 0;
  return listed_bytes(rows, experts, tile_tokens) + (counts + kTokenTileBytes - 1) / kTokenTileBytes * kTokenTileBytes;
}

// Products of few tokens find their experts in the ids themselves, and no launch sorts routes first. Each expert that
// is chosen then multiplies all tokens: a tile has as many tokens in any case.
constexpr int kUnsortedTokens = W4A16_MAX_UNSORTED_TOKENS;
constexpr int kMaxUnsortedRoutes = W4A16_MAX_UNSORTED_ROUTES;

// The rows of such a product.
constexpr int64_t unsorted_rows(int64_t routes, int64_t experts) {
  return kUnsortedTokens * (experts < routes ? experts : routes);
}

}  // namespace w4a16
